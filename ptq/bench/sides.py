"""The sides of a recipe: its baseline in two types, its quantized model simulated and by kernels, and the runtimes beside them."""

import copy
import importlib
import importlib.util
import os
import pathlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError

import ptq.bench.against
from ptq.bench.side import DYNAMIC, Side, side_of
from ptq.config.schema import Recipe, SchemeConfig
from ptq.errors import UserError, nearest
from ptq.integrations.compiled import STATIC, CompiledPrompts, check_compiler, compiled_call_
from ptq.integrations.kernels import use_kernels_
from ptq.integrations.outside import choose_outside, quantize_outside_
from ptq.integrations.replace import pack_, remember, tied_of
from ptq.models.loading import load
from ptq.network.network import build_network
from ptq.network.outside import RoundedOutside, set_weight
from ptq.run.exports import QUANTIZED
from ptq.run.in_memory import quantize
from ptq.run.kept.block_file import rebuild
from ptq.run.kept.outside_file import FILE as OUTSIDE
from ptq.run.kept.outside_file import read_outside
from ptq.run.session import device_of
from quantize.kernels.choice import Choice
from quantize.modules.simulated import QuantLinear

CALIBRATION = (4, 128)
"""Samples and tokens for what needs ranges: the speed of a product does not depend on its values."""
FLOAT32, BFLOAT16, SIMULATED, KERNELS = "fp32", "bf16", "simulated", "kernels"
COMPILED = "kernels, compiled"
"""The same model; a static cache, and all passes by `torch.compile`."""
HALF_KERNELS = "kernels bf16"
"""On CUDA alone, whose kernels are made for models in 16 bits."""


def competitors() -> list[str]:
    """Returns the names of other runtimes: the modules of `ptq.bench.against`."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(ptq.bench.against.__path__))


def check_competitors(names: list[str]) -> None:
    """Raises `UserError` for a runtime that is not known, or not installed: it says how it is."""
    for name in names:
        key = name.replace(".", "-").replace("_", "-")
        if key not in competitors():
            raise UserError(f"--against: {name!r} is no runtime{nearest(name, competitors())}")
        module = _module(name)
        for need in module.NEEDS:
            if not _there(need):
                raise UserError(f"--against: {name} is not installed: {module.INSTALL}")


def sides_of(
    recipe: Recipe,
    against: list[str],
    threads: int,
    cache: str = DYNAMIC,
    run: pathlib.Path | None = None,
    compiled: bool = False,
) -> Iterator[tuple[Side, Any]]:
    """Yields each side and its transformers model, None for another runtime's.

    Args:
        recipe: of the model and its formats.
        against: names of other runtimes.
        threads: of torch.
        cache: what transformers generates with, ``dynamic`` or ``static``.
        run: a finished run of the recipe whose codes are taken; None rounds to nearest.
        compiled: whether the kernels' model is a side once more, its passes compiled.

    Raises:
        UserError: for what a run would refuse, for a compiler that is not there, and for a runtime that computes on CPUs beside a model on another device.
    """
    torch.set_num_threads(threads)
    device = device_of(recipe)
    if against and device.type != "cpu":
        raise UserError(
            f"--against: other runtimes are measured on CPUs, and this is {device}: add execution.device=cpu"
        )
    if compiled:
        check_compiler(device)
    loaded = load(recipe.model, recipe.execution)
    model = loaded.model.float().eval().requires_grad_(False).to(device)
    model.config.use_cache = True
    yield side_of(FLOAT32, model, cache=cache), model
    yield side_of(BFLOAT16, half := copy.deepcopy(model).bfloat16(), cache=cache), half
    simulated = _simulated(copy.deepcopy(model), recipe, run)
    yield side_of(SIMULATED, simulated, "" if run is None else "the run's own codes", cache), simulated
    made = copy.deepcopy(simulated)
    note = by_kernels(made, recipe.scheme)
    yield side_of(KERNELS, made, note, cache), made
    if compiled:
        yield _compiled(made), made
    if device.type == "cuda":
        made = _simulated(copy.deepcopy(half), recipe, run)
        note = by_kernels(made, recipe.scheme)
        yield side_of(HALF_KERNELS, made, note, cache), made
    for name in against:
        yield _module(name).side(model, loaded.tokenizer), None


def _compiled(model: Any) -> Side:
    """Returns the side of a model with kernels whose passes are compiled; the model by itself stays as it is."""
    note = (
        "static cache; passes by torch.compile: loops for one token of one sequence, kernels between loops for others"
    )
    prompts, side = CompiledPrompts(model), side_of(COMPILED, model, note, STATIC, compiled_call_(model))

    def prefill(ids: torch.Tensor) -> object:
        with prompts.answering():
            return side.prefill(ids)

    def decode(ids: torch.Tensor, tokens: int) -> object:
        with prompts.answering():
            return side.decode(ids, tokens)

    return replace(side, prefill=prefill, decode=decode)


def _simulated(model: Any, recipe: Recipe, run: pathlib.Path | None) -> Any:
    """Returns `model`, quantized in place: to nearest, or with the codes of a finished run."""
    if run is not None:
        return saved_model(model, recipe.scheme, run)
    ids = torch.arange(CALIBRATION[0] * CALIBRATION[1]).view(CALIBRATION) % (model.config.vocab_size - 1)
    return quantize(model, recipe.scheme, {"rtn": {}}, ids).model


def saved_model(model: Any, scheme: SchemeConfig, run: pathlib.Path) -> Any:
    """Returns `model` with the blocks that a finished run has saved in its folder, in place, and what steps that turn the residual
    stream have left outside them; embedding and head are rounded anew.

    Raises:
        UserError: for a file that is missing, damaged, or of modules that are not known.
    """
    network, device = build_network(model), next(model.parameters()).device
    for block in network.blocks:
        path = run / QUANTIZED / f"block-{block.index:05d}.safetensors"
        with _usable(path):
            rebuild(block, path, network, device)
    with _usable(run / QUANTIZED / OUTSIDE):
        for name, stored in read_outside(network, run / QUANTIZED).items():
            owner, _, last = name.rpartition(".")
            set_weight(model.get_submodule(owner), last, stored.read(stored.dtype, stored.dtype, device))
    RoundedOutside(scheme, network)()
    return model


@contextmanager
def _usable(path: pathlib.Path) -> Iterator[None]:
    """Inside the context a file that is missing or damaged ends in a line that names it."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--run: {path} cannot be used ({str(error).splitlines()[0]}): run it again") from None


def by_kernels(model: Any, scheme: SchemeConfig) -> str:
    """Packs the simulated Linears of `model`, its embedding and its head where that can be, and lets kernels multiply in all;
    returns who does.
    """
    pack_(model, scheme)
    outside = choose_outside(model, scheme, tied_of(model))
    quantize_outside_(model, outside)
    if outside and getattr(model.config, "quantization_config", None) is not None:
        remember(model, scheme, model.config.quantization_config["skip_modules"])
    use = use_kernels_(model)
    choice = Choice()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.use_kernels(choice)
    counts = {**use.linears, **{f"{name} (not packed)": count for name, count in choice.ran.items()}}
    why = [*use.reasons, *choice.refused]
    return ", ".join(f"{count} Linears: {name}" for name, count in counts.items()) + "".join(f"; {w}" for w in why)


def _module(name: str) -> Any:
    return importlib.import_module(f"ptq.bench.against.{name.replace('.', '_').replace('-', '_')}")


def _there(need: str) -> bool:
    """Returns whether a module can be imported, or the folder or program is there that an environment variable, ``$NAME``, names."""
    if need.startswith("$"):
        return pathlib.Path(os.environ.get(need[1:]) or " ").expanduser().exists()
    try:
        return importlib.util.find_spec(need) is not None
    except ModuleNotFoundError:
        return False


def folder_of(name: str, output: pathlib.Path | None) -> pathlib.Path:
    """Returns where a benchmark's files go."""
    return output or pathlib.Path("outputs") / "bench" / name
