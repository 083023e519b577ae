"""What the steps of a recipe plan with: links, captures and attentions of a session's network."""

from collections.abc import Mapping

from ptq.calibration.samples import Samples
from ptq.config.schema import SchemeConfig
from ptq.config.scheme import attention_tensors, check_attention
from ptq.errors import UserError
from ptq.network.attention import attentions_of, use_simulated_attention
from ptq.run.session import Session
from ptq.run.statistics_pass import statistics_of
from ptq.steps._step import REFERENCE, SAMPLES, STATISTICS, TRANSFORM, Plan, Step
from quantize.spec.rules import TENSORS


def open_plan(session: Session, steps: Mapping[str, Step]) -> Plan:
    """Finds the links and takes what the steps capture; no step has planned yet.

    Raises:
        UserError: when the scheme quantizes something inside attentions that cannot be reached.
    """
    scheme, journal = session.recipe.scheme, session.journal
    with journal.phase("links"):
        traces = session.trace(REFERENCE in captures_of_steps(scheme, steps))
        attentions = attentions_of(session.network, session.stream) if attention_tensors(scheme) else {}
        check_attention(scheme, sum(len(names) for names in attentions.values()))
    statistics = statistics_of(session)[0] if STATISTICS in captures_of_steps(session.recipe.scheme, steps) else None
    return Plan(session.network, session.stream, scheme, traces, statistics, attentions=attentions, note=journal.note)


def plan_steps(session: Session, steps: Mapping[str, Step], plan: Plan) -> None:
    """Opens the calibration samples and lets every step plan, in order.

    Where attentions are quantized the model calls them simulated from here on: the baseline has to be known by now.
    """
    with session.journal.phase("plan"):
        if any(plan.attentions.values()):
            use_simulated_attention(session.network)
        plan.samples = _samples(session, steps)
        for step in steps.values():
            step.plan(plan)


def check_steps(scheme: SchemeConfig, steps: Mapping[str, Step]) -> None:
    """Raises `UserError` when a step cannot work with `scheme`, or the scheme asks for clusters that no step can make."""
    captures_of_steps(scheme, steps)
    if any(step.kind == TRANSFORM for step in steps.values()):
        return
    tensors = {t: [getattr(scheme, t), *(o.tensors.get(t) for o in scheme.overrides)] for t in TENSORS}
    for tensor, specs in tensors.items():
        if any(spec is not None and spec.granularity == "cluster" for spec in specs):
            raise UserError(
                f"scheme.{tensor}.granularity: 'cluster', but no step clusters channels: add +steps.cluster={{}} before "
                f"the solver (method=smooth_cluster_gptq has it), or use granularity tensor"
            )


def captures_of_steps(scheme: SchemeConfig, steps: Mapping[str, Step]) -> frozenset[str]:
    """Returns all that the steps capture under `scheme`. Raises `UserError` where one cannot work with it."""
    return frozenset[str]().union(*(step.captures(scheme) for step in steps.values()))


def _samples(session: Session, steps: Mapping[str, Step]) -> Samples | None:
    """Returns the calibration samples for steps that capture them, one batch where a transform has to be proved, or None."""
    batch, wanted = session.recipe.calibration.batch_size, captures_of_steps(session.recipe.scheme, steps)
    if wanted & {SAMPLES, REFERENCE}:
        ids = session.calibration_tokens().ids
    elif any(step.kind == TRANSFORM for step in steps.values()):
        ids = session.calibration_tokens().ids[:batch]
    else:
        return None
    reference = session.stream.open(ids, batch) if REFERENCE in wanted else None
    return Samples(session.stream, session.stream.open(ids, batch), reference)
