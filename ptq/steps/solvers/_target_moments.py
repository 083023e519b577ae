"""What GPTQ sums over the samples: second moments of what Linears read, and of the errors that their targets ask back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from ptq.ranks.reduction import merged, total_of
from ptq.ranks.sample_sum import SampleSum, by_sample
from ptq.ranks.world import World
from quantize.kernels.matmul import product
from quantize.modules.simulated import InputQuantizer
from quantize.solvers.correction import ErrorMoment
from quantize.solvers.gptq import Hessian

INPUT, SUM, REST = ERRORS = "input", "sum", "rest"
"""What an error is of: of the tensor that the Linear reads; of the sum that its output is a part of; or of the rest of that sum, from
which the Linear's own output is still to be taken: its moment is W H, and no token need be multiplied for it."""


@dataclass(frozen=True)
class Part:
    """Moments of some of the samples, and what the error is `of`, one of `ERRORS`."""

    hessian: Hessian
    error: ErrorMoment | None
    of: str

    def of_outputs(self, weight: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """Returns the moment of the error of the outputs, (out, in), of a Linear with this weight, or of some of its rows."""
        if self.error is None:
            return torch.zeros_like(weight[rows])
        moment = self.error.matrix
        if self.of == REST:
            # Their rounding stays in what is left: measured at 3e-5 of the error's energy at most (docs/results.md).
            return moment[rows] - product(weight[rows], self.hessian.matrix)
        return moment[rows] if self.of == SUM else weight[rows].double() @ moment.double()

    def merge(self, other: "Part") -> None:
        """Adds the other's tokens, in place."""
        self.hessian.merge(other.hessian)
        if self.error is not None and other.error is not None:
            self.error.merge(other.error)

    def clear(self) -> None:
        """Forgets all tokens."""
        self.hessian.clear()
        if self.error is not None:
            self.error.clear()

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the moments by name, as another rank gets them."""
        error = {} if self.error is None else self.error.state()
        return {f"h.{key}": t for key, t in self.hessian.state().items()} | {f"e.{key}": t for key, t in error.items()}

    @classmethod
    def from_state(cls, of: str, state: Mapping[str, torch.Tensor]) -> "Part":
        """Returns the part whose `state` this is."""
        own = {kind: {k[2:]: t for k, t in state.items() if k.startswith(kind)} for kind in ("h.", "e.")}
        error = ErrorMoment.from_state(own["e."]) if own["e."] else None
        return cls(Hessian.from_state(own["h."]), error, of)


def error_of(place: str | None, rest: str | None) -> str:
    """Returns which of `ERRORS` is that of a Linear whose output is part of the sum at `place`, of which `rest` reads the rest."""
    if place is None:
        return INPUT
    return SUM if rest is None else REST


@dataclass
class Moments:
    """Second moments of the tensor that `first` reads, as the Linears `names` get it: rounded by `quantizer`.

    Errors are of that tensor against the `original` one (tokens, channels), or, for a Linear with this `weight` and `bias` whose
    output is part of the sum at `place`, of that sum: what is missing there when the Linear multiplies the rounded input. Where a
    module is known that reads the `rest` of the sum, the error is that of the rest (`REST`). The samples that are `held` out, by
    their number, go into the second of two `sums`. `relative`: tokens weigh by what they carry at `place`.

    Attributes:
        length: tokens of a sample.
        empty: makes a part of no tokens.
        parts: of the samples of all ranks, where `reduce` has put them.
    """

    first: str
    quantizer: InputQuantizer | None
    length: int
    leaf: int
    empty: Callable[[], Part]
    original: torch.Tensor | None
    held: Callable[[int], bool] | None
    weight: torch.Tensor
    bias: torch.Tensor | None
    place: str | None
    rest: str | None
    relative: bool
    names: list[str] = field(default_factory=list)
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        self._latest: list[torch.Tensor] = []
        self._before: tuple[slice, torch.Tensor] | None = None
        count = 1 if self.held is None else 2
        self.sums: list[SampleSum[Part]] = [SampleSum(self.leaf, self.empty, merged, Part.clear) for _ in range(count)]

    @property
    def cost(self) -> float:
        """Of solving for these Linears, in no unit: a factorisation is cubic in the columns."""
        return float(self.weight.shape[1]) ** 3

    @property
    def of(self) -> str:
        """What errors are of."""
        return error_of(self.place, self.rest)

    def reduce(self, world: World, to: int | None) -> None:
        """Adds up what all ranks have seen, on rank `to`, or on all; the others have no parts then."""
        totals = [total_of(world, s, partial(Part.from_state, self.of), self.weight.device, to) for s in self.sums]
        self.sums = []
        if to is None or world.rank == to:
            self.parts = tuple(self.empty() if total is None else total for total in totals)

    @property
    def whole(self) -> Part:
        """The moments of all samples."""
        if len(self.parts) == 1:
            return self.parts[0]
        one, two = self.parts
        error = None if one.error is None or two.error is None else one.error.with_tokens_of(two.error)
        return Part(one.hessian.with_tokens_of(two.hessian), error, one.of)

    def see(self, x: torch.Tensor, tokens: slice) -> None:
        """Adds a batch of the tensor, a sample at a time, so that sums do not depend on the batch size; a `Watcher`."""
        # Rounded before samples lie one after another: a range is a sample's own.
        y: torch.Tensor = x if self.quantizer is None else self.quantizer(x)
        if self.of == SUM:
            self._latest[:] = [x, y]
        elif self.of == REST:
            self._add_missing(y, self._rest(tokens), tokens)
        elif self.original is None:
            self._add(y, None, tokens)
        else:
            self._add(y, self.original[tokens].to(y.device) - y.reshape(-1, y.shape[-1]), tokens)

    def see_rest(self, rest: torch.Tensor, tokens: slice) -> None:
        """Keeps the rest of a batch's sum until its tensor is seen; a `Watcher`. A module that is called again reads another one."""
        if self._before is None or self._before[0] != tokens:
            self._before = tokens, rest

    def _rest(self, tokens: slice) -> torch.Tensor:
        """Returns the sum of a batch without the output of the Linear's weight."""
        if self._before is None or self._before[0] != tokens:
            raise ValueError(f"{self.first}: its batch has not passed {self.rest}")
        before = self._before[1]
        return before if self.bias is None else before + self.bias

    def see_sum(self, total: torch.Tensor, tokens: slice) -> None:
        """Adds the same batch of the sum, of which the Linear's output on the input not rounded is a part; a `Watcher`."""
        x, y = self._latest
        if self.quantizer is not None:
            total = total - product((x - y).reshape(-1, x.shape[-1]), self.weight.t()).view(total.shape)
        self._add_missing(y, total, tokens)

    def _add_missing(self, y: torch.Tensor, total: torch.Tensor, tokens: slice) -> None:
        """Adds a batch of the rounded tensor, and what is missing from `total` to the original sum."""
        if self.original is None:
            raise ValueError(f"{self.first}: a sum without the original one")
        original = self.original[tokens].to(total.device)
        missing = original - total.reshape(-1, total.shape[-1])
        if self.relative:
            size = original.float().square().mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
            missing, y = missing * size, y * size.reshape(*y.shape[:-1], 1)
        self._add(y, missing, tokens)

    def _add(self, y: torch.Tensor, error: torch.Tensor | None, tokens: slice) -> None:
        if not y.numel():
            return
        rows_of = y.reshape(-1, y.shape[-1])
        for sample, rows in by_sample(y, slice(tokens.start // self.length, tokens.stop // self.length)):
            # A tensor (tokens, channels) is of many samples: none of it is held out.
            apart = self.held is not None and y.dim() > 2 and self.held(sample)
            part = self.sums[-1 if apart else 0].of(sample)
            part.hessian.update(rows_of[rows])
            if part.error is not None and error is not None:
                part.error.update(error[rows], rows_of[rows])
