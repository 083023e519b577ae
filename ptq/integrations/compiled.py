"""The pass of one token, compiled: transformers' `generate` does it where it is told to, with a static cache."""

import os
import pathlib
import shutil
import sysconfig
from typing import Any

import torch
from transformers import CompileConfig

from ptq.errors import UserError
from ptq.integrations.transformers import PtqQuantizer

STATIC = "static"
"""The cache that a compiled pass wants: its tensors have one shape for all tokens."""
COMPILERS = ("g++", "clang++", "c++")
"""Looked for in PATH where the environment variable CXX names none."""


def compile_decode_(model: Any) -> None:
    """Has ``model.generate`` compile the pass of one token of one sequence by `torch.compile`; prompts pass as before.

    In packed Linears that have kernels (`ptq.integrations.kernels.use_kernels_`) integer weights of 2, 4 and 8 bits are decoded where they
    are read; weights of other formats are written out at each call, and kernels do it faster. Compiling takes a minute or more at the
    first token, is kept by torch on disk, and comes again for a static cache of another length.

    Args:
        model: of transformers. Its generation config is changed: a static cache, and what to compile with.

    Raises:
        UserError: for a model that cannot generate, and where no compiler is there.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        raise UserError(
            f"compile: {type(model).__name__} has no generate: expected a causal language model of transformers"
        )
    config.compile_config = decode_compiler(next(model.parameters()).device)
    config.cache_implementation = STATIC
    if isinstance(quantizer := getattr(model, "hf_quantizer", None), PtqQuantizer):
        quantizer.compiles = True


def decode_compiler(device: torch.device) -> CompileConfig:
    """Returns what ``generate(compile_config=..., cache_implementation="static")`` is told on a device.

    Raises:
        UserError: for a CPU where there is no C++ compiler, or no header of Python: torch writes C++ that Python calls.
    """
    if device.type == "cpu" and (lack := missing()) is not None:
        raise UserError(f"compile: {lack}")
    config = CompileConfig(mode="default")
    # On GPUs transformers compiles by itself; on CPUs it has to be told to.
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


def missing() -> str | None:
    """Returns in a line what compiling for a CPU lacks on this machine and what to do; None where nothing is."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else list(COMPILERS)
    if not any(shutil.which(name) for name in wanted):
        return f"no C++ compiler is there, looked for {', '.join(wanted)}: install g++"
    header = pathlib.Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.is_file() else f"{header} is not there: install Python's headers (python3-dev)"
