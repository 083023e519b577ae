"""OmniQuant (Shao et al. 2023): how far each range is clipped, and a scale per channel behind each norm, by AdamW on the
block's output error.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ptq.config.options import option, seed_option
from ptq.config.schema import SchemeConfig
from ptq.config.scheme import tensor_specs
from ptq.errors import UserError
from ptq.network.network import Block, weight_of
from ptq.network.norms import gain_offset
from ptq.steps._learning import PRECISIONS, captures_to_learn, check_pairs, learn, quantize_learned, restored, trainable
from ptq.steps._solving import BlockInputs, labels_of, require_integers, specs_of
from ptq.steps._step import Context, Solver, StepPlan
from ptq.steps.transforms.smooth import key_of, rescale
from quantize.solvers.rounding import LearnedClipping, LearnedWeight

TARGETS = ("present", "original")


@dataclass(frozen=True)
class Options:
    """What is learned, and how.

    Attributes:
        steps: of AdamW a block, each on one batch of samples; 0 rounds to nearest.
        rate: of AdamW for the clips.
        scale_rate: of AdamW for the logarithms of the scales; 0 learns none.
        target: ``present``: the block is to give what it gave for the input it gets now; ``original``: what the unquantized
            network's block gave, so that it makes up for the blocks before it.
        held_out: one batch in so many is only looked at; what is kept is the least error met on these.
        precision: type of the products while it learns: ``float32``, which leaves the model's own, or ``bfloat16``, which some
            processors multiply faster.
        seed: of the order of the batches.
    """

    steps: int = option(200, least=0)
    rate: float = option(0.05, least=1e-6)
    scale_rate: float = option(0.005, least=0)
    target: str = option("present", choices=TARGETS)
    held_out: int = option(8, least=2)
    precision: str = option("float32", choices=tuple(PRECISIONS))
    seed: int = seed_option()


class Step(Solver):
    """Replaces the block's Linears by `QuantLinear` on learned ranges, behind norms that were rescaled."""

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """Needs the samples, and what static input ranges need.

        Raises:
            UserError: for weights of another format than int, or static inputs behind a norm whose scale is learned: their
                ranges are not those that were measured.
        """
        require_integers(scheme, "omniquant")
        if self.options.scale_rate and any(not spec.dynamic for spec in tensor_specs(scheme, "input")):
            raise UserError(
                "scheme.input.dynamic: false, but steps.omniquant learns scales that change the ranges of inputs: "
                "use steps.omniquant.scale_rate=0, or dynamic inputs"
            )
        return captures_to_learn(scheme, self.options.target)

    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Quantizes the block's Linears in place, as the scheme says."""
        samples = context.samples_of("steps.omniquant")
        check_pairs("omniquant", len(samples.flow.ids), context.batch_size)
        pairs, inputs = samples.pairs(block), BlockInputs(context, block)
        scales = self._log_scales(block, context)
        readers = {name: scale for names, scale in scales.values() for name in names}

        def made(name: str, weight: torch.Tensor) -> LearnedWeight:
            spec = specs_of(context, name).weight
            if spec is None:
                raise ValueError("no format for its weight")
            return LearnedClipping(weight, spec, labels_of(context, name, spec, "weight"), log_scale=readers.get(name))

        originals, learned = trainable(context, block, made, inputs, readers, self.options.precision)
        clips = [p for x in learned.values() for n, p in x.learned.named_parameters() if n.endswith("_logit")]
        logs = [scale for _, scale in scales.values()]
        groups = [{"params": clips, "lr": self.options.rate}, {"params": logs, "lr": self.options.scale_rate}]
        try:
            if clips:
                optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

                def update(step: int) -> None:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

                o, linears = self.options, list(learned.values())
                found = learn(pairs, linears, [*clips, *logs], o.steps, o.held_out, update, o.seed)
                context.note(
                    f"omniquant: {block.name}: held out error {found.before:.3g} -> {found.after:.3g} (step {found.step})"
                )
        finally:
            restored(context, originals)
        rescale(block, {key: torch.exp(scale.detach()) for key, (_, scale) in scales.items()}, context)
        for name, scale in readers.items():
            context.rescaled(name, torch.exp(scale.detach()))
        quantize_learned(context, block, learned, inputs)

    def _log_scales(self, block: Block, context: Context) -> dict[str, tuple[tuple[str, ...], nn.Parameter]]:
        """Returns the parameter of each norm whose readers are all quantized, with their names, by the link's key."""
        found: dict[str, tuple[tuple[str, ...], nn.Parameter]] = {}
        for link in context.links(block) if self.options.scale_rate else []:
            specs = [specs_of(context, name).weight for name in link.readers]
            if link.kind != "norm" or gain_offset(context.module(link.producer)) is None:
                continue
            if any(spec is None or spec.granularity == "cluster" for spec in specs):
                continue
            weight = weight_of(context.module(link.readers[0]))
            zeros = torch.zeros(weight.shape[1], device=weight.device)
            found[key_of(link)] = tuple(link.readers), nn.Parameter(zeros)
        return found
