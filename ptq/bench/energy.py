"""Energy a token, where the machine tells: NVML's counter of a GPU, or Linux's powercap (RAPL) of CPUs."""

import importlib.util
import pathlib
from collections.abc import Callable

import torch

POWERCAP = pathlib.Path("/sys/class/powercap")
LEAST_SECONDS = 1.0
"""How long a task is repeated: a GPU's counter moves every tenth of a second or so."""
Meter = Callable[[], float]
"""Gives joules since some moment."""


def meter_of(device: torch.device, powercap: pathlib.Path = POWERCAP) -> Meter | None:
    """Returns the meter of `device`, of all packages together on a CPU; None where the machine does not tell."""
    return _of_gpu(device) if device.type == "cuda" else _of_cpus(powercap)


def joules_a_token(
    work: Callable[[], object], tokens: int, meter: Meter, clock: Callable[[], float], seconds: float | None = None
) -> float:
    """Returns the joules that a token of `work` takes, which has so many; idle power is in them.

    Args:
        work: repeated for `seconds`.
        tokens: of one call.
        meter: joules.
        clock: seconds, which waits for the device.
        seconds: at least; None for `LEAST_SECONDS`.
    """
    least = LEAST_SECONDS if seconds is None else seconds
    start, before, calls = clock(), meter(), 0
    while not calls or clock() - start < least:
        work()
        calls += 1
    return (meter() - before) / (calls * tokens)


def _of_gpu(device: torch.device) -> Meter | None:
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _of_cpus(powercap: pathlib.Path) -> Meter | None:
    # A package's name has one number, those of its parts have two.
    packages = [folder for folder in sorted(powercap.glob("*-rapl:*")) if folder.name.count(":") == 1]
    try:
        ranges = {folder / "energy_uj": _number(folder / "max_energy_range_uj") for folder in packages}
        last = {file: _number(file) for file in ranges}
    except (OSError, ValueError):
        return None
    total = 0

    def joules() -> float:
        nonlocal total
        for file, most in ranges.items():
            now = _number(file)
            total += (now - last[file]) % (most + 1)  # It begins again at 0.
            last[file] = now
        return total / 1e6

    return joules if ranges else None


def _number(file: pathlib.Path) -> int:
    return int(file.read_text(encoding="ascii"))
