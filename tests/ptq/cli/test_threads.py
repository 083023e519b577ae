"""Threads are as many as the process may use cores, by every file that says so."""

import os
import pathlib

import pytest
import torch

from ptq.cli import threads
from ptq.cli.threads import limit_threads, usable_cores
from tests.tools.written_files import write_files


def machine(root: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    """Writes what a machine of 8 CPUs, two to a core, says of itself, and `files`."""
    siblings = {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}\n" for n in range(8)
    }
    return write_files(root, siblings | files)


@pytest.mark.parametrize(
    ("allowed", "files", "cores"),
    [
        (range(8), {}, 4),
        ({0, 4}, {}, 1),
        ({0, 1, 4, 6}, {}, 3),
        (range(8), {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}, 2),
        (range(8), {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n"}, 1),
        (range(8), {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 4),
        (range(8), {"proc/self/cgroup": "0::/host\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            range(8),
            {
                "proc/self/cgroup": "3:cpuset:/\n2:cpu,cpuacct:/d\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            range(8),
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
    ],
)
def test_cores_are_those_of_the_mask_and_of_the_quota(tmp_path, monkeypatch, allowed, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(allowed), raising=False)
    assert usable_cores(machine(tmp_path, files)) == cores


def test_a_machine_that_says_nothing_has_a_core_for_each_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert usable_cores(tmp_path) == 3


@pytest.mark.parametrize(("had", "cores", "then"), [(4, 2, 2), (1, 8, 1), (3, 3, 3)])
def test_threads_go_down_to_the_cores_and_never_up(monkeypatch, had, cores, then):
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    try:
        torch.set_num_threads(had)
        limit_threads()
        assert torch.get_num_threads() == then
    finally:
        torch.set_num_threads(before)
