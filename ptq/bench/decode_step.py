"""Where the time of a decoded token goes: in Linears, the head, the rest of the blocks, and outside of them."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ptq.bench.side import Side
from ptq.bench.timing import clock_of
from quantize.kernels.base import integer_rows
from quantize.modules.packed import PackedLinear
from quantize.modules.simulated import QuantLinear

QUANTIZING, LINEARS, HEAD, BLOCKS, OUTSIDE = (
    "quantizing inputs",
    "products of Linears",
    "head",
    "rest of the blocks",
    "outside the blocks",
)
"""What a token's time is divided into: the rest of the blocks is attention, cache, norms and activation functions."""
LINEAR = (nn.Linear, QuantLinear)
"""Linears of a block; packed ones are `nn.Linear` too."""
CALLS = 50
"""Calls of which the median counts, where a part is timed by itself."""


@torch.no_grad()
def step_times(side: Side, model: Any, prompt: torch.Tensor, tokens: int) -> dict[str, float]:
    """Returns milliseconds a token by part, of decoding `tokens` tokens after `prompt` (1, length), the prompt's pass left out.

    Quantizing of inputs is timed by itself and taken out of the Linears that do it: those of a group do it once.
    """
    clock = clock_of(next(model.parameters()).device)
    blocks, head = _blocks(model), model.get_output_embeddings()
    linears = [m for block in blocks for m in block.modules() if isinstance(m, LINEAR)]
    spent: dict[str, float] = dict.fromkeys((LINEARS, HEAD, BLOCKS), 0.0)
    with ExitStack() as stack:
        for part, modules in ((LINEARS, linears), (HEAD, [head]), (BLOCKS, blocks)):
            for module in modules:
                _watch(module, part, spent, stack, clock)

        def decoded(count: int) -> dict[str, float]:
            before = dict(spent)
            seconds = _seconds(lambda: side.decode(prompt, count), clock)
            return {part: spent[part] - before[part] for part in spent} | {OUTSIDE: seconds}

        decoded(1 + tokens)  # kernels are chosen and packed
        first, all_ = decoded(1), decoded(1 + tokens)
    own = {part: all_[part] - first[part] for part in all_}
    quantizing = tokens * sum(_quantizing(m, clock) for m in linears)
    seconds = {
        QUANTIZING: quantizing,
        LINEARS: own[LINEARS] - quantizing,
        HEAD: own[HEAD],
        BLOCKS: own[BLOCKS] - own[LINEARS],
        OUTSIDE: own[OUTSIDE] - own[BLOCKS] - own[HEAD],
    }
    return {part: max(0.0, 1e3 * value / tokens) for part, value in seconds.items()}


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks: the list of modules that holds the most Linears."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    found = max(lists, key=lambda one: sum(isinstance(m, LINEAR) for m in nn.Module.modules(one)))
    return list(found)


def _watch(module: nn.Module, part: str, spent: dict[str, float], stack: ExitStack, clock: Callable[[], float]) -> None:
    started: list[float] = []

    def begin(module: nn.Module, args: Any) -> None:
        started.append(clock())

    def end(module: nn.Module, args: Any, output: Any) -> None:
        spent[part] += clock() - started.pop()

    stack.callback(module.register_forward_pre_hook(begin).remove)
    stack.callback(module.register_forward_hook(end).remove)


def _quantizing(module: nn.Module, clock: Callable[[], float]) -> float:
    """Returns the seconds that it takes to quantize one row for a packed Linear that does so; else 0."""
    if not isinstance(module, PackedLinear) or module.input_spec is None or not module.quantizes:
        return 0.0
    x, spec = torch.ones(1, module.in_features, device=module.codes.device), module.input_spec
    times = sorted(_seconds(lambda: integer_rows(x, spec, None), clock) for _ in range(CALLS))
    return times[CALLS // 2]


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start
