"""Memory of a run on long windows, beside what a mask of all pairs of tokens and the logits of a window would take.

    python -m experiments.bench.long_windows [--length 32768] [--vocabulary 32000]

Writes a tiny random LLaMA with that many positions and tokens, then calibrates, solves (GPTQ W4A16) and evaluates on windows of that
length, each length in a fresh process, with a batch of one and hidden states on disk. A short window shows what does not grow.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

import torch
import transformers

from ptq.config.building import recipe_from
from ptq.run.record.peak_memory import resident_peak
from ptq.testing import BOS, BYTE_VOCABULARY, EOS, byte_tokenizer

SHORT = 1024


def write_model(folder: pathlib.Path, length: int, vocabulary: int) -> None:
    """Writes the random model with a byte tokenizer."""
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=max(vocabulary, BYTE_VOCABULARY), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=length, bos_token_id=BOS, eos_token_id=EOS,
        pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).half().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def work(folder: pathlib.Path, length: int) -> None:
    """Runs the recipe on windows of this length; prints what it held."""
    from ptq.run.experiment import run

    recipe = recipe_from(
        {
            "name": f"long-{length}",
            "model": {"path": str(folder)},
            "data": {"allow_overlap": True},
            "calibration": {"samples": 1, "length": length, "batch_size": 1},
            "evaluation": {"windows": 1, "length": length},
            "scheme": {"weight": {"bits": 4, "granularity": "group", "group_size": 64}},
            "steps": {"gptq": {}},
            "execution": {"weights": "offloaded", "hidden_states": "disk"},
            "outputs": str(folder / "outputs"),
            "store": str(folder / "store"),
        }
    )
    start = time.perf_counter()
    run(recipe)
    print(f"{length} tokens a window: peak {resident_peak() / 2**20:.0f} MiB, {time.perf_counter() - start:.0f} s")


def main() -> None:
    """Measures a short and a long window, each in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--work", type=pathlib.Path, help="only the work, in this process, on the model in this folder")
    options = parser.parse_args()
    if options.work:
        work(options.work, options.length)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(pathlib.Path(folder), options.length, options.vocabulary)
        for length in (SHORT, options.length):
            command = [sys.executable, "-m", "experiments.bench.long_windows", "--work", folder, f"--length={length}"]
            subprocess.run(command, check=True)
    mask, logits = options.length**2, 4 * options.length * options.vocabulary
    print(
        f"a mask of all pairs, 1 byte each: {mask / 2**20:.0f} MiB; the logits of a window, fp32: {logits / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
