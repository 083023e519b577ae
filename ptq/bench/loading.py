"""Time to load and peak memory of a saved model, each in a process of its own.

    python -m ptq.bench.loading FOLDER DTYPE DEVICE

prints one line of JSON: seconds to load, peak resident bytes after a few tokens, or the most that torch has allocated on a GPU.
"""

import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import torch

from ptq.errors import UserError

TOKENS = 4
"""Tokens that are generated before memory is read: kernels have packed by then."""


def loading(folder: pathlib.Path, dtype: str, device: torch.device) -> dict[str, float]:
    """Returns seconds to load the model in `folder` onto `device` and its peak bytes there, from a process of its own.

    Raises:
        UserError: when that process fails.
    """
    command = [sys.executable, "-m", "ptq.bench.loading", str(folder), dtype, str(device)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"bench: loading {folder} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(folder: str, dtype: str, device: str) -> None:
    """Loads, generates, and prints what it took."""
    from transformers import AutoModelForCausalLM

    import ptq.integrations.transformers  # noqa: F401
    from ptq.run.record.peak_memory import resident_peak

    start = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = model.to(device)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        model.generate(torch.arange(5, 21)[None].to(device), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    here = model.device.type == "cpu"
    peak = resident_peak() if here else torch.cuda.max_memory_allocated(device)
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
