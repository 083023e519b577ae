"""A transform as somebody outside would write it: a random rotation of the whole residual stream (QuaRot without Hadamard)."""

from dataclasses import dataclass

import torch
from torch import nn

from ptq.network.basis import Basis
from ptq.network.network import is_linear, replace_module, weight_of
from ptq.network.outside import set_weight
from ptq.steps import RESIDUAL, StepPlan, Transform


@dataclass(frozen=True)
class Options:
    """How the stream is turned.

    Attributes:
        seed: of the rotation.
        forget: leave out the Linears that write into the stream, which a proof has to notice.
    """

    seed: int = 0
    forget: bool = False


def fold(norm, readers):
    """Moves a norm's gain and bias (of a LayerNorm) into the Linears that read it; returns the norm to put in its place."""
    gain, bias = norm.weight.double(), getattr(norm, "bias", None)
    for reader in readers:
        weight = weight_of(reader)
        if bias is not None:
            extra = weight.double() @ bias.double()
            if reader.bias is None:
                reader.bias = nn.Parameter(extra.to(weight.dtype), requires_grad=False)
            else:
                reader.bias.copy_(reader.bias.double() + extra)
        weight.copy_(weight.double() * gain)
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None)
    return nn.RMSNorm(len(gain), eps, elementwise_affine=False)


class Step(Transform):
    """Turns embedding, readers, writers and head by one random orthogonal matrix; a LayerNorm's mean is taken out before."""

    acts = frozenset({RESIDUAL})

    def plan(self, context):
        width = context.network.model.config.get_text_config().hidden_size
        noise = torch.randn(
            width, width, generator=torch.Generator().manual_seed(self.options.seed), dtype=torch.float64
        )
        matrix, triangle = torch.linalg.qr(noise)
        norm = context.module(context.links(context.network.blocks[0])[0].producer)
        centred = isinstance(norm, nn.LayerNorm)
        return StepPlan(basis=Basis.rotation(matrix * triangle.diagonal().sign(), centred), stale=True)

    def outside(self, plan, context):
        model = context.network.model
        modules = {name: model.get_submodule(name) for name in context.network.outside}
        head = model.get_output_embeddings()
        for module in modules.values():
            if isinstance(module, nn.Embedding) and module.embedding_dim == len(plan.basis.matrix):
                set_weight(module, "weight", plan.basis.forward(module.weight.double()))
        norm_name = next(name for name, m in modules.items() if m.weight.dim() == 1)
        norm = modules[norm_name]
        weight = head.weight.double()
        if getattr(norm, "bias", None) is not None:
            extra = weight @ norm.bias.double()
            head.register_parameter("bias", nn.Parameter(extra.to(head.weight.dtype), requires_grad=False))
        set_weight(head, "weight", (weight * norm.weight.double()) @ plan.basis.matrix)
        eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None)
        replace_module(model, norm_name, nn.RMSNorm(len(norm.weight), eps, elementwise_affine=False))

    def apply(self, block, plan, context):
        basis = plan.basis
        for link in context.links(block):
            if link.kind != "norm":
                continue
            readers = [context.module(name) for name in link.readers]
            norm = fold(context.module(link.producer), readers)
            replace_module(context.network.model, link.producer, norm)
            for reader in readers:
                weight_of(reader).copy_(weight_of(reader).double() @ basis.matrix)
        if self.options.forget:
            return
        for name in context.sums(block):
            writer = context.module(name)
            if not is_linear(writer):
                continue
            weight_of(writer).copy_(basis.forward(weight_of(writer).double().t()).t())
            if writer.bias is not None:
                writer.bias.copy_(basis.forward(writer.bias.double()))
