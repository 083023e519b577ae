"""How and where a result was made: command line, date and threads; versions, processor, seeds, the state of the source tree."""

import os
import pathlib
import platform
import shlex
import subprocess
import sys
from datetime import datetime

import torch

import ptq
from ptq.config.schema import Recipe
from ptq.files.versions import version_of
from ptq.report.results import Environment, Git, Made

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "safetensors",
    "numpy",
    "scikit-learn",
    "gguf",
)


def made() -> Made:
    """Returns how a result was made; it is to be asked when the run has ended."""
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    return Made(date, shlex.join(sys.orig_argv), torch.get_num_threads())


def environment(recipe: Recipe, device: torch.device, ranks: int = 1) -> Environment:
    """Returns what may explain a difference between two runs."""
    return Environment(
        ptq=ptq.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages={name: version_of(name) for name in PACKAGES},
        device=str(device),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cpu_flags=_cpu_flags(),
        cores=os.cpu_count(),
        ranks=ranks,
        seeds={"calibration": recipe.calibration.seed, "evaluation": recipe.evaluation.seed},
        git=_git(pathlib.Path(ptq.__file__).resolve().parent.parent),
    )


def _cpu_flags() -> list[str]:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return next((sorted(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), [])


def _git(folder: pathlib.Path) -> Git | None:
    if not (folder / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return Git(commit.stdout.strip(), len(status.stdout.splitlines()))
