"""Passes that are compiled: that of one token, by transformers' `generate` with a static cache, and those of prompts and batches."""

import os
import pathlib
import shutil
import sysconfig
import types
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from transformers import CompileConfig

from ptq.errors import UserError
from ptq.integrations.transformers import PtqQuantizer

STATIC = "static"
"""The cache that a compiled pass wants: its tensors have one shape for all tokens."""
_CODES = count()
COMPILERS = ("g++", "clang++", "c++")
"""Looked for in PATH where the environment variable CXX names none."""


def compile_decode_(model: Any) -> None:
    """Has ``model.generate`` compile the pass of one token of one sequence by `torch.compile`; prompts pass as before.

    In packed Linears that have kernels (`ptq.integrations.kernels.use_kernels_`) integer weights of 2, 4 and 8 bits are decoded where they
    are read; weights of other formats are written out at each call, and kernels do it faster. Compiling takes a minute or more at the
    first token, is kept by torch on disk, and comes again for a static cache of another length. That modules are what they were is not
    looked at again at each token, which would take a fifth of its time: call this once more where some were replaced.

    Args:
        model: of transformers. Its generation config is changed: a static cache, and what to compile with.

    Raises:
        UserError: for a model that cannot generate, and where no compiler is there.
    """
    _check_generates(model)
    model.generation_config.compile_config = compiled_call_(model)
    model.generation_config.cache_implementation = STATIC


def compiled_call_(model: Any) -> CompileConfig:
    """Gives a model of transformers what ``generate(compile_config=..., cache_implementation="static")`` calls for one token, and returns
    the ``compile_config`` that chooses it; other calls stay as they are.

    Raises:
        UserError: where no compiler is there.
    """
    check_compiler(next(model.parameters()).device)
    config = CompileConfig(mode="default")
    # On GPUs transformers compiles by itself; on CPUs it has to be told to.
    config._compile_all_devices = True  # type: ignore[assignment]
    model._compiled_call, model._last_compile_config = CompiledCall(model), config
    if isinstance(quantizer := getattr(model, "hf_quantizer", None), PtqQuantizer):
        quantizer.compiles = True
    return config


def compile_prompts_(model: Any) -> None:
    """Has calls of a model with ``input_ids`` of more than one token compiled by `torch.compile`, whatever their lengths, from now on; a call
    with one token passes as before.

    Kernels multiply as before (`ptq.integrations.kernels.use_kernels_`), and what is around the products is compiled: rounding inputs to a scale a token,
    norms, rotary embeddings, activation functions. Packed Linears that have no kernel, and those with integer inputs on other grids, are compiled as
    they are defined, which writes a dequantized weight at each call. The first call takes a minute or more, one sequence and several apart;
    two short passes show first which Linears read the same. That modules are what they were is not looked at again at
    each call: call this once more where some were replaced, moved or filled anew.

    Args:
        model: of transformers. Copies of it are not compiled.

    Raises:
        UserError: for a model that cannot generate, and where no compiler is there.
    """
    _check_generates(model)
    model._compiled_call_impl = None
    model._compiled_call_impl = CompiledPrompts(model)


class CompiledPrompts:
    """What a model's ``__call__`` gives its arguments to: compiled where there are several tokens.

    Args:
        model: of transformers, a causal language model.

    Raises:
        UserError: where no compiler is there.
    """

    @torch.no_grad()
    def __init__(self, model: Any):
        device = next(model.parameters()).device
        check_compiler(device)
        for _ in range(2):
            model(torch.ones(1, 4, dtype=torch.int64, device=device), use_cache=False)
        self._plain = model._call_impl
        self._compiled = _own_code(_call_impl, dynamic=True)
        self._model = model

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Returns what the model does."""
        ids = args[0] if args else options.get("input_ids")
        if ids is None or ids.numel() == 1 or torch.compiler.is_compiling():
            return self._plain(*args, **options)
        # A slice of other ids has strides of its own, which would be compiled anew.
        whole = ids.clone(memory_format=torch.contiguous_format)
        if args:
            return self._compiled(self._model, whole, *args[1:], **options)
        return self._compiled(self._model, **{**options, "input_ids": whole})

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Inside the context the model's calls come here."""
        self._model._compiled_call_impl = self
        try:
            yield
        finally:
            self._model._compiled_call_impl = None


class CompiledCall:
    """Calls a model compiled; a copy of the model has a call of its own."""

    def __init__(self, model: Any):
        self._model = model
        self._compiled = _own_code(_call)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Returns what the model does."""
        return self._compiled(self._model, *args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledCall":
        """Returns the call of the copy that is being made."""
        return CompiledCall(memo.get(id(self._model), self._model))


def _call(model: Any, *args: Any, **options: Any) -> Any:
    return model(*args, **options)


def _call_impl(model: Any, *args: Any, **options: Any) -> Any:
    return model._call_impl(*args, **options)


def _own_code(function: Any, dynamic: bool | None = None) -> Any:
    """Returns `function` compiled: what is compiled is kept by code object, and modules are not compared, so that each has one of its own."""
    code = function.__code__.replace(co_name=f"call_{next(_CODES)}")
    own = types.FunctionType(code, function.__globals__, code.co_name)
    skip = getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None)
    return torch.compile(own, dynamic=dynamic, options=None if skip is None else {"guard_filter_fn": skip})


def _check_generates(model: Any) -> None:
    if getattr(model, "generation_config", None) is None:
        raise UserError(
            f"compile: {type(model).__name__} has no generate: expected a causal language model of transformers"
        )


def check_compiler(device: torch.device) -> None:
    """Raises `UserError` for a CPU where there is no C++ compiler, or no header of Python: torch writes C++ that Python calls."""
    if device.type == "cpu" and (lack := missing()) is not None:
        raise UserError(f"compile: {lack}")


def missing() -> str | None:
    """Returns in a line what compiling for a CPU lacks on this machine and what to do; None where nothing is."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else list(COMPILERS)
    if not any(shutil.which(name) for name in wanted):
        return f"no C++ compiler is there, looked for {', '.join(wanted)}: install g++"
    header = pathlib.Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.is_file() else f"{header} is not there: install Python's headers (python3-dev)"
