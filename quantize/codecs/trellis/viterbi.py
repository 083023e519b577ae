"""The nearest sequence of a bitshift trellis by dynamic programming (Viterbi), and the one that ends where it began.

A state has L bits. Each step shifts k new bits in from below, ``s' = (s << k | b) mod 2^L``, and gives the value that a table
has for the new state (Tseng et al. 2024, QTIP, section 3.1). A state's 2^k predecessors agree in their lower L - k bits.
"""

import math
from collections.abc import Sequence

import torch

BATCH = 128
"""Sequences that are searched together, at most: at 12 bits a state and 2 a step their history takes 134 MB."""


class Viterbi:
    """Searches sequences of states on one device; holds its working memory from call to call.

    Args:
        values: of the states, float32 (2^L,).
        bits: that a step shifts in, k; L is k or more.
    """

    def __init__(self, values: torch.Tensor, bits: int):
        self.values, self.bits, self.branches = values, bits, 1 << bits
        self.kept = len(values) >> bits
        self._values = values.view(self.kept, self.branches, 1)
        self._squares = self._values.square()
        self._memory = values.new_empty(0)

    def loops(self, x: torch.Tensor, weights: Sequence[float] | None = None) -> torch.Tensor:
        """Returns sequences of states, int64 (steps, n), whose first state follows on the last: steps x k bits say all of it.

        By two searches (QTIP, algorithm 4): one of the sequence turned by half its length, in whose middle the end meets the
        beginning, and one that has to begin and end there.

        Args:
            x: sequences, float32 (steps, n); L / k steps or more.
            weights: what a squared error in each step costs, above 0; None for all alike.
        """
        weights = [1.0] * len(x) if weights is None else weights
        half = len(x) // 2
        turned = [*weights[-half:], *weights[:-half]]
        found = []
        parts = -(-x.shape[1] // BATCH)
        for part in x.tensor_split(parts, 1):
            edge = self.paths(part.roll(half, 0), turned)[half - 1] & (self.kept - 1)
            found.append(self.paths(part, weights, edge))
        return torch.cat(found, 1)

    def paths(self, x: torch.Tensor, weights: Sequence[float], edge: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the sequences of states, int64 (steps, n), with the least weighted sum of squared errors.

        Args:
            x: sequences, float32 (steps, n).
            weights: what a squared error in each step costs, above 0.
            edge: the lower L - k bits of the state before the first one and of the last one, int64 (n,); None leaves both free.
        """
        steps, count = x.shape
        history, costs, halves = self._working(steps, count)
        history[0].zero_() if edge is None else history[0].fill_(math.inf).scatter_(0, edge[None], 0.0)
        flat, rows = costs.view(-1, count), x.unbind()
        for step, (row, weight) in enumerate(zip(rows, weights, strict=True)):
            # w (x - v)^2 less w x^2, which is the same for every state.
            torch.addcmul(history[step].unsqueeze(1), self._values, row.view(1, 1, -1), value=-2 * weight, out=costs)
            costs.add_(self._squares, alpha=weight)
            if step + 1 < steps:
                self._least(flat, halves, history[step + 1])
        shift = torch.arange(self.branches, device=x.device)[:, None] * self.kept
        if edge is None:
            state = flat.argmin(0)
        else:
            ends = edge + shift
            state = ends.gather(0, flat.gather(0, ends).argmin(0, keepdim=True))[0]
        states = torch.empty(steps, count, dtype=torch.int64, device=x.device)
        states[-1] = state
        for step in range(steps - 2, -1, -1):
            # The costs of the 2^k states that may have come before are computed again: they are not kept.
            before = shift + (state >> self.bits)
            values = self.values[before]
            cost = history[step].gather(0, before >> self.bits) + weights[step] * values * (values - 2 * rows[step])
            state = before.gather(0, cost.argmin(0, keepdim=True))[0]
            states[step] = state
        return states

    def _least(self, costs: torch.Tensor, halves: list[torch.Tensor], out: torch.Tensor) -> None:
        """Writes the least cost of the 2^k states with the same lower bits into `out` (2^(L-k), n), by halves."""
        for half in (*halves, out):
            middle = len(half)
            torch.minimum(costs[:middle], costs[middle:], out=half)
            costs = half

    def _working(self, steps: int, count: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Returns the least costs before each step, (steps, 2^(L-k), n), those of one step's states, and of halves of them."""
        sizes = [steps * self.kept, *(len(self.values) >> level for level in range(self.bits))]
        if len(self._memory) < sum(sizes) * count:
            self._memory = self.values.new_empty(sum(sizes) * count)
        history, costs, *halves = self._memory[: sum(sizes) * count].split([size * count for size in sizes])
        return (
            history.view(steps, self.kept, count),
            costs.view(self.kept, self.branches, count),
            [half.view(-1, count) for half in halves],
        )
