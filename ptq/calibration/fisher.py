"""What errors of weights cost: the Fisher information along them, block by block, backward from what reaches each block.

Where a model is compared with itself the KL divergence and its gradient are zero; what an error dW costs is its curvature,
``KL ~ 1/2 dW^T F dW``, with F the Fisher information of the model's own predictions. With J the derivative of the logits by the
weights, ``F = J^T (diag(p) - p p^T) J``: the covariance of G = J^T v for any random v of covariance ``diag(p) - p p^T``
(`fisher_root`), so that the mean of ``<dW, G>^2`` over samples and draws is what dW costs. G of a sample is what a backward
pass gives: the sum over tokens of the gradient by a Linear's output times its input. G of several samples, whose v are
independent, are uncorrelated: the square of their sum has the mean that the sum of their squares has.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from ptq.calibration.kept_outputs import KeptOutputs
from ptq.network.block_stream import BlockStream, Flow
from ptq.network.network import Block, replaced_forward, weight_of
from quantize.kernels.matmul import by_onednn, fast_linears, linear, multiplies_bfloat16, product

Shown = Callable[[Block], AbstractContextManager[None]]
"""Gives a context in which a block's weights are in memory, as they are to be looked at."""
Entered = Callable[[Block], Callable[[Mapping[str, torch.Tensor]], None]]
"""Called with a block whose weights are in memory; returns what is called with each batch's gradients by the block's Linears,
summed over its samples: float32 (out, in) by full name, of those that a token of the batch has reached. They are overwritten later.
"""


@torch.no_grad()
def block_inputs(
    stream: BlockStream, flow: Flow, shown: Shown, what: str = "forward", outputs: KeptOutputs | None = None
) -> list[torch.Tensor]:
    """Carries samples through all blocks and returns what reaches each, (samples, length, channels), in order.

    They are in memory, or memory-mapped where the stream keeps hidden states on disk. `flow.hidden` is the last block's output.
    `outputs` keeps what the Linears gave, for `backward`.
    """
    reached, outputs = list[torch.Tensor](), KeptOutputs(0) if outputs is None else outputs
    for block in stream.network.blocks:
        reached.append(stream.allocate(tuple(flow.hidden.shape), flow.hidden))
        reached[-1].copy_(flow.hidden)
        with shown(block):
            modules = _linears(stream, block)
            with keeping(modules, outputs) if outputs.open(modules, flow) else nullcontext():
                stream.step(flow, block)
        stream.progress(what, block.index + 1, len(stream.network.blocks))
    return reached


def output_gradients(
    stream: BlockStream,
    hidden: torch.Tensor,
    chunk: int,
    seed: int = 0,
    seen: Callable[[torch.Tensor], None] | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Returns the gradients of the sum over tokens of v times logits, v of `fisher_root`, by the final hidden states.

    Args:
        stream: its head gives logits.
        hidden: final hidden states (samples, length, channels); the last token predicts nothing that is evaluated, and has none.
        chunk: tokens whose logits exist at once.
        seed: of the random signs.
        seen: called with each sample's gradient by the head's weight, float32 (vocabulary, channels), unless it is None.
        dtype: in which gradients are multiplied, logits are not; None: as the model is.

    Returns:
        As `hidden`, in its type.
    """
    gradients = stream.allocate(tuple(hidden.shape), hidden)
    generator = torch.Generator().manual_seed(seed)
    head = stream.network.model.get_output_embeddings()
    last = hidden.shape[1] - 1
    sums: dict[str, torch.Tensor] = {}
    heads = {"head": head} if isinstance(head, nn.Linear) else {}
    with stream.head() as logits_of, watched(heads, None if seen is None else sums, back=dtype), fast_linears():
        for row in range(len(hidden)):
            sums.clear()
            gradients[row, last:].zero_()
            for start in range(0, last, chunk):
                span = slice(start, min(start + chunk, last))
                with torch.enable_grad():
                    x = hidden[row : row + 1, span].detach().to(stream.device).requires_grad_()
                    logits = logits_of(x)
                    (gradient,) = torch.autograd.grad(logits, x, fisher_root(logits.detach(), generator))
                gradients[row : row + 1, span].copy_(gradient)
            if seen is not None and sums:
                seen(sums["head"])
    return gradients


def embedding_gradients(
    stream: BlockStream, flow: Flow, gradients: torch.Tensor, seen: Callable[[torch.Tensor], None]
) -> None:
    """Carries gradients from the first block's input to the token embedding's weight.

    Args:
        stream: computes what comes before the blocks.
        flow: of these samples.
        gradients: by the first block's input, as `backward` leaves them.
        seen: called with each batch's gradient by the weight, float32 (vocabulary, channels).
    """
    with stream.hold_outside():
        weight = stream.network.model.get_input_embeddings().weight
        weight.requires_grad_(True)
        try:
            for _, rows in flow.slices():
                with torch.enable_grad():
                    hidden = stream.record(flow.ids[rows])[0]
                    (gradient,) = torch.autograd.grad(hidden, weight, gradients[rows].to(hidden))
                seen(gradient.float())
        finally:
            weight.requires_grad_(False)


def fisher_root(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns random v (..., vocabulary), in the type of `logits`, with mean 0 and covariance ``diag(p) - p p^T`` at each token.

    ``v = s (r sqrt(p) - p sum(r sqrt(p)))`` with random signs r, one for each entry of the vocabulary, and s, one for each token,
    by which tokens are uncorrelated. Labels drawn from p have the same covariance; signs have no rare large draws.
    """
    p = torch.softmax(logits.float(), dim=-1)
    signs = _signs((p.shape[-1],), generator).to(p)
    v = p.sqrt().mul_(signs)
    v.addcmul_(p, v.sum(-1, keepdim=True), value=-1)
    return v.mul_(_signs((*p.shape[:-1], 1), generator).to(p)).to(logits.dtype)


def backward(
    stream: BlockStream,
    flow: Flow,
    inputs: Sequence[torch.Tensor],
    gradients: torch.Tensor,
    shown: Shown,
    entered: Entered,
    outputs: KeptOutputs | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Carries gradients backward through the blocks, from the last; one block's weights are in memory at a time.

    Args:
        stream: calls blocks.
        flow: of these samples: the gradients of a batch are summed over all its tokens before anything is squared.
        inputs: what reaches each block.
        gradients: by the last block's output; overwritten by those by the first block's input.
        shown: as in `block_inputs`.
        entered: told of every block, and then of every batch's gradients by its weights.
        outputs: of the Linears, where `block_inputs` has kept them: they are the bits that the products would be.
        dtype: in which blocks multiply on this way, as in training of mixed precision; None: as they do elsewhere.
    """
    mixed = partial(torch.autocast, stream.device.type, dtype=dtype, enabled=dtype is not None)
    blocks = stream.network.blocks
    for block in reversed(blocks):
        with shown(block):
            seen = entered(block)
            modules = _linears(stream, block)
            for i, rows in flow.slices():
                sums: dict[str, torch.Tensor] = {}
                with watched(modules, sums, outputs, dtype, dtype), mixed(), fast_linears(), torch.enable_grad():
                    x = inputs[block.index][rows].detach().to(stream.device).requires_grad_()
                    # A copy: blocks may write into what they are given.
                    output = stream.call(flow, block, i, x.clone())
                    (gradient,) = torch.autograd.grad(output, x, gradients[rows].to(output))
                gradients[rows].copy_(gradient)
                seen(sums)
        stream.progress("backward", len(blocks) - block.index, len(blocks))


def gradients_dtype(device: torch.device, arithmetic: torch.dtype) -> torch.dtype | None:
    """Returns bfloat16 where a float32 model's gradients are multiplied faster by that, and None elsewhere.

    It changes each gradient by some thousandths of itself, where the draws that they are of leave tens of percent.
    """
    return torch.bfloat16 if arithmetic == torch.float32 and multiplies_bfloat16(device) else None


def cost_of_rows(error: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Returns the sum over rows of ``<dW_row, G_row>^2`` of one batch, float32 (): summed over batches and divided by their tokens
    it is what an error whose rows are independent of one another costs, twice over.

    Rows of a weight are rounded without regard to one another, and channels of an input go together: errors of one row are
    weighed with all their correlations, and the noise of single draws averages out over rows.

    Args:
        error: of a weight, (out, in).
        gradient: G, (out, in).
    """
    return torch.linalg.vecdot(error, gradient).square_().sum()


def _linears(stream: BlockStream, block: Block) -> dict[str, nn.Module]:
    return {name: stream.network.model.get_submodule(name) for name in block.linears}


@contextmanager
def keeping(modules: Mapping[str, nn.Module], outputs: KeptOutputs) -> Iterator[None]:
    """Inside the context what the Linears `modules` give is kept, as `watched` computes it."""
    names = list(modules)

    def forward(index: int) -> Callable[..., Any]:
        module, name = modules[names[index]], names[index]
        weight, bias = weight_of(module).detach(), _bias_of(module)

        def kept(x: torch.Tensor) -> torch.Tensor:
            # As on the way back, however the samples pass otherwise.
            with fast_linears():
                return outputs.keep(name, linear(x, weight, bias))

        return kept

    with replaced_forward(list(modules.values()), forward):
        yield


@contextmanager
def watched(
    modules: Mapping[str, nn.Module],
    sums: dict[str, torch.Tensor] | None,
    outputs: KeptOutputs | None = None,
    forth: torch.dtype | None = None,
    back: torch.dtype | None = None,
) -> Iterator[None]:
    """Inside the context the Linears `modules` have a derivative by their input where `fast_linears` leaves products to oneDNN.

    A backward pass adds each one's gradient by its weight, float32 (out, in), to `sums` under its name, unless that is None. What is
    in `outputs` is taken from there instead of being computed. Products are of `forth`, gradients' of `back`; None: of the weight's type.
    """
    names = list(modules)

    def forward(index: int) -> Callable[..., Any]:
        module, name = modules[names[index]], names[index]
        weight, bias = weight_of(module).detach(), _bias_of(module)
        narrow = weight if back is None else weight.to(back)
        if forth is not None:
            weight, bias = narrow if forth == back else weight.to(forth), None if bias is None else bias.to(forth)
        known = (lambda: None) if outputs is None else partial(outputs.take, name)
        return lambda x: _Watched.apply(x, weight, bias, narrow, name, sums, known())

    with replaced_forward(list(modules.values()), forward):
        yield


class _Watched(torch.autograd.Function):
    """x W^T + b, whose backward pass adds the gradient by W to a dictionary."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        back: torch.Tensor,
        name: str,
        sums: dict[str, torch.Tensor] | None,
        known: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.name, ctx.sums, ctx.dtype = name, sums, x.dtype
        x = x.to(weight.dtype)
        ctx.save_for_backward(x if sums is not None else x[:0], back)
        # A view: autograd would take what is given and returned for one changed in place.
        return linear(x, weight, bias) if known is None else known.view_as(known)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        outputs = gradients[0].reshape(-1, weight.shape[0]).to(weight.dtype)
        if ctx.sums is not None:
            by_weight = _by_weight(outputs, x.reshape(-1, weight.shape[1]))
            known = ctx.sums.get(ctx.name)
            ctx.sums[ctx.name] = by_weight if known is None else known.add_(by_weight)
        by_input = product(outputs.contiguous(), weight).to(ctx.dtype)
        return by_input.reshape(*gradients[0].shape[:-1], weight.shape[1]), None, None, None, None, None, None


def _by_weight(outputs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns G^T X in float32 (out, in) of gradients (tokens, out) and inputs (tokens, in)."""
    if outputs.dtype == torch.bfloat16 and multiplies_bfloat16(x.device):
        return product(outputs.t(), x.to(outputs.dtype)).float()
    turned = outputs.t().float()
    # oneDNN wants it in one piece; MKL reads it as it lies.
    turned = turned.contiguous() if by_onednn(turned, turned) else turned
    return product(turned, x.float())


def _bias_of(module: nn.Module) -> torch.Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, torch.Tensor) else None


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(2, shape, generator=generator) * 2 - 1
