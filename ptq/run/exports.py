"""Exports of runs: adapted and checked before the work, written after it, or later from a finished run's folder."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
import yaml
from torch import nn

from ptq.calibration.statistics import Statistics
from ptq.config.building import recipe_from
from ptq.config.schema import ExportConfig, Recipe, SchemeConfig
from ptq.config.scheme import linear_specs
from ptq.errors import UserError
from ptq.export.base import CorrectedExporter, Exported, Exporter, refuse_existing
from ptq.export.quantized_tensors import (
    LinearTensors,
    QuantizedTensors,
    ResidentSource,
    foreign,
    tensors_of,
    unheld_correction,
)
from ptq.export.registry import build_exporter, shipped
from ptq.files.atomic import ensure_folder
from ptq.files.bounded import load_yaml, parse_json
from ptq.files.safetensors_file import StoredTensor, read_header
from ptq.models.loading import check as check_model
from ptq.network.attention import CHILD
from ptq.network.network import Block, Network, is_conv1d
from ptq.run.kept.block_file import foreign_in
from ptq.run.kept.outside_file import FILE as OUTSIDE
from ptq.run.kept.outside_file import read_outside, stored_type, turns_stream
from ptq.run.record.journal import Journal
from ptq.run.session import Session, open_session
from ptq.steps._registry import TARGET, build_steps
from ptq.steps._step import CORRECTION, RESIDUAL, WEIGHT_INPUT, WEIGHT_OUTPUT, Context, Step
from quantize.codecs.registry import codec_of
from quantize.solvers.lowrank import Factors

T = TypeVar("T")
QUANTIZED = "quantized"
"""The folder in a run's that holds its finished blocks."""


def adapted(recipe: Recipe) -> Recipe:
    """Returns `recipe` with what its export fixes filled into the scheme, so that what is evaluated is what is exported."""
    if recipe.export is None:
        return recipe
    return dataclasses.replace(recipe, scheme=build_exporter(recipe.export).adapt(recipe.scheme))


def check_export(recipe: Recipe, network: Network, steps: Mapping[str, Step]) -> tuple[str, ...]:
    """Raises `UserError` when the recipe's export cannot express its scheme or its model, or what is left of it. Needs no weights.

    Returns:
        Sentences on what a runtime will compute otherwise.
    """
    if recipe.export is None:
        return ()
    turned = turns_stream(steps)
    norms = (name for name in network.outside if isinstance(network.model.get_submodule(name), nn.LayerNorm))
    if turned is not None and (norm := next(norms, None)) is not None:
        _refuse_turned(recipe.export, turned, f"makes an RMSNorm of {norm}, which this model's architecture has not")
    exporter = build_exporter(recipe.export)
    notes = exporter.check(recipe.scheme, network)
    if corrects(steps) is not None and isinstance(exporter, CorrectedExporter):
        notes += exporter.check_corrections(recipe.scheme, network)
    return notes


def corrects(steps: Mapping[str, Step]) -> str | None:
    """Returns the first step that adds products of low rank to weights, or None."""
    return next((name for name, step in steps.items() if CORRECTION in step.acts), None)


def check_turned(recipe: Recipe, steps: Mapping[str, Step], context: Context) -> None:
    """Raises `UserError` where steps, which have planned, leave a model that its architecture has no modules for, and an export is to."""
    turned = turns_stream(steps)
    if recipe.export is None or turned is None:
        return
    if any(plan.basis is not None and plan.basis.centred for plan in context.plans.values()):
        _refuse_turned(recipe.export, turned, "makes RMSNorms of norms that take the mean out")
    online = [name for plan in context.plans.values() if plan.basis is not None for name in plan.basis.first]
    online += [name for block in context.network.blocks for name in sorted(context.norm_sums(block))]
    if online:
        _refuse_turned(recipe.export, turned, f"turns online what {online[0]} adds to the residual stream")


def _refuse_turned(export: ExportConfig, step: str, why: str) -> None:
    raise UserError(
        f"export.format: {export.format} holds the modules of the model's own architecture, and steps.{step} {why}: "
        f"use export=null, or ~steps.{step}"
    )


def check_places(recipe: Recipe, steps: Mapping[str, Step]) -> None:
    """Raises `UserError` when a step acts where the recipe's export has no place for it."""
    if recipe.export is None:
        return
    correcting = corrects(steps)
    if correcting is not None and not isinstance(build_exporter(recipe.export), CorrectedExporter):
        raise UserError(
            f"export.format: {recipe.export.format} has no place for the products of low rank that steps.{correcting} adds to weights: "
            f"use {_correctable()}, export=null, or another step than {correcting}"
        )
    for name, step in steps.items():
        online = sorted(step.acts - {WEIGHT_INPUT, WEIGHT_OUTPUT, RESIDUAL, CORRECTION})
        if online:
            raise UserError(
                f"export.format: {recipe.export.format} has no place for what steps.{name} does at the {' and the '.join(online)}: "
                f"use export=null, or ~steps.{name}"
            )


def _correctable() -> str:
    """Returns the exports that hold corrections of low rank, and as what."""
    exporters = {name: build_exporter(ExportConfig(name)) for name in shipped()}
    words = [f"export={n} ({e.corrected_as})" for n, e in exporters.items() if isinstance(e, CorrectedExporter)]
    return ", ".join(words)


def _refuse_unheld(exporter: Exporter, source: QuantizedTensors) -> None:
    """Raises `UserError` where a step that has not said so has added products of low rank to weights, and the format has no place for them."""
    if isinstance(exporter, CorrectedExporter):
        return
    lost = next((name for name in source.network.linears if source.correction(name) is not None), None)
    if lost is not None:
        raise unheld_correction(lost)


def needs_saved_weights(recipe: Recipe) -> bool:
    """Whether the quantized weights have to be written block by block: asked for, or offloaded and to be exported."""
    return recipe.execution.save or (recipe.export is not None and recipe.execution.weights == "offloaded")


def export_session(
    session: Session,
    folder: pathlib.Path,
    steps: Mapping[str, Step],
    finish: Callable[[pathlib.Path], Exported] | None = None,
) -> Exported | None:
    """Writes the export that the session's recipe asks for into the run's `folder`; None when it asks for none.

    Args:
        session: the run's.
        folder: of its results.
        steps: the run's.
        finish: where what was kept of finished blocks is the export's: makes it of that, at a path.
    """
    recipe, loaded = session.recipe, session.loaded
    if recipe.export is None:
        return None
    exporter = build_exporter(recipe.export)
    path = _default_path(folder, recipe.export, exporter)
    narrow = stored_type(loaded, steps)
    if narrow is not None and narrow != torch.float32:
        words = f"export: embedding and head, which steps.{turns_stream(steps)} has turned, are stored in {loaded.baseline_dtype}"
        session.journal.say(f"{words}; the run had them in {loaded.arithmetic_dtype}")
    if finish is not None:
        with session.journal.phase("export"):
            return _said(finish(path), session.journal)
    source: QuantizedTensors = ResidentSource(
        session.network, loaded.tokenizer, recipe.scheme, origin_of(session), narrow
    )
    if not loaded.weights.resident:
        source = SavedSource(session, folder / QUANTIZED)
    _refuse_unheld(exporter, source)
    with session.journal.phase("export"):
        return _said(exporter.write(source, path), session.journal)


def export_run(
    folder: pathlib.Path, config: ExportConfig, output: pathlib.Path | None, force: bool, trust: bool = False
) -> Exported:
    """Exports a finished run whose codes were saved, without quantizing again.

    Args:
        folder: the run's folder.
        config: format and options.
        output: where to, None for the run's folder.
        force: replace what is there.
        trust: the run's model may run code of its own, if its recipe says so.

    Raises:
        UserError: for a folder that holds no finished run with saved codes, another model than the run's, a scheme that
            the format cannot express, or an output that exists.
    """
    recipe, fingerprint = saved_run(folder)
    steps = _steps_of(recipe, trust)
    check_places(dataclasses.replace(recipe, export=config), steps)
    turned = turns_stream(steps)
    if turned is not None and not (folder / QUANTIZED / OUTSIDE).is_file():
        raise UserError(f"--run: {folder} kept nothing of what steps.{turned} did outside the blocks: run it again")
    if recipe.model.trust_remote_code and not trust:
        raise UserError(
            f"--run: model.trust_remote_code is true in {folder}, so that the model's own code would run: "
            "read that code, then add --trust"
        )
    exporter = build_exporter(config)
    path = output or _default_path(folder, config, exporter)
    refuse_existing(path, force)
    ensure_folder(path.parent, "--output")
    journal = Journal(folder / "export.log")
    with open_session(recipe, journal) as session:
        if session.loaded.fingerprint != fingerprint:
            raise UserError(f"--run: {recipe.model.path} holds other weights than when {folder} was run: run it again")
        try:
            notes = check_export(dataclasses.replace(recipe, export=config), session.network, steps)
        except UserError as error:
            again = (
                ": a finished run keeps its scheme, so run it again with that"
                if str(error).startswith("scheme")
                else ""
            )
            raise UserError(f"{error}{again}") from None
        for note in notes:
            journal.say(f"export: {note}")
        source = SavedSource(session, folder / QUANTIZED)
        _refuse_unheld(exporter, source)
        return _said(exporter.write(source, path), journal)


def check_imatrix(recipe: Recipe) -> Any:
    """Returns the config of the recipe's model. Raises `UserError` for an architecture that llama.cpp's files are not written for."""
    from ptq.export.packing.gguf_architectures import ARCHITECTURES

    config, known = check_model(recipe.model), [name for name, a in ARCHITECTURES.items() if not a.mixture]
    if config.model_type not in known:
        raise UserError(
            f"--imatrix: written for {', '.join(known)}, and the model's model_type is {config.model_type!r}: leave it out"
        )
    return config


def export_imatrix(recipe: Recipe, config: Any, statistics: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """Writes llama.cpp's importance matrix of a statistics file to `path`; returns `path`.

    Args:
        recipe: whose model they are of.
        config: what `check_imatrix` gave.
        statistics: the file.
        path: where to.
    """
    from ptq.export.packing.gguf_architectures import ARCHITECTURES
    from ptq.export.packing.imatrix import write_imatrix

    found = Statistics.load(statistics)
    count = write_imatrix(found, ARCHITECTURES[config.model_type].number, config.num_hidden_layers, path)
    print(f"imatrix: {path} ({count} Linears of {recipe.model.path})")
    return path


def origin_of(session: Session) -> pathlib.Path | None:
    """Returns the GGUF file whose tokenizer an export copies: the model's, unless the recipe names another tokenizer."""
    location = session.loaded.location
    if location.gguf is None or session.recipe.model.tokenizer is not None:
        return None
    return pathlib.Path(location.base) / location.gguf


def _default_path(folder: pathlib.Path, config: ExportConfig, exporter: Exporter) -> pathlib.Path:
    return folder / "export" / config.format / exporter.filename


def _said(exported: Exported, journal: Journal) -> Exported:
    journal.say(f"export: {exported.path} ({exported.bytes / 1e6:.1f} MB)")
    for note in exported.notes:
        journal.say(f"export: {note}")
    return exported


def saved_run(folder: pathlib.Path) -> tuple[Recipe, str]:
    """Returns the recipe and the weights' fingerprint of a finished run whose codes were saved.

    Raises:
        UserError: for a folder that holds none.
    """
    if not (folder / "recipe.yaml").is_file() or not (folder / "metrics.json").is_file():
        raise UserError(f"--run: {folder} holds no finished run: give a folder with recipe.yaml and metrics.json")
    try:
        recipe = recipe_from(load_yaml(folder / "recipe.yaml"))
        fingerprint = parse_json((folder / "metrics.json").read_text(encoding="utf-8"))["weight_fingerprint"]
    except (ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(
            f"--run: the files in {folder} are damaged ({str(error).splitlines()[0]}): run it again"
        ) from None
    if not any((folder / QUANTIZED).glob("block-*.safetensors")):
        raise UserError(f"--run: {folder} kept no quantized weights: run it again with execution.save=true")
    return recipe, str(fingerprint)


class SavedSource:
    """A quantized model whose blocks lie in a run's folder and whose other parameters are the session's."""

    def __init__(self, session: Session, folder: pathlib.Path):
        self.network: Network = session.network
        self.tokenizer: Any = session.loaded.tokenizer
        self.scheme: SchemeConfig = session.recipe.scheme
        self.origin = origin_of(session)
        self._weights = session.loaded.weights
        self._saved: dict[str, StoredTensor] = {}
        for block in self.network.blocks:
            path = folder / f"block-{block.index:05d}.safetensors"
            saved = _readable(path, partial(read_header, path))
            if (found := _readable(path, partial(foreign_in, path, self.network.model))) is not None:
                raise foreign(*found)
            _refuse_unknown_tensors(block, saved)
            self._saved |= saved
        outside = _readable(folder / OUTSIDE, partial(read_outside, self.network, folder))
        # A module in another's place has parameters of other names.
        if unknown := sorted(outside.keys() - dict(self.network.model.named_parameters(remove_duplicate=False)).keys()):
            raise foreign("a module", unknown[0].rpartition(".")[0])
        self._saved |= outside

    def linear(self, name: str) -> LinearTensors:
        """Returns the tensors of the Linear `name`, read from the run's folder."""
        if f"{name}.codes" not in self._saved and f"{name}.weight" not in self._saved:
            with self._weights.hold([name]):
                return tensors_of(name, self.network.model.get_submodule(name))
        specs = linear_specs(self.scheme, name)
        if (specs.weight is None) != (f"{name}.codes" not in self._saved):
            raise UserError(f"--run: {name} was saved under another scheme than recipe.yaml says: run it again")
        weight = self._maybe(f"{name}.weight")
        if weight is not None and not specs.any and is_conv1d(self.network.model.get_submodule(name)):
            weight = weight.t()  # GPT-2's Conv1D keeps (in, out), also where a square shape does not show it
        stored = None
        if specs.weight is not None and not specs.weight.affine:
            layout = codec_of(specs.weight).layout(self.network.shapes[name], specs.weight)
            stored = {part: torch.as_tensor(self._maybe(f"{name}.{part}")) for part in layout}
        return LinearTensors(
            name, specs.weight, self._maybe(f"{name}.codes"), self._maybe(f"{name}.scale"),
            self._maybe(f"{name}.zero_point"), weight, self._maybe(f"{name}.bias"),
            specs.input, self._maybe(f"{name}.inputs.scale"), self._maybe(f"{name}.inputs.zero_point"),
            stored,
        )  # fmt: skip

    def tensor(self, name: str) -> torch.Tensor:
        """Returns the parameter or buffer `name`, from the run's folder where it lies in a block."""
        saved = self._maybe(name)
        if saved is not None:
            return saved
        owner, _, last = name.rpartition(".")
        with self._weights.hold([owner]):
            value: torch.Tensor = getattr(self.network.model.get_submodule(owner), last)
            return value

    def correction(self, name: str) -> Factors | None:
        """Returns what the run's folder holds of it, or None."""
        left, right = self._maybe(f"{name}.left"), self._maybe(f"{name}.right")
        return None if left is None or right is None else Factors(left, right)

    def _maybe(self, name: str) -> torch.Tensor | None:
        stored = self._saved.get(name)
        return None if stored is None else stored.read(stored.dtype, stored.dtype, torch.device("cpu"))


def _readable(path: pathlib.Path, read: Callable[[], T]) -> T:
    """Returns what `read` gives. Raises `UserError`, naming the file, where it is missing or damaged."""
    try:
        return read()
    except (OSError, ValueError) as error:
        raise UserError(f"--run: {path} is missing or damaged ({error}): run it again") from None


def _steps_of(recipe: Recipe, trust: bool) -> dict[str, Step]:
    """Returns a finished run's steps; those from outside, whose code would run, only where they are trusted."""
    return build_steps({n: o for n, o in recipe.steps.items() if trust or TARGET not in (o or {})})


def _refuse_unknown_tensors(block: Block, saved: dict[str, StoredTensor]) -> None:
    """Raises `UserError` when a step has left tensors in the block that no format has a place for."""
    own = {f"{block.name}.{name}" for name in block.module.state_dict()}
    parts: tuple[str, ...] = (
        "codes",
        "scale",
        "zero_point",
        "weight",
        "inputs.scale",
        "inputs.zero_point",
        "labels",
        "inputs.labels",
    )
    parts += ("left", "right", "scale_step", "scale_mean", "tensor_scale", "step", "least", "least_step")
    own |= {f"{name}.{part}" for name in block.linears for part in parts}
    unknown = sorted(set(saved) - own)
    if unknown and f".{CHILD}." in unknown[0]:
        raise UserError(
            "scheme.key, scheme.value: the scales of a cache are written by the run itself: give its recipe export=compressed-tensors"
        )
    if unknown:
        raise UserError(
            f"export: a step has put {unknown[0]} into the block, which no format can hold: leave the step out"
        )
