"""What stands where a module's code looks for a tensor that holds a matrix of each expert.

The code takes one expert's matrix out of it and multiplies; the stand-in answers that product with whatever it likes: a note
that it happened (`ptq.network.experts.trace`), or a call of that expert's Linears (`ptq.network.experts.linears`). So the
model's own routing, gates and activation functions stay as they are, whoever wrote them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch


class Unsupported(TypeError):
    """The code did something with a stand-in that is neither the product with an expert's matrix nor the sum with its bias."""

    def __init__(self, place: object, what: str):
        super().__init__(f"{place}: {what}")
        self.place = place


class StandIn:
    """Stands for a tensor (experts, a, b), or (a, b), or of biases (experts, out). What the code does with it is
    answered by `product` and `added`.

    Args:
        place: names it, for whoever answers and for messages.
        shape: of the tensor, or of the view of it that the code has taken.
        dtype: of the tensor.
        device: of the tensor.
    """

    def __init__(self, place: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device):
        self.place, self.shape, self._dtype, self._device = place, torch.Size(shape), dtype, device

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Of the tensor."""
        return self._device

    @property
    def ndim(self) -> int:
        """Dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """Dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one of its numbers."""
        return self.shape if dim is None else self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> "StandIn":
        """Returns itself: the numbers have whatever type the Linears have."""
        return self

    type = float = contiguous = to

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "place" not in self.__dict__:
            raise AttributeError(name)
        raise Unsupported(self.place, f"asked for its {name}")

    def product(self, x: torch.Tensor, expert: int | None, flipped: bool) -> torch.Tensor:
        """Returns x (..., in) times the matrix of an expert, with its bias where one is known; None for a matrix of its own.

        `flipped`: the matrix is (in, out), where Linears have (out, in).
        """
        raise Unsupported(self.place, "multiplied")

    def added(self, y: torch.Tensor, expert: int) -> torch.Tensor:
        """Returns a product `y` with the bias of its expert, where `product` has not added that."""
        raise Unsupported(self.place, "added")

    def viewed(self, shape: torch.Size) -> "StandIn":
        """Returns the stand-in for the same numbers in another shape."""
        raise Unsupported(self.place, "viewed in another shape")

    def view(self, *shape: Any) -> "StandIn":
        """Returns the stand-in for the same numbers in another shape."""
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return self.viewed(torch.empty(self.shape, device="meta").view(*sizes).shape)

    reshape = view

    def __getitem__(self, index: Any) -> "Matrix | Vector":
        whole = isinstance(index, int) or (
            isinstance(index, torch.Tensor)
            and index.numel() == 1
            and index.dim() == 0
            and not index.is_floating_point()
        )
        if not whole or index.__class__ is bool:
            raise Unsupported(self.place, f"indexed by {type(index).__name__}")
        expert = int(index)
        if not -len(self) <= expert < len(self):
            raise IndexError(f"{self.place}: {expert} of {len(self)}")
        expert %= len(self)
        if self.ndim == 3:
            return Matrix(self, expert, False)
        if self.ndim == 2:
            return Vector(self, expert)
        raise Unsupported(self.place, "one number of it taken")

    def __iter__(self) -> Iterator["Matrix | Vector"]:
        return (self[i] for i in range(len(self)))

    def __matmul__(self, other: Any) -> Any:
        raise Unsupported(self.place, "multiplied from the left")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _operation(func, args, kwargs or {})


class _Part:
    """One expert's piece of a stand-in."""

    def __init__(self, whole: StandIn, expert: int):
        self.whole, self.expert = whole, expert

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self.whole.dtype

    @property
    def device(self) -> torch.device:
        """Of the tensor."""
        return self.whole.device

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _operation(func, args, kwargs or {})


class Matrix(_Part):
    """The matrix of one expert; `flipped` an odd number of times transposed."""

    def __init__(self, whole: StandIn, expert: int, flipped: bool):
        super().__init__(whole, expert)
        self.flipped = flipped

    @property
    def shape(self) -> torch.Size:
        """Of the matrix as it stands."""
        rows, columns = self.whole.shape[1:]
        return torch.Size((columns, rows) if self.flipped else (rows, columns))

    def t(self) -> "Matrix":
        """Returns the transpose."""
        return Matrix(self.whole, self.expert, not self.flipped)

    @property
    def T(self) -> "Matrix":
        """The transpose."""
        return self.t()

    mT = T

    def transpose(self, first: int, second: int) -> "Matrix":
        """Returns the transpose."""
        return self if first % 2 == second % 2 else self.t()


class Vector(_Part):
    """The bias of one expert."""


def _operation(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Answers an operation of torch, one of whose arguments is a stand-in or a part of one."""
    name = getattr(func, "__name__", "").strip("_")
    if name == "linear":
        return _linear(*args, **kwargs)
    if name in {"matmul", "mm", "bmm"} and len(args) == 2 and isinstance(args[0], torch.Tensor):
        return _matmul(args[0], args[1])
    if name in {"add", "iadd", "radd"} and len(args) == 2 and not kwargs:
        y, bias = args if isinstance(args[1], Vector) else args[::-1]
        if isinstance(bias, Vector) and isinstance(y, torch.Tensor):
            return bias.whole.added(y, bias.expert)
    held = next(a for a in (*args, *kwargs.values()) if isinstance(a, StandIn | _Part))
    raise Unsupported((held.whole if isinstance(held, _Part) else held).place, f"used in {name}")


def _linear(input: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
    if isinstance(weight, Matrix):
        y = weight.whole.product(input, weight.expert, weight.flipped)
    elif isinstance(weight, StandIn) and weight.ndim == 2:
        y = weight.product(input, None, False)
    else:
        raise Unsupported(getattr(bias, "place", getattr(weight, "place", "")), "used in a linear that is no matrix")
    if bias is None:
        return y
    if isinstance(bias, Vector):
        return bias.whole.added(y, bias.expert)
    if isinstance(bias, StandIn):
        raise Unsupported(bias.place, "added whole")
    return y + bias


def _matmul(x: torch.Tensor, other: Any) -> torch.Tensor:
    if isinstance(other, Matrix):
        return other.whole.product(x, other.expert, not other.flipped)
    if isinstance(other, StandIn) and other.ndim == 3 and x.dim() == 3 and len(x) == len(other):
        return torch.stack([other.product(tokens, expert, True) for expert, tokens in enumerate(x)])
    raise Unsupported(getattr(other, "place", ""), "multiplied in a way that is no expert's product")
