"""vLLM as a process that generates: lines of JSON in and out. Runs in any environment with vLLM, and needs nothing else of this project.

    python ptq/bench/processes/vllm_process.py FOLDER DTYPE CONTEXT SEQUENCES

reads lines of JSON, ``{"ids": [[...], ...], "tokens": n}``, generates n tokens greedily after each prompt, none of which ends it early, and
answers each with a line: the generated ids, a list a prompt.
"""

import json
import os
import sys

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
"""No network, 1 GiB of key-value cache, one process."""


def main() -> None:
    """Answers until stdin ends."""
    folder, dtype, context, sequences = sys.argv[1:]
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import vllm

    model = vllm.LLM(
        folder, dtype=dtype, max_model_len=int(context), max_num_batched_tokens=int(context), max_num_seqs=int(sequences),
        skip_tokenizer_init=True, enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    for line in sys.stdin:
        request = json.loads(line)
        tokens = request["tokens"]
        options = vllm.SamplingParams(
            max_tokens=tokens, min_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in request["ids"]]
        done = model.generate(prompts, options, use_tqdm=False)
        print("\n" + json.dumps([list(one.outputs[0].token_ids) for one in done]), flush=True)
    # The engine's threads outlive what they need when the interpreter takes things down.
    os._exit(0)


if __name__ == "__main__":
    main()
