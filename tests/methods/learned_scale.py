"""A learned method as somebody outside would write it: each weight's range is shrunk by a ratio learned on the block's output."""

from dataclasses import dataclass

import torch
from torch import nn

from ptq.network.network import replace_module, weight_of
from ptq.steps import SAMPLES, BlockInputs, Solver, captures_of, quantize_linear, specs_of
from quantize.grid.affine import grouped, quantize
from quantize.grid.ranges import weight_grid


@dataclass(frozen=True)
class Options:
    """How the ratios are learned.

    Attributes:
        steps: gradient steps a block; 0 learns nothing.
        rate: of Adam.
    """

    steps: int = 10
    rate: float = 0.03


class Shrunk(nn.Module):
    """A Linear whose weight is rounded on a range times a ratio that gradients reach."""

    def __init__(self, linear, spec):
        super().__init__()
        self.weight, self.bias, self.spec = weight_of(linear).detach(), linear.bias, spec
        self.ratio = nn.Parameter(torch.ones((), device=self.weight.device))

    def forward(self, x):
        scale = weight_grid(self.weight, self.spec).scale * self.ratio
        steps = self.weight / scale
        most = 2 ** (self.spec.bits - 1) - 1
        rounded = steps + (steps.round() - steps).detach()
        return nn.functional.linear(x, rounded.clamp(-most, most) * scale, self.bias)


class Step(Solver):
    """Learns one ratio a Linear from pairs, then rounds to nearest."""

    def captures(self, scheme):
        return captures_of(scheme) | {SAMPLES}

    def apply(self, block, plan, context):
        pairs = context.samples.pairs(block)
        names = [name for stage in context.stages(block) for name in stage if specs_of(context, name).weight]
        linears = {name: context.module(name) for name in names}
        shrunk = {name: Shrunk(linear, specs_of(context, name).weight) for name, linear in linears.items()}
        for name, module in shrunk.items():
            replace_module(context.network.model, name, module)
        self.learn(pairs, [module.ratio for module in shrunk.values()])
        inputs = BlockInputs(context, block)
        for name, linear in linears.items():
            replace_module(context.network.model, name, linear)
            ratio, specs = float(shrunk[name].ratio), specs_of(context, name)

            def solve(weight, ratio=ratio, spec=specs.weight):
                grid = weight_grid(weight * ratio, spec)
                return quantize(grouped(weight, spec), grid).reshape(weight.shape), grid

            quantize_linear(context, name, specs, inputs.of(name, specs), solve)

    def learn(self, pairs, ratios):
        optimizer = torch.optim.Adam(ratios, lr=self.options.rate)
        with torch.enable_grad():
            for step in range(self.options.steps):
                pair = next(pairs.batches(seed=step))
                loss = (pair.output() - pair.target).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
