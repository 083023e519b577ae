"""Fast orthogonal Hadamard transforms of any width (QuaRot, Ashkboos et al. 2024, section 3): whole, block-wise, randomised.

The matrix is H = H_2^k x H_m1 x H_m2 ... / sqrt(n) (Kronecker products): rows times H spread an outlier over all channels, no
entry of H being greater than 1 / sqrt(n). Powers of two are in Sylvester's (natural) order.
"""

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from quantize.kernels.matmul import product
from quantize.transforms.hadamard_orders import hadamard_of_order, is_constructible

PASS = 64
"""What one more pass over x costs, in multiplications per value (measured: `python -m experiments.bench.hadamard`)."""


@dataclass(frozen=True)
class Factorisation:
    """How a width is composed: ``width = 2^power * order``.

    Attributes:
        width: number of channels.
        power: of two: the Sylvester factor's.
        orders: of the other factors, left to right.
        kind: ``hadamard``, or ``hartley`` where the other factor is the odd part's Hartley matrix, for want of a Hadamard one.
    """

    width: int
    power: int
    orders: tuple[int, ...]
    kind: str

    @property
    def order(self) -> int:
        """Product of `orders`."""
        return math.prod(self.orders)

    @property
    def bound(self) -> float:
        """Least known b with |H_ij| <= b, so that max|x H| <= b sum|x|: 1 / sqrt(width), or sqrt(2 / width) for ``hartley``."""
        return math.sqrt((2 if self.kind == "hartley" else 1) / self.width)

    def describe(self) -> str:
        """Returns one sentence that says what is used."""
        factors = " x ".join([f"2^{self.power}"] * (self.power > 0 or not self.orders) + [str(m) for m in self.orders])
        if self.kind == "hadamard":
            return f"width {self.width} = {factors}: a Hadamard matrix, no entry above 1/sqrt({self.width})"
        return (
            f"width {self.width} = {factors}: no Hadamard matrix is known here; the factor {self.order} is the orthogonal "
            f"Hartley matrix, no entry above sqrt(2/{self.width})"
        )


@cache
def factorise(width: int) -> Factorisation:
    """Returns the factors of least total size that `width` splits into.

    Where the odd part has no Hadamard order, its factor is the Hartley matrix (cos + sin) / sqrt(m): orthogonal at every order,
    the same bits from no seed, and flatter than a random orthogonal matrix, whose greatest entry has no such bound.

    Raises:
        ValueError: for a width below 1.
    """
    if width < 1:
        raise ValueError(f"width: {width} is not valid: expected 1 or more channels")
    power = (width & -width).bit_length() - 1
    odd = width >> power
    orders = _split(odd, power)
    if orders is None:
        return Factorisation(width, power, (odd,), "hartley")
    used = (math.prod(orders) // odd).bit_length() - 1
    return Factorisation(width, power - used, orders, "hadamard")


def _split(odd: int, power: int) -> tuple[int, ...] | None:
    """Returns constructible orders, product odd * 2^j with j <= power, of least sum; None when there are none."""
    if odd == 1:
        return ()
    best: tuple[int, ...] | None = None
    for divisor in range(3, odd + 1, 2):
        if odd % divisor:
            continue
        twos = next((j for j in range(2, power + 1) if is_constructible(divisor << j)), None)
        rest = None if twos is None else _split(odd // divisor, power - twos)
        if twos is not None and rest is not None:
            orders = tuple(sorted((divisor << twos, *rest)))
            best = orders if best is None else min(best, orders, key=lambda some: (sum(some), some))
    return best


def random_signs(width: int, seed: int) -> torch.Tensor:
    """Returns `width` random signs, ±1 in float32, on the CPU: a seed gives the same ones for every device."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return (torch.randint(0, 2, (width,), generator=generator, device="cpu") * 2 - 1).float()


def hadamard_transform(
    x: torch.Tensor, signs: torch.Tensor | None = None, block: int | None = None, inverse: bool = False
) -> torch.Tensor:
    """Returns x Q with Q = diag(signs) H, or x Q^T with `inverse`: (..., width) in the type of `x`.

    Differentiable. Computed in float32, in float64 for float64.

    Args:
        x: floating point (..., width).
        signs: ±1 (width,), as of `random_signs`; None for a plain H.
        block: transform blocks of so many consecutive channels, each on its own (the signs are still the width's); None: all.
        inverse: undo it.

    Raises:
        ValueError: for a type that is not floating point, signs of another shape, or a block that does not divide the width.
    """
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(f"x: {x.dtype} of shape {tuple(x.shape)} is not valid: expected floating point (..., width)")
    width = x.shape[-1]
    size = _block(width, block)
    y = x if x.dtype == torch.float64 else x.float()
    if signs is not None:
        if signs.shape != (width,):
            raise ValueError(f"signs: shape {tuple(signs.shape)} is not valid: expected ({width},)")
        signs = signs.to(y)
        y = y if inverse else y * signs
    right = 1
    for matrix in reversed(_matrices(size, y.dtype, y.device)):
        m = len(matrix)
        if inverse:
            matrix = matrix.t()
        one = right == 1
        y = product(y.reshape(-1, m), matrix) if one else torch.matmul(matrix.t(), y.reshape(-1, m, right))
        right *= m
    y = y.reshape(x.shape)
    if signs is not None and inverse:
        y = y * signs
    return y.to(x.dtype)


def hadamard_matrix(
    width: int,
    signs: torch.Tensor | None = None,
    block: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Returns Q (width, width) of `hadamard_transform`: x Q is the transform, Q^T its inverse.

    Raises:
        ValueError: as `hadamard_transform`.
    """
    size = _block(width, block)
    found = factorise(size)
    matrix = hadamard_of_order(1 << found.power).double()
    for order in found.orders:
        matrix = torch.kron(matrix, _factor(order, found.kind))
    matrix = torch.block_diag(*[matrix / math.sqrt(size)] * (width // size))
    if signs is not None:
        if signs.shape != (width,):
            raise ValueError(f"signs: shape {tuple(signs.shape)} is not valid: expected ({width},)")
        matrix = signs.to(matrix)[:, None] * matrix
    return matrix.to(device, dtype)


def _block(width: int, block: int | None) -> int:
    if block is None:
        return width
    if block < 1 or width % block:
        near = [d for d in range(1, width + 1) if width % d == 0]
        close = min(near, key=lambda d: abs(d - block))
        raise ValueError(f"block: {block} is not valid: expected a divisor of the width {width}, such as {close}")
    return block


def _factor(order: int, kind: str) -> torch.Tensor:
    """Returns sqrt(order) times the orthogonal factor, float64."""
    if kind == "hadamard":
        return hadamard_of_order(order).double()
    index = torch.arange(order, device="cpu")
    angle = (index[:, None] * index % order).double() * (2 * math.pi / order)
    return torch.cos(angle) + torch.sin(angle)


def stages(found: Factorisation) -> tuple[int, ...]:
    """Returns the sizes of the matrices that `hadamard_transform` multiplies by in turn, left to right.

    Powers of two are gathered into few factors of like size, some into the first of `orders`: products of 16 to 64 cost
    hardly more than a pass over memory, butterflies of 2 cost a pass each.
    """

    def cost(sizes: tuple[int, ...]) -> int:
        return sum(sizes) + PASS * len(sizes)

    best: tuple[int, ...] | None = None
    for absorbed in range(found.power + 1 if found.orders else 1):
        rest = found.power - absorbed
        for parts in range(1 if rest else 0, rest + 1):
            small, more = divmod(rest, parts) if parts else (0, 0)
            twos = (1 << small,) * (parts - more) + (1 << (small + 1),) * more
            orders = (found.orders[0] << absorbed, *found.orders[1:]) if found.orders else ()
            sizes = twos + orders or (1,)
            best = sizes if best is None or cost(sizes) < cost(best) else best
    return best or (1,)


@lru_cache(maxsize=64)
def _matrices(width: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Returns the orthogonal factors of `stages`."""
    found = factorise(width)
    result = []
    # What is kept may meet gradients later, wherever it was made first.
    with torch.inference_mode(False), torch.no_grad():
        count = len(stages(found)) - len(found.orders)
        for i, size in enumerate(stages(found)):
            if i < count:
                matrix = hadamard_of_order(size).double()
            else:
                order = found.orders[i - count]
                matrix = torch.kron(hadamard_of_order(size // order).double(), _factor(order, found.kind))
            result.append((matrix / math.sqrt(size)).to(device, dtype))
    return tuple(result)
