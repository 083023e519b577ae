"""AutoRound (Cheng et al. 2023): which way each weight is rounded, and its ranges, by sign steps on the block's output error."""

from dataclasses import dataclass

import torch

from ptq.config.options import option, seed_option
from ptq.config.schema import SchemeConfig
from ptq.network.network import Block
from ptq.steps._learning import PRECISIONS, captures_to_learn, check_pairs, learn, quantize_learned, restored, trainable
from ptq.steps._solving import BlockInputs, labels_of, require_integers, specs_of
from ptq.steps._step import Context, Solver, StepPlan
from quantize.solvers.rounding import LearnedRounding, LearnedWeight, linear_decay, sign_step

TARGETS = ("present", "original")


@dataclass(frozen=True)
class Options:
    """How rounding is learned.

    Attributes:
        steps: sign steps a block, each on one batch of samples; 0 rounds to nearest.
        rate: of the first step, falling to 0 linearly; null for 1 / steps, with which a rounding can just be turned.
        target: ``present``: the block is to give what it gave for the input it gets now; ``original``: what the unquantized
            network's block gave, so that it makes up for the blocks before it.
        held_out: one batch in so many is only looked at; what is kept is the least error met on these.
        precision: type of the products while it learns: ``float32``, which leaves the model's own, or ``bfloat16``, which some
            processors multiply faster.
        seed: of the order of the batches.
    """

    steps: int = option(200, least=0)
    rate: float | None = option(None, least=1e-6)
    target: str = option("present", choices=TARGETS)
    held_out: int = option(8, least=2)
    precision: str = option("float32", choices=tuple(PRECISIONS))
    seed: int = seed_option()


class Step(Solver):
    """Replaces the block's Linears by `QuantLinear` with weights whose rounding was learned."""

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """Needs the samples, and what static input ranges need. `UserError` for weights of another format than int."""
        require_integers(scheme, "autoround")
        return captures_to_learn(scheme, self.options.target)

    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Quantizes the block's Linears in place, as the scheme says."""
        samples = context.samples_of("steps.autoround")
        check_pairs("autoround", len(samples.flow.ids), context.batch_size)
        pairs, inputs = samples.pairs(block), BlockInputs(context, block)
        precision = self.options.precision
        originals, learned = trainable(
            context, block, lambda name, weight: _rounding(context, name, weight), inputs, {}, precision
        )
        weights = [linear.learned for linear in learned.values()]
        parameters = [p for weight in weights for p in weight.parameters()]

        def update(step: int) -> None:
            sign_step(parameters, linear_decay(step, self.options.steps, self.options.rate))
            for weight in weights:
                weight.project()

        try:
            if parameters:
                o, linears = self.options, list(learned.values())
                found = learn(pairs, linears, parameters, o.steps, o.held_out, update, o.seed)
                context.note(
                    f"autoround: {block.name}: held out error {found.before:.3g} -> {found.after:.3g} (step {found.step})"
                )
        finally:
            restored(context, originals)
        quantize_learned(context, block, learned, inputs)


def _rounding(context: Context, name: str, weight: torch.Tensor) -> LearnedWeight:
    spec = specs_of(context, name).weight
    if spec is None:
        raise ValueError("no format for its weight")
    return LearnedRounding(weight, spec, labels_of(context, name, spec, "weight"))
