"""Memory is what the machine has free, and no more than a container is left."""

import types

import psutil
import pytest
import torch

from ptq.calibration.kept_outputs import room_on
from ptq.models.memory import memory_limits
from ptq.models.memory.memory_limits import free_memory, memory_limit
from tests.tools.written_files import write_files

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """A machine of 1000 bytes, 600 of them available."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(total=1000, available=600))


@pytest.mark.parametrize(
    ("files", "limit", "free"),
    [
        ({}, 1000, 600),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}, 1000, 600),
        (
            {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "400\n", "sys/fs/cgroup/a/memory.current": "150\n"},
            400,
            250,
        ),
        (
            {
                "proc/self/cgroup": "0::/of/the/host\n",
                "sys/fs/cgroup/memory.max": "400\n",
                "sys/fs/cgroup/memory.current": "390\n",
                "sys/fs/cgroup/memory.stat": "anon 90\ninactive_file 300\nfile 310\n",
            },
            400,
            310,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/d\n3:cpu:/\n",
                "sys/fs/cgroup/memory/d/memory.limit_in_bytes": "300\n",
                "sys/fs/cgroup/memory/d/memory.usage_in_bytes": "310\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            300,
            0,
        ),
    ],
)  # fmt: skip
def test_the_least_of_the_machine_and_of_its_control_groups_counts(tmp_path, machine, files, limit, free):
    root = write_files(tmp_path, files)
    assert (memory_limit(root), free_memory(CPU, root)) == (limit, free)


def test_what_is_kept_of_linears_fits_into_half_of_what_a_container_is_left(tmp_path, machine, monkeypatch):
    files = {"sys/fs/cgroup/memory.max": "400", "sys/fs/cgroup/memory.current": "100", "proc/self/cgroup": "0::/\n"}
    root = write_files(tmp_path, files)
    monkeypatch.setattr(memory_limits, "_groups", lambda _, plain=memory_limits._groups: plain(root))
    assert room_on(CPU) == 150 and room_on(torch.device("cuda")) == 0
