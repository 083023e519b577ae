"""Seconds of a run by one rank with one thread and by two, and whether both end with the same bits.

    python -m experiments.bench.ranks [--samples 32] [--length 512] [--layers 4] [--ranks 2] [--rounds 2] [overrides]

GPTQ W4A16, or what overrides say (``method=autoround steps.autoround.steps=20``), and the evaluation of a random OPT with OPT-125M's block,
by torchrun in fresh processes. The ratio is of the seconds that the runs' own phases took (calibration, quantization, evaluation), the
least of the rounds: Python's start is the same in both.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ptq.testing import BOS, BYTE_VOCABULARY, EOS, byte_tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def write_model(folder: pathlib.Path, layers: int) -> None:
    """Writes a random OPT with OPT-125M's width and a byte tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "opt", hidden_size=768, ffn_dim=3072, num_hidden_layers=layers, num_attention_heads=12, word_embed_proj_dim=768,
        vocab_size=BYTE_VOCABULARY, bos_token_id=BOS, eos_token_id=EOS, max_position_embeddings=2048,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def run(ranks: int, folder: pathlib.Path, arguments: argparse.Namespace) -> tuple[float, dict[str, torch.Tensor]]:
    """Runs the recipe by so many ranks in a folder of its own; returns the seconds of its phases, and its saved tensors."""
    windows = f"evaluation.windows={max(2, arguments.samples // 4)}"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(ROOT / "main.py"),
        "--config", "smollm2-135m_w4a16", f"model.path={folder.parent / 'model'}", "model.dtype=float32", "data=docs",
        *(arguments.overrides or ["method=gptq"]), f"calibration.samples={arguments.samples}",
        f"calibration.length={arguments.length}", f"evaluation.length={arguments.length}", windows, "execution.device=cpu",
        "execution.save=true", f"outputs={folder / 'outputs'}", f"store={folder / 'store'}", "data.allow_overlap=true",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    (found,) = (folder / "outputs").glob("*/*/metrics.json")
    seconds = json.loads(found.read_text(encoding="utf-8"))["seconds"]
    tensors = {
        f"{path.name} {key}": tensor
        for path in sorted((found.parent / "quantized").glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }
    return sum(seconds[phase] for phase in ("baseline", "quantize", "evaluate")), tensors


def main() -> None:
    """Prints the seconds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"samples": 32, "length": 512, "layers": 4, "ranks": 2, "rounds": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("overrides", nargs="*", help="of the recipe smollm2-135m_w4a16")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_model(folder / "model", arguments.layers)
        best: dict[int, float] = {}
        saved: dict[int, dict[str, torch.Tensor]] = {}
        for round_ in range(arguments.rounds):
            for ranks in (1, arguments.ranks):
                seconds, saved[ranks] = run(ranks, folder / f"{round_}-{ranks}", arguments)
                best[ranks] = min(best.get(ranks, seconds), seconds)
        one, many = saved[1], saved[arguments.ranks]
        equal = one.keys() == many.keys() and all(torch.equal(t, many[key]) for key, t in one.items())
        print(f"1 rank {best[1]:.1f} s, {arguments.ranks} ranks {best[arguments.ranks]:.1f} s, one thread each")
        print(f"{best[1] / best[arguments.ranks]:.2f} x as fast; codes and scales {'equal' if equal else 'DIFFER'}")


if __name__ == "__main__":
    main()
