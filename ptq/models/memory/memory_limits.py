"""How much memory this process may hold, and how much of that is still free."""

import pathlib
from collections.abc import Iterator

import psutil
import torch

from ptq.models.memory.control_groups import ROOT, group_folders, text_of

_NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""By version of control groups: the file of the limit, the file of what is used, and what of that is a cache that would be given up."""


def memory_limit(root: pathlib.Path = ROOT) -> int:
    """Returns the bytes that this process may hold on the CPU: the machine's, or the least of its control groups' limits."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _groups(root))])


def free_memory(device: torch.device, root: pathlib.Path = ROOT) -> int:
    """Returns the bytes that may still be taken on `device`: of the machine's memory, no more than the control groups leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    left = (max(0, limit - used) for limit, used in _groups(root))
    return min([int(psutil.virtual_memory().available), *left])


def _groups(root: pathlib.Path) -> Iterator[tuple[int, int]]:
    """Yields (limit, what is used beside a cache of files), bytes, of each control group that has a limit."""
    for folder, version in group_folders("memory", root):
        limit, used, cache = _NAMES[version]
        bound, held = text_of(folder / limit), text_of(folder / used)
        if bound.isdigit():
            kept = dict(line.split(maxsplit=1) for line in text_of(folder / "memory.stat").splitlines() if " " in line)
            yield int(bound), (int(held) if held.isdigit() else 0) - int(kept.get(cache, 0))
