"""Quantizes a model whose weights are on disk in one pass: each tensor is read from the checkpoint once."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ptq.calibration.rotary import RotaryFinder
from ptq.calibration.statistics_visitor import shared_statistics
from ptq.config.schema import Recipe
from ptq.config.scheme import check_attention
from ptq.data.sampling import Tokens
from ptq.errors import UserError
from ptq.evaluation.tasks.harness import Sample
from ptq.export.base import Exported
from ptq.network.attention import attention_named, attentions_of, use_simulated_attention
from ptq.network.block_stream import Flow
from ptq.network.links import Trace, Tracer, describe
from ptq.network.skeleton import interface_attentions, skeleton
from ptq.ranks.world import World, led
from ptq.report.channel_ranges import save_transformed
from ptq.run.baseline import Baseline, kept_baseline, known_baseline
from ptq.run.exports import QUANTIZED, check_turned, needs_saved_weights
from ptq.run.kept.identity import digest_of
from ptq.run.kept.kept_pass import RESUME
from ptq.run.kept.outside_file import stored_type, turns_stream, write_outside
from ptq.run.kernel_choice import agreeing, choice_of, keep_timings
from ptq.run.one_pass.beginning import Beginning
from ptq.run.one_pass.block_files import Growing, Shards, WholeBlocks, figures_read, files_of
from ptq.run.one_pass.block_plans import BlockPlans
from ptq.run.one_pass.visitor import OnePass
from ptq.run.planning import (
    captures_of_steps,
    draw_samples,
    holds_unturned_keys,
    open_samples,
    outdated_at_last,
    plan_all,
    reaches_inside,
    wants_sums,
)
from ptq.run.quantize_visitor import QuantizeVisitor, check_quantized
from ptq.run.session import Session, identity_of
from ptq.run.statistics_pass import keep_statistics, known_statistics, provenance_of, say_unreached, statistics_of
from ptq.steps._step import SOLVER, STATISTICS, Context, Step
from quantize.kernels.choice import describe as describe_kernels

PASS = "quantize"


@dataclass(frozen=True)
class Passed:
    """What the passes of a run have done, one or several.

    Attributes:
        visitor: what quantized, with its results.
        flow: the evaluation samples behind the last quantized block.
        baseline: their results in the unquantized model.
        answers: the unquantized model's to tasks.
        learned: figures of the step that has tuned the finished network; None without one.
        export: makes the export of the finished blocks' files, at a path; None where they are not what it holds.
    """

    visitor: QuantizeVisitor
    flow: Flow
    baseline: Baseline
    answers: list[Sample] = field(default_factory=list)
    learned: Mapping[str, Any] | None = None
    export: Callable[[pathlib.Path], Exported] | None = None


def goes_in_one_pass(recipe: Recipe, steps: Mapping[str, Step]) -> bool:
    """Whether the run has to see each block once: its weights are on disk, and what its steps plan they plan block by block."""
    return (
        recipe.execution.weights == "offloaded"
        and bool(steps)
        and not any(_plans_before(step) for step in steps.values())
    )


def _plans_before(step: Step) -> bool:
    """Whether the step has to see the network before its first block is finished."""
    return not step.by_block and (step.kind != SOLVER or type(step).plan is not Step.plan)


def check_devices(recipe: Recipe, steps: Mapping[str, Step], world: World) -> None:
    """Raises `UserError` where blocks are to be computed on several devices by a run that does not go block by block."""
    devices = ", ".join(recipe.execution.devices)
    if devices and world.size > 1:
        raise UserError(
            f"execution.devices: {devices}, but {world.size} ranks have a device each: use execution.device"
        )
    if not devices or goes_in_one_pass(recipe, steps):
        return
    planning = (name for name, step in steps.items() if _plans_before(step))
    what = next(
        (f"steps.{name} plans for the whole network first" for name in planning), "no block is quantized one by one"
    )
    raise UserError(f"execution.devices: {devices}, but {what}: use execution.device")


def quantize_in_one_pass(
    session: Session, steps: Mapping[str, Step], sources: Mapping[str, str], tokens: Tokens, folder: pathlib.Path
) -> Passed:
    """Finds links, evaluates the baseline, calibrates and quantizes block by block, from where an interrupted run has come to.

    The bits are those of one pass after another. What is known of these weights already (links, the baseline) is not done again.
    Ranks share the samples of each block; what rank 0 knows, and what it goes on after, holds for all of them.

    Args:
        session: the run's, whose weights are on disk.
        steps: by name; what they plan they plan block by block.
        sources: digests of the source of steps from outside.
        tokens: the evaluation windows.
        folder: of the run's results.

    Raises:
        UserError: where the model itself gives NaN or inf, or what else its steps cannot work with.
    """
    recipe, stream, network = session.recipe, session.stream, session.network
    digest, sums = session.loaded.digest, wants_sums(recipe.scheme, steps)
    measures = STATISTICS in captures_of_steps(recipe.scheme, steps)
    statistics = None
    if measures and recipe.calibration.statistics is not None:
        # A file says of which weights its statistics are: where their digest is not known yet, they are read for it first.
        statistics = statistics_of(session)[0]
    known = led(session.world, lambda: digest.known() is not None)
    found = session.known_traces(sums) if known else None
    baseline = known_baseline(session, tokens) if known else None
    if statistics is None and known and measures:
        statistics = known_statistics(session)
    with session.journal.phase(PASS):
        with stream.hold_outside(changed=False):
            now = Beginning(digest.state, found is None, baseline is None, measures and statistics is None)
            begun = Beginning(**led(session.world, lambda: dataclasses.asdict(_beginning(session, steps, now))))
            tracer = Tracer(network, stream, sums) if begun.traced else None
            first = (
                stream.open(tokens.ids, recipe.evaluation.batch_size, exact=True, shared=True)
                if begun.evaluated
                else None
            )
            traces: dict[int, Trace] = dict(found or {})
            attentions = _attentions(session, steps)
            context = Context(network, stream, recipe.scheme, traces, attentions=attentions, note=session.journal.note)
            draw_samples(session, steps, context)
            taken = session.calibration_tokens().ids if begun.measured else None
            measured = None if taken is None else shared_statistics(stream, taken, context.batch_size)
            plain, rotary = _simulated(context, steps)
            plans = BlockPlans(context, steps, None if begun.measured else statistics, measured)
            plan_all({name: step for name, step in steps.items() if not step.by_block}, context)
            flow = stream.open(tokens.ids, recipe.evaluation.batch_size, exact=True, shared=True)
            context.samples = samples = open_samples(steps, context)
            visitor = QuantizeVisitor(context, steps, flow, choice_of(session))
            with stream.hold_outside(turns_stream(steps) is not None):
                files = files_of(session, steps)
        check = partial(check_turned, recipe, steps, context)
        one = OnePass(stream, traces, tracer, first, plans, visitor, digest.read, files, check, plain, rotary)
        flows = [flow] if samples is None else [flow, samples.flow]
        beside = [None if samples is None else samples.reference, None if tracer is None else tracer.flow, first]
        beside += [None if rotary is None else rotary.flow, *plans.flows]
        kept = session.kept(
            PASS, _key(session, sources, begun), [*flows, *(f for f in beside if f is not None)], one, files.sum_of
        )
        with agreeing():
            stream.run(flows, one, PASS, kept)
    for line in describe(traces):
        session.journal.note(line)
    session.journal.console.print(describe(traces)[0], markup=False)
    check_quantized(flow)
    with session.journal.phase("baseline"):
        if first is not None and baseline is None:
            baseline = kept_baseline(session, tokens, first)
        if tracer is not None and found is None:
            session.keep_traces(tracer.traces, sums)
    if measures:
        # Of statistics that a step outdates, and that are not taken again, nothing is known after it.
        lost = outdated_at_last(recipe.scheme, steps)
        picture = None if lost else folder / "channels.png"
        _keep_statistics(session, plans, begun.measured, picture)
    if baseline is None:
        raise ValueError("a pass without a baseline has none to be compared with")
    keep_timings(session, visitor.kernels)
    session.journal.note(describe_kernels(visitor.kernels.ran, visitor.kernels.refused))
    if kept is None:
        return Passed(visitor, flow, baseline)
    if not isinstance(files, WholeBlocks):
        export = partial(_finished, session, steps, files, [kept.file_of(block) for block in network.blocks])
        return Passed(visitor, flow, baseline, export=export)
    if needs_saved_weights(recipe):
        kept.hand_over(network.blocks, folder / QUANTIZED)
        write_outside(stream, stored_type(session.loaded, steps), folder / QUANTIZED)
    return Passed(visitor, flow, baseline)


def _attentions(session: Session, steps: Mapping[str, Step]) -> dict[int, list[str]]:
    """Returns the attentions of each block where something acts inside them, for which no weight is read where the model's code
    runs without values.

    Raises:
        UserError: where they cannot be reached.
    """
    recipe = session.recipe
    if not reaches_inside(recipe.scheme, steps):
        return {}
    try:
        found = interface_attentions(skeleton(recipe.model, session.store))
    except UserError:
        raise
    except Exception as error:  # remote code may raise anything
        session.journal.say(f"attentions: found in a pass of its own: the model does not run without values ({error})")
        found = attentions_of(session.network, session.stream)
    check_attention(recipe.scheme, sum(len(names) for names in found.values()))
    return found


def _simulated(
    context: Context, steps: Mapping[str, Step]
) -> tuple[Callable[[], AbstractContextManager[None]], RotaryFinder | None]:
    """Lets the model call simulated attentions from now on, where something acts inside them.

    Returns:
        A context in which it calls its own; and what finds the layouts of rotary embeddings, where a cache holds keys without them.
    """
    unturned = holds_unturned_keys(context.scheme, steps)
    if not any(context.attentions.values()):
        return nullcontext, None
    own: str = context.network.model.config._attn_implementation
    use_simulated_attention(context.network)
    rotary = RotaryFinder(context.network, context.stream, context.attentions) if unturned else None
    if rotary is not None:
        context.rotary = rotary.found
    return partial(attention_named, context.network, own), rotary


def _finished(
    session: Session,
    steps: Mapping[str, Step],
    files: Shards | Growing,
    blocks: Sequence[pathlib.Path],
    path: pathlib.Path,
) -> Exported:
    """Makes the export at `path` of the blocks' files and of what lies outside them, as the steps leave it."""
    with session.stream.hold_outside(turns_stream(steps) is not None):
        return files.finish(path, blocks)


def _keep_statistics(session: Session, plans: BlockPlans, measured: bool, picture: pathlib.Path | None) -> None:
    """Keeps the statistics for later runs where they were taken here, and draws into `picture` what the plans have made of them."""
    found = plans.result(provenance_of(session, session.calibration_tokens()))
    if found is None:
        return
    before, after = found
    if measured:
        say_unreached(session, before)
        keep_statistics(session, before)
    if picture is not None:
        save_transformed(before, after, {}, picture)


def _beginning(session: Session, steps: Mapping[str, Step], now: Beginning) -> Beginning:
    """Returns what the pass that is interrupted began with, where it can be gone on with, or what this one begins with."""
    if session.folder is None:
        return now
    folder = session.folder / RESUME
    kept = sorted((folder / PASS).glob("block-*.safetensors"))
    begun = Beginning.read(folder, session.loaded.digest, kept, figures_read(session.recipe, steps))
    if begun is None or not begun.goes_on_with(now):
        now.write(folder)
        return now
    return begun


def _key(session: Session, sources: Mapping[str, str], begun: Beginning) -> str:
    tokens = (session.seen_tokens(), session.evaluation_tokens())
    identity = identity_of(session.recipe, sources, begun.state, tokens, session.stream.device)
    return digest_of({"identity": identity, **dataclasses.asdict(begun)})
