"""What the steps of a recipe plan with, and their plans one after another."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError

from ptq.calibration.rotary import rotary_layouts
from ptq.calibration.samples import Remembered, Samples
from ptq.calibration.statistics import Statistics
from ptq.calibration.statistics_visitor import StatisticsVisitor, shared_statistics
from ptq.config.schema import SchemeConfig
from ptq.config.scheme import attention_tensors, check_attention, tensor_specs
from ptq.errors import UserError
from ptq.files.source_digest import module_digest
from ptq.network.attention import attentions_of, use_simulated_attention
from ptq.network.block_stream import BlockStream, Flow
from ptq.network.links import Trace, describe, trace_links
from ptq.network.network import Network
from ptq.network.outside import RoundedOutside
from ptq.network.stream.parts import in_parts
from ptq.ranks.gradient_sum import part_of
from ptq.run.session import Session
from ptq.run.statistics_pass import statistics_of
from ptq.steps._step import (
    GRADIENTS,
    INPUT,
    KEY,
    QUERY,
    REFERENCE,
    RESIDUAL,
    SAMPLES,
    STATISTICS,
    TRANSFORM,
    TUNER,
    Context,
    Step,
    StepPlan,
)
from quantize.spec.rules import TENSORS

PROOF = 512
"""Tokens that transforms are proved on, in whole samples, where no step asks for samples: each point of a sweep passes them."""


def open_context(session: Session, steps: Mapping[str, Step]) -> Context:
    """Finds the links and takes what the steps capture; no step has planned yet.

    Raises:
        UserError: when the scheme quantizes something inside attentions that cannot be reached.
    """
    scheme, journal = session.recipe.scheme, session.journal
    wanted = captures_of_steps(scheme, steps)
    with journal.phase("links"):
        context = context_of(session.network, session.stream, scheme, steps, journal.note, session.traces)
    journal.console.print(describe(context.traces)[0], markup=False)
    if STATISTICS in wanted:
        context.statistics = statistics_of(session)[0]
    draw_samples(session, steps, context)
    return context


def draw_samples(session: Session, steps: Mapping[str, Step], context: Context) -> None:
    """Gives the context the calibration samples that pass the network for a step, beside those that statistics are taken of: a
    transform is proved on some.
    """
    context.batch_size = session.recipe.calibration.batch_size
    wanted = captures_of_steps(session.recipe.scheme, steps)
    if wanted & {SAMPLES, REFERENCE} or any(step.kind == TRANSFORM for step in steps.values()):
        context.ids = session.calibration_tokens().ids


def context_of(
    network: Network,
    stream: BlockStream,
    scheme: SchemeConfig,
    steps: Mapping[str, Step],
    note: Callable[[str], None],
    traces_of: Callable[[bool], Mapping[int, Trace]] | None = None,
) -> Context:
    """Finds the links, and the attentions where something acts in them. `traces_of` gives the links where they are known.

    Raises:
        UserError: when the scheme quantizes something inside attentions that cannot be reached.
    """
    sums = wants_sums(scheme, steps)
    traces = trace_links(network, stream, sums) if traces_of is None else traces_of(sums)
    for line in describe(traces):
        note(line)
    attentions = attentions_of(network, stream) if reaches_inside(scheme, steps) else {}
    check_attention(scheme, sum(len(names) for names in attentions.values()))
    rotary = rotary_layouts(network, stream, attentions) if holds_unturned_keys(scheme, steps) else {}
    return Context(network, stream, scheme, traces, attentions=attentions, rotary=rotary, note=note)


def reaches_inside(scheme: SchemeConfig, steps: Mapping[str, Step]) -> bool:
    """Whether something acts inside attentions: a format of the scheme, or a step on queries and keys."""
    return bool(attention_tensors(scheme)) or any(step.acts & {QUERY, KEY} for step in steps.values())


def holds_unturned_keys(scheme: SchemeConfig, steps: Mapping[str, Step]) -> bool:
    """Whether a cache holds keys without their rotary embeddings. Raises `UserError` where a step acts on what these give."""
    if scheme.cache is None or not scheme.cache.before_rope:
        return False
    if turning := [name for name, step in steps.items() if KEY in step.acts]:
        raise UserError(
            f"scheme.cache.before_rope: true, but steps.{turning[0]} acts on keys after their rotary embeddings: use false"
        )
    return True


def looks_at_samples(scheme: SchemeConfig, steps: Mapping[str, Step]) -> bool:
    """Whether a step captures something of the calibration samples, or passes some by itself, as transforms and tuners do."""
    return bool(captures_of_steps(scheme, steps)) or any(step.kind in {TRANSFORM, TUNER} for step in steps.values())


def uncalibrated(scheme: SchemeConfig, steps: Mapping[str, Step]) -> list[str]:
    """Returns a line for people where no step looks at calibration samples, so that what is asked of them changes nothing."""
    if looks_at_samples(scheme, steps):
        return []
    return ["calibration: no step of this recipe looks at samples; their text, number, length and seed change nothing"]


def warnings_of(scheme: SchemeConfig, steps: Mapping[str, Step]) -> list[str]:
    """Returns a line for each step that is known to do harm after those before it."""
    lines, acted = [], frozenset[str]()
    for step in steps.values():
        lines.append(step.warned(scheme, acted))
        acted |= step.acts
    return [line for line in lines if line is not None]


def wants_sums(scheme: SchemeConfig, steps: Mapping[str, Step]) -> bool:
    """Whether a step has to know what is added to the residual stream."""
    # What acts on an input online may be asked to by the Linear's place: rotate's down and out are those that write to the stream.
    places = {RESIDUAL, INPUT}
    return REFERENCE in captures_of_steps(scheme, steps) or any(step.acts & places for step in steps.values())


def plan_steps(session: Session, steps: Mapping[str, Step], context: Context) -> None:
    """Lets every step plan, in order, each on the network as those before it leave it; then opens the samples.

    Where attentions are quantized the model calls them simulated from here on: the baseline has to be known by now.
    """
    with session.journal.phase("plan"):
        plan_all(steps, context, _Plans(session, context).of)
        context.samples = open_samples(steps, context, _remembered(session, context))


def _remembered(session: Session, context: Context) -> Remembered:
    """Returns who knows what the model's unquantized blocks give for the first batch of the calibration samples."""
    if context.ids is None:
        return lambda block, compute: compute()
    tokens, simulated = session.calibration_tokens().fingerprint, any(context.attentions.values())
    key = ("output before", tokens, context.batch_size, simulated, torch.get_num_threads())
    return lambda block, compute: session.shared.of_model((*key, block.index), compute)


def plan_all(steps: Mapping[str, Step], context: Context, plan_of: Callable[[Step], StepPlan] | None = None) -> None:
    """Lets every step plan, in order; `plan_of` gives a step's plan where it need not plan again."""
    if any(context.attentions.values()):
        use_simulated_attention(context.network)
    stale: Statistics | None = None
    for name, step in steps.items():
        if stale is not None and STATISTICS in step.captures(context.scheme):
            context.statistics, stale = _take_again(context, stale), None
        plan = step.plan(context) if plan_of is None else plan_of(step)
        # What is stale already stays so when a second step makes it so again.
        stale = context.statistics if plan.stale and context.statistics is not None else stale
        add_plan(context, name, step, plan)
    if rounded := RoundedOutside(context.scheme, context.network):
        context.stream.outside.append(rounded)


class _Plans:
    """The plans of a session's steps, out of the store where the same steps have planned on the same samples before."""

    def __init__(self, session: Session, context: Context):
        self._session, self._context = session, context
        recipe = session.recipe
        tokens = None if context.ids is None and context.statistics is None else session.calibration_tokens()
        # Statistics from a file are whoever's: what was planned on them is not kept.
        self._kept = tokens is not None and recipe.calibration.statistics is None
        scheme = dataclasses.asdict(recipe.scheme)
        self._key: dict[str, object] = {"scheme": scheme, "batch_size": recipe.calibration.batch_size}
        self._key |= {} if tokens is None else session.key(tokens)
        self._chain: list[object] = []

    def of(self, step: Step) -> StepPlan:
        """Returns the step's plan: found, or made now."""
        kind = type(step)
        if kind.plan is Step.plan:
            return step.plan(self._context)
        source = module_digest(sys.modules[kind.__module__])
        self._chain.append(
            {"step": f"{kind.__module__}.{kind.__qualname__}", "options": _plain(step.options), "source": source}
        )
        if not self._kept:
            return step.plan(self._context)
        key, store, journal = {**self._key, "steps": list(self._chain)}, self._session.store, self._session.journal
        words = f"plan of {kind.__module__.rpartition('.')[2]}"
        with store.found_or_mine("plan", key, lambda line: journal.say(f"{words}: {line}")) as found:
            if found is not None:
                try:
                    plan = self._named(StepPlan.load(found, self._context.stream.device))
                except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
                    store.made_again("plan", " ".join(str(error).split()))
                else:
                    journal.say(f"{words}: made before, read from the store")
                    return plan
            plan = step.plan(self._context)
            if plan.tensors or plan.statistics is not None:
                store.add("plan", key, plan.save, f"{kind.__module__}, {self._session.recipe.model.path}")
            return plan

    def _named(self, plan: StepPlan) -> StepPlan:
        """Gives the statistics of a plan the names of this run's model and text."""
        if plan.statistics is None or self._context.statistics is None:
            return plan
        named = dataclasses.replace(plan.statistics, provenance=self._context.statistics.provenance)
        return dataclasses.replace(plan, statistics=named)


def _plain(options: Any) -> Any:
    return (
        dataclasses.asdict(options)
        if dataclasses.is_dataclass(options) and not isinstance(options, type)
        else repr(options)
    )


def add_plan(context: Context, name: str, step: Step, plan: StepPlan) -> None:
    """Lets the steps that plan after this one, and what lies outside the blocks, know of its plan."""
    context.plans[name] = plan
    if step.kind == TRANSFORM:
        context.steps[name] = step
        context.stream.outside.append(lambda: step.outside(plan, context))
    if plan.stale:
        context.statistics = None
    elif plan.statistics is not None:
        context.statistics = plan.statistics


def _take_again(context: Context, stale: Statistics) -> Statistics:
    """Returns the statistics of the network as the steps so far leave it, of the samples that the `stale` ones are of."""
    visitor, flow = statistics_again(context)
    context.show(visitor, flow, "statistics")
    return visitor.result(stale.provenance)


def statistics_again(context: Context) -> tuple[StatisticsVisitor, Flow]:
    """Returns what takes statistics of the calibration samples as the steps so far leave the network, and these, shared by the ranks."""
    if context.ids is None:
        raise UserError("calibration: the statistics are stale and there are no samples to take them from again")
    return shared_statistics(context.stream, context.ids, context.batch_size)


def taken_again(scheme: SchemeConfig, steps: Mapping[str, Step]) -> list[str]:
    """Returns the steps, by name, for which statistics are taken again: those before, which plan block by block, have outdated them."""
    return _outdated(scheme, steps)[0]


def outdated_at_last(scheme: SchemeConfig, steps: Mapping[str, Step]) -> bool:
    """Whether such steps have outdated the statistics, and no step behind them needs them."""
    return _outdated(scheme, steps)[1]


def _outdated(scheme: SchemeConfig, steps: Mapping[str, Step]) -> tuple[list[str], bool]:
    again, outdated = [], False
    for name, step in steps.items():
        if outdated and STATISTICS in step.captures(scheme):
            again.append(name)
            outdated = False
        outdated = outdated or step.outdates
    return again, outdated


def check_steps(scheme: SchemeConfig, steps: Mapping[str, Step]) -> None:
    """Raises `UserError` when a step cannot work with `scheme`, or the scheme asks for clusters that no step can make."""
    captures_of_steps(scheme, steps)
    if any(step.kind == TRANSFORM for step in steps.values()):
        return
    for tensor in TENSORS:
        if any(spec.granularity == "cluster" for spec in tensor_specs(scheme, tensor)):
            raise UserError(
                f"scheme.{tensor}.granularity: 'cluster', but no step clusters channels: add +steps.cluster={{}} before "
                f"the solver (method=smooth_cluster_gptq has it), or use granularity tensor"
            )


def captures_of_steps(scheme: SchemeConfig, steps: Mapping[str, Step]) -> frozenset[str]:
    """Returns all that the steps capture under `scheme`. Raises `UserError` where one cannot work with it."""
    return frozenset[str]().union(*(step.captures(scheme) for step in steps.values()))


def open_samples(
    steps: Mapping[str, Step], context: Context, remembered: Remembered = lambda block, compute: compute()
) -> Samples | None:
    """Returns the calibration samples for steps that capture them, some `PROOF` tokens where a transform has to be proved, or None.

    `remembered` may know what unquantized blocks give for that batch, of earlier runs of the model.
    """
    if context.ids is None:
        return None
    batch, wanted, stream = context.batch_size, captures_of_steps(context.scheme, steps), context.stream
    ids = context.ids if wanted & {SAMPLES, REFERENCE} else context.ids[:batch]
    if not wanted & {SAMPLES, REFERENCE} and _proved_apart(steps, context):
        ids = ids[: -(-PROOF // ids.shape[1])]
        return Samples(stream, stream.open(ids, batch, changed=False), unquantized=remembered)
    shared = bool(wanted & {SAMPLES, REFERENCE})
    reference = stream.calibration(ids, batch, shared) if REFERENCE in wanted else None
    flow = stream.calibration(ids, batch, shared)
    parts = in_parts(stream, flow, part_of(batch)) if GRADIENTS in wanted else None
    return Samples(stream, flow, reference, parts=parts)


def _proved_apart(steps: Mapping[str, Step], context: Context) -> bool:
    """Whether what is there for proofs alone can pass the unquantized blocks: the output before the first transform is theirs then.

    In a mixture it passes what the run quantizes: the result counts the tokens that come to each expert.
    """
    transforms = [step for step in steps.values() if step.kind == TRANSFORM]
    mixtures = any(block.mixtures for block in context.network.blocks)
    return bool(transforms) and all(step.proved for step in transforms) and not mixtures
