"""Time to load and peak memory of a saved model, each in a process of its own.

    python -m ptq.bench.loading FOLDER [DTYPE]

prints one line of JSON: seconds to load, peak resident bytes after a few tokens.
"""

import json
import pathlib
import subprocess
import sys
import time
from typing import Any

from ptq.errors import UserError

TOKENS = 4
"""Tokens that are generated before memory is read: kernels have packed by then."""


def loading(folder: pathlib.Path, dtype: str) -> dict[str, float]:
    """Returns seconds to load the model in `folder` and its peak resident bytes, from a process of its own.

    Raises:
        UserError: when that process fails.
    """
    command = [sys.executable, "-m", "ptq.bench.loading", str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"bench: loading {folder} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(folder: str, dtype: str) -> None:
    """Loads, generates, and prints what it took."""
    import torch
    from transformers import AutoModelForCausalLM

    import ptq.integrations.transformers  # noqa: F401
    from ptq.run.record.peak_memory import resident_peak

    start = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    seconds = time.perf_counter() - start
    with torch.no_grad():
        model.generate(torch.arange(5, 21)[None], max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    print(json.dumps({"seconds": seconds, "peak_bytes": resident_peak()}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
