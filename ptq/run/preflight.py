"""What can be checked before the work: files, shapes, positions, folders. Takes no weights into memory."""

import pathlib
from collections.abc import Mapping
from typing import Any

from ptq.calibration.statistics import Statistics
from ptq.config.schema import Recipe
from ptq.config.scheme import check_attention, check_scheme
from ptq.data.overlap import check_overlap, overlap_of
from ptq.data.sampling import Tokens
from ptq.data.sources import check_disjoint, check_source
from ptq.errors import UserError
from ptq.evaluation.tasks.harness import check_names
from ptq.evaluation.tasks.task_files import read_tasks
from ptq.files.atomic import check_folder
from ptq.files.store import store_of
from ptq.models.locations import locate
from ptq.models.shared import Shared
from ptq.models.weights import check_shapes
from ptq.network.network import Network
from ptq.network.outside import check_outside
from ptq.network.skeleton import skeleton
from ptq.ranks.sample_sum import leaf_of, units
from ptq.ranks.world import World, agree
from ptq.run.exports import check_export
from ptq.run.forecast.memory_estimate import check_memory
from ptq.run.kept.identity import machine
from ptq.run.kernel_choice import check_kernels
from ptq.run.planning import captures_of_steps
from ptq.run.session import check_experts, device_of, evaluation_draw, seen_draw
from ptq.run.trackers.base import check_trackers
from ptq.steps._step import SOLVER, STATISTICS, Step


def check_before(recipe: Recipe, steps: Mapping[str, Step] | None = None, shared: Shared | None = None) -> list[str]:
    """Checks a recipe against its folders and texts, and its model's shapes: `check_apart` and `check_model`.

    Args:
        recipe: what is to be run.
        steps: its steps; None where statistics are taken only, which read no evaluation text.
        shared: keeps the tokenizer and the windows for the run that follows.

    Returns:
        Lines that say what was checked and what could not be.

    Raises:
        UserError: for the first thing that would stop the run later.
    """
    return [*check_apart(recipe, steps), *check_model(recipe, steps, shared)]


def check_apart(recipe: Recipe, steps: Mapping[str, Step] | None = None) -> list[str]:
    """Checks what needs no model: the scheme beside the steps, the folders, whether the texts are there. See `check_before`."""
    device_of(recipe)
    solvers = [name for name, step in (steps or {}).items() if step.kind == SOLVER]
    if solvers and not _quantizes(recipe):
        raise UserError(
            f"scheme: quantizes nothing, so that steps.{solvers[0]} has nothing to do: choose a scheme such as scheme=w8a8, "
            "or compare the baseline with itself by method=none"
        )
    if not recipe.steps and _quantizes(recipe):
        raise UserError("steps: empty, but the scheme asks for quantized tensors: add a solver such as steps.rtn={}")
    check_folder(pathlib.Path(recipe.outputs).expanduser(), "outputs")
    check_folder(pathlib.Path(recipe.store).expanduser(), "store")
    check_trackers(recipe.trackers)
    tasks = read_tasks(recipe.evaluation.tasks)
    if tasks and recipe.execution.weights != "resident":
        raise UserError(
            f"evaluation.tasks: answered by the model in memory, but execution.weights is {recipe.execution.weights}: use resident"
        )
    check_names(tasks)
    check_source(recipe.data.calibration, "data.calibration")
    check_source(recipe.data.evaluation, "data.evaluation")
    if not recipe.data.allow_overlap:
        check_disjoint(recipe.data)
    return ["texts: found"]


def check_model(
    recipe: Recipe,
    steps: Mapping[str, Step] | None = None,
    shared: Shared | None = None,
    network: Network | None = None,
    weights: bool = True,
) -> list[str]:
    """Checks a recipe against its model's shapes, and its texts and statistics as that model has them. See `check_before`.

    Args:
        recipe: what is to be run.
        steps: its steps.
        shared: keeps the tokenizer and the windows for the run that follows, and the model's shapes for other points of a sweep.
        network: the model on the meta device; None to build it.
        weights: whether the model's weights have to be there; without, a config.json is enough, and so are texts without a
            tokenizer.
    """
    lines: list[str] = []
    store, shared = store_of(recipe), shared or Shared()
    if locate(recipe.model).kind == "hub":
        lines.append(
            f"model: {recipe.model.path} is on the hub and is looked at when the run starts: shapes not checked"
        )
        _check_statistics_file(recipe, steps)
        return lines
    if network is None:
        network = shared.once(("shapes", recipe.model, weights), lambda: skeleton(recipe.model, store, weights))
    if not weights:
        lines.append(f"model: {recipe.model.path} has no weights here: what follows goes by its config.json")
    if weights and (place := locate(recipe.model)).kind == "directory":
        shapes = {name: tuple(parameter.shape) for name, parameter in network.model.named_parameters()}
        check_shapes(pathlib.Path(place.base), shapes, {block.name: list(block.linears) for block in network.blocks})
    check_scheme(recipe.scheme, network.shapes, network.head_dim)
    check_outside(recipe.scheme, network)
    if not getattr(network.model, "_supports_attention_backend", False):
        check_attention(recipe.scheme, 0)
    lines.append(check_kernels(recipe, network))
    check_experts(recipe, network)
    check_positions(recipe, network.max_positions)
    if weights or _has_tokenizer(recipe):
        tokenizer = shared.tokenizer(recipe.model, store)
        seen = shared.tokens(recipe.model, seen_draw(recipe), store)
        if steps is not None:
            evaluation = shared.tokens(recipe.model, evaluation_draw(recipe), store)
            check_tokens(recipe, tokenizer, seen, evaluation, network.vocabulary)
    else:
        lines.append("texts: not tokenized, since the model's tokenizer is not here")
    notes = check_export(recipe, network, steps or {})
    if recipe.export is not None:
        lines.append(f"export: {recipe.export.format} can hold the model and the scheme")
        lines += (f"export: {note}" for note in notes)
    lines.append(f"model: {len(network.blocks)} blocks, {network.parameters / 1e6:.1f} M parameters, scheme fits")
    lines.append(check_memory(recipe, network, steps or {}))
    _check_statistics_file(recipe, steps, network.shapes)
    return lines


def check_ranks(recipe: Recipe, sources: Mapping[str, str], world: World) -> None:
    """Checks that the ranks of a run are of one mind, and that there is work for each.

    Args:
        recipe: with its defaults.
        sources: digests of the source of steps from outside.
        world: the ranks.

    Raises:
        UserError: on all ranks.
    """
    if world.size == 1:
        return
    plain = {
        key: value for key, value in recipe.as_dict().items() if key not in {"outputs", "store", "name", "trackers"}
    }
    facts = {f"recipe ({key})": value for key, value in plain.items()}
    agree(world, {**facts, "methods": dict(sources), **machine(device_of(recipe))})
    if recipe.evaluation.tasks:
        raise UserError(
            f"evaluation.tasks: answered by one process, but there are {world.size} ranks: start it without torchrun"
        )
    c = recipe.calibration
    most = units(c.samples, c.batch_size, leaf_of(c.samples))
    if world.size > most:
        raise UserError(
            f"calibration.samples: {c.samples} samples in batches of {c.batch_size} make {most} shares, too few for {world.size} "
            f"ranks: start {most} or fewer, or use more samples or a lower calibration.batch_size"
        )


def check_tokens(recipe: Recipe, tokenizer: Any, calibration: Tokens, evaluation: Tokens, vocabulary: int) -> None:
    """Checks the tokens of a run.

    Raises:
        UserError: for tokens beyond the model's `vocabulary`, and where evaluation windows hold what is calibrated on, unless
            the recipe allows that.
    """
    if (greatest := int(max(t.ids.max() for t in (calibration, evaluation)))) >= vocabulary:
        named = recipe.model.tokenizer or "the one beside the model"
        raise UserError(
            f"model.tokenizer: {named} gives token {greatest}, and the model knows {vocabulary}: "
            "name the tokenizer that it was trained with"
        )
    if not recipe.data.allow_overlap:
        check_overlap(overlap_of(tokenizer, calibration, evaluation), calibration, evaluation)


def check_positions(recipe: Recipe, positions: int | None) -> None:
    """Raises `UserError` when a window is longer than the model has positions for."""
    for field, length in (
        ("calibration.length", recipe.calibration.length),
        ("evaluation.length", recipe.evaluation.length),
    ):
        if positions is not None and length > positions:
            raise UserError(
                f"{field}: {length} is longer than the model's {positions} positions: use {positions} or less"
            )


def _has_tokenizer(recipe: Recipe) -> bool:
    if recipe.model.tokenizer is not None:
        return True
    folder = pathlib.Path(locate(recipe.model).base)
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def _check_statistics_file(
    recipe: Recipe, steps: Mapping[str, Step] | None, linears: Mapping[str, tuple[int, int]] | None = None
) -> None:
    """Reads the file of statistics; `linears` are the shapes (out, in) of the model's, where they are known."""
    if recipe.calibration.statistics is None:
        return
    found = Statistics.load(pathlib.Path(recipe.calibration.statistics).expanduser())
    if linears is not None:
        found.check_linears(linears)
    if steps is not None and STATISTICS not in captures_of_steps(recipe.scheme, steps):
        raise UserError(
            f"calibration.statistics: {recipe.calibration.statistics} changes nothing: neither a step nor a static range of the "
            "scheme reads statistics: leave it out"
        )


def _quantizes(recipe: Recipe) -> bool:
    s = recipe.scheme
    # Embedding and head are rounded without a step.
    tensors = (s.weight, s.input, s.query, s.key, s.value, s.attention_probs)
    return any(t is not None for t in (*tensors, *(t for o in s.overrides for t in o.tensors.values())))
