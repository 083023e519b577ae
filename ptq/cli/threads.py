"""How many threads torch computes with: as many as this process may use physical cores."""

import math
import os
import pathlib
from collections.abc import Iterator

from ptq.models.memory.control_groups import ROOT, group_folders, text_of


def limit_threads() -> None:
    """Lowers torch's threads to `usable_cores`; what OMP_NUM_THREADS says, which torch follows, is never exceeded.

    torch counts the machine's cores: more threads than a container's quota or a mask of CPUs lets run take turns on them.
    """
    import torch

    if (cores := usable_cores()) < torch.get_num_threads():
        torch.set_num_threads(cores)


def usable_cores(root: pathlib.Path = ROOT) -> int:
    """Returns how many physical cores this process may use, at least 1: by its mask of CPUs and its control group's quota.

    Args:
        root: where ``proc`` and ``sys`` are mounted. Where they do not say, a CPU counts as a core and no quota holds.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    # CPUs that are threads of one core name the same siblings.
    cores = {
        text_of(root / f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") or f"cpu {n}" for n in allowed
    }
    return max(1, min([len(cores), *(math.floor(quota) for quota in _quotas(root))]))


def _quotas(root: pathlib.Path) -> Iterator[float]:
    """Yields the CPUs that each control group above this process allows, of version 1 or 2."""
    for folder, version in group_folders("cpu", root):
        words = (
            text_of(folder / "cpu.max").split()
            if version == 2
            else [text_of(folder / "cpu.cfs_quota_us"), text_of(folder / "cpu.cfs_period_us")]
        )
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            yield int(words[0]) / int(words[1])
