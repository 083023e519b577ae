"""Which kernel is fast here: timings kept in the store by machine, versions and threads."""

import json
import os
import pathlib
import platform
from collections.abc import Mapping

import torch

from ptq.errors import UserError
from ptq.files.atomic import write_text
from ptq.files.source_digest import package_digest
from ptq.files.store import Store
from ptq.files.versions import version_of
from quantize.kernels.fastest import EVICTED

KIND = "kernel-timings"
DEFAULT_FOLDER = "~/.cache/ptq"
"""Where timings are kept outside of runs, whose recipes name a store."""
Timings = dict[str, dict[str, float]]


def timings_key(device: torch.device) -> dict[str, object]:
    """Returns what the speed of kernels depends on."""
    key: dict[str, object] = {
        "timed": f"{EVICTED >> 20} MiB read between",
        "kernels": package_digest("quantize.kernels"),
        "torch": torch.__version__,
        "onnxruntime": version_of("onnxruntime"),
        "device": device.type,
    }
    if device.type == "cuda":
        return {**key, "gpu": torch.cuda.get_device_name(device), "gemlite": version_of("gemlite")}
    # Whether OpenMP's threads spin or sleep while they wait decides who can have the cores meanwhile.
    waiting = {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    return {**key, **waiting, "processor": processor(), "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip


def read_timings(store: Store, device: torch.device) -> Timings:
    """Returns the timings that are kept for this machine, its versions and threads; none where there are none."""
    found = store.find(KIND, timings_key(device))
    if found is None:
        return {}
    try:
        return dict(json.loads(found.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        store.made_again(KIND, str(error))
        return {}


def keep_timings(store: Store, device: torch.device, timings: Mapping[str, Mapping[str, float]]) -> None:
    """Keeps timings, beside what others have found meanwhile.

    Raises:
        UserError: when they cannot be written.
    """
    known = read_timings(store, device)
    if timings.keys() - known.keys():
        text = json.dumps({**timings, **known})
        store.add(KIND, timings_key(device), lambda path: write_text(path, text), "which kernel is fast here")


class KeptTimings:
    """Timings of packed models outside of runs: read once, written whenever there are new ones, where the folder can be written.

    Args:
        device: where products are multiplied.
        folder: of the store; None for `DEFAULT_FOLDER`.
    """

    def __init__(self, device: torch.device, folder: pathlib.Path | None = None):
        self.device = device
        self.folder = pathlib.Path(DEFAULT_FOLDER).expanduser() if folder is None else folder

    def recall(self) -> Timings:
        """Returns what is kept."""
        return read_timings(Store(self.folder), self.device)

    def keep(self, timings: Timings) -> None:
        """Keeps timings; where they cannot be written they are taken again by the next process."""
        try:
            keep_timings(Store(self.folder), self.device, timings)
        except (UserError, OSError):
            return


def processor() -> str:
    """Returns what the processor calls itself."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
