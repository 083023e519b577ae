"""The most memory that a run has held, and the phase in which that was."""

import pathlib
import resource
import sys

import torch

from ptq.report.results import Memory

BEFORE, BETWEEN = "before", "between"


class PeakMemory:
    """Watches the process's greatest resident memory, which the system keeps: a phase in which it grew has the peak.

    Nothing is sampled and nothing is reset: what other parts of a process see of its memory stays as it is.
    """

    def __init__(self) -> None:
        self._host, self._host_phase = resident_peak(), BEFORE
        self._device, self._device_phase = _device_peak(), BEFORE

    def note(self, phase: str) -> None:
        """Says that all since the last call belongs to `phase`."""
        if (now := resident_peak()) > self._host:
            self._host, self._host_phase = now, phase
        if (there := _device_peak()) > self._device:
            self._device, self._device_phase = there, phase

    def memory(self) -> Memory:
        """Returns the peaks so far; what has grown since the last `note` lies between phases."""
        self.note(BETWEEN)
        device = (self._device, self._device_phase) if self._device else (None, None)
        return Memory(self._host, self._host_phase, *device)


def resident_peak() -> int:
    """Returns the greatest resident memory of this process so far, bytes."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    # `ru_maxrss` begins with what the parent held when it started this process.
    found = next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)
    return found or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _device_peak() -> int:
    """Returns the most that torch has allocated on one CUDA device so far, bytes; 0 without one."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return max((int(torch.cuda.max_memory_allocated(i)) for i in devices), default=0)
