"""What batch size and threads change in a GPTQ run: codes that differ, and what that does to the figures.

`python -m experiments.bench.batches_and_threads MODEL [WORK]`; WORK keeps the runs.
"""

import contextlib
import io
import json
import pathlib
import sys
import tempfile
from typing import Any

import torch
from safetensors.torch import load_file

from ptq.config.building import recipe_from
from ptq.run.experiment import run

INPUTS: dict[str, Any] = {
    "weights only": None,
    "static inputs": {"bits": 8, "granularity": "tensor", "symmetric": False},
}


def measured(
    model: str, work: pathlib.Path, inputs: str, batch: int, threads: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Runs GPTQ at 4 bits; returns all codes by name, and the metrics."""
    torch.set_num_threads(threads)
    place = work / f"{inputs}-{batch}-{threads}"
    recipe = {
        "name": "batches",
        "model": {"path": model},
        "calibration": {"samples": 16, "length": 128, "batch_size": batch},
        "evaluation": {"windows": 8, "length": 128},
        "scheme": {"weight": {"bits": 4, "granularity": "group", "group_size": 32}, "input": INPUTS[inputs]},
        "steps": {"gptq": {}},
        "execution": {"save": True},
        "outputs": str(place / "outputs"),
        "store": str(place / "store"),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        folder = run(recipe_from(recipe))
    blocks = [load_file(path) for path in sorted((folder / "quantized").glob("block-*.safetensors"))]
    codes = {name: value for block in blocks for name, value in block.items() if name.endswith(".codes")}
    return codes, json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def main(model: str, work: pathlib.Path) -> None:
    """Prints a line for each setting, against one sample a batch and one thread."""
    for inputs in INPUTS:
        first, figures = measured(model, work, inputs, 1, 1)
        total = sum(codes.numel() for codes in first.values())
        for batch, threads in ((4, 1), (16, 1), (1, 2), (4, 2), (16, 2)):
            codes, other = measured(model, work, inputs, batch, threads)
            differ = sum(int((codes[name] != value).sum()) for name, value in first.items())
            print(
                f"{inputs}, batch {batch}, threads {threads}: {differ} of {total} codes differ, KL "
                f"{other['kl_mean']:.3e} against {figures['kl_mean']:.3e}, perplexity {other['quantized_perplexity']:.5f} "
                f"against {figures['quantized_perplexity']:.5f}"
            )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(sys.argv[1], pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else temporary))
