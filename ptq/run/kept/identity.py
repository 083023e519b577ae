"""What makes two runs the same one, known before any weight is read; and whether a folder holds that run, finished."""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ptq.files.bounded import parse_json
from ptq.files.source_digest import package_digest
from ptq.files.versions import version_of

METRICS = "metrics.json"


def digest_of(parts: Mapping[str, Any]) -> str:
    """Returns the SHA-256 over `parts`, as JSON holds them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def machine(device: torch.device, devices: Sequence[torch.device] = ()) -> dict[str, object]:
    """Returns what of code, libraries and machine may change the bits of results; `devices` are those that blocks are computed on.

    Sums are taken in another order by another number of threads, another processor, or another precision of products.
    """
    where: dict[str, object] = {
        "source": package_digest(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "device": device.type,
        "precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cpu":
        where |= {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    elif device.type == "cuda":
        where |= {"gpu": torch.cuda.get_device_name(device), "tf32": torch.backends.cuda.matmul.allow_tf32}
    kinds = [device.type if device.type == "cpu" else torch.cuda.get_device_name(device) for device in devices]
    # Devices of one kind give the bits of one of them.
    return where | {"devices": kinds} if len(set(kinds)) > 1 else where


def finished(folder: pathlib.Path, identity: str) -> bool:
    """Returns whether a run that has this identity has ended in `folder`."""
    try:
        metrics = parse_json((folder / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(metrics, dict) and metrics.get("identity") == identity
