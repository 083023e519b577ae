"""Hadamard matrices by construction: Sylvester's doubling, Paley's two from finite fields (1933), Williamson's array (1944).

A Hadamard matrix of order n has entries ±1 and H H^T = n I. Nothing is stored but 12 short rows for three orders that neither
of Paley's constructions reaches; Kronecker products of what is here give the rest (`quantize.transforms.hadamard`).
"""

from functools import cache

import torch

WILLIAMSON: dict[int, tuple[tuple[int, ...], ...]] = {
    23: ((1, 2, 4, 6), (1, 2, 5, 7, 9), (3, 4, 5, 8, 9), (1, 2, 4, 5, 9, 10, 11)),
    29: ((1, 2, 4, 7, 8, 9), (1, 3, 6, 7, 8, 10, 11), (3, 6, 11, 12, 13), (1, 3, 5, 6, 7, 8, 11, 14)),
    43: (
        (1, 2, 3, 6, 7, 12, 14, 18, 21),
        (2, 3, 4, 9, 11, 12, 14, 15, 18, 19, 20, 21),
        (3, 5, 8, 9, 11, 13, 18, 20, 21),
        (2, 9, 10, 11, 12, 14, 16, 17, 20),
    ),
}
"""For orders 92, 116 and 172: of four symmetric circulants of order p whose squares sum to 4 p I, the offsets 1 .. p / 2 of -1.

Found by a search over symmetric rows whose periodic autocorrelations sum to 0; the tests prove them.
"""


def hadamard_of_order(order: int) -> torch.Tensor:
    """Returns a Hadamard matrix (order, order), entries ±1, int8, on the CPU.

    Powers of two by Sylvester (natural order, as scipy's), others by Paley I, Paley II or Williamson.

    Raises:
        ValueError: when none of these gives the order.
    """
    if order >= 1 and order & (order - 1) == 0:
        return _sylvester(order)
    if not is_constructible(order):
        raise ValueError(
            f"order: {order} is not valid: expected a power of two, or a multiple of 4 that Paley's or Williamson's construction gives, such as 12, 20 or 28"
        )
    if _prime_power(order - 1) and (order - 1) % 4 == 3:
        return _paley_one(order - 1)
    if _prime_power(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return _paley_two(order // 2 - 1)
    return _williamson(order // 4)


def is_constructible(order: int) -> bool:
    """Returns whether Paley I (q + 1, q = 3 mod 4), Paley II (2 (q + 1), q = 1 mod 4; q a prime power) or Williamson give `order`."""
    if order < 4 or order % 4:
        return False
    one, two = order - 1, order // 2 - 1
    return bool(_prime_power(one) or (two % 4 == 1 and _prime_power(two)) or order // 4 in WILLIAMSON)


def _sylvester(order: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _prime_power(q: int) -> tuple[int, int] | None:
    """Returns (p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def _paley_one(q: int) -> torch.Tensor:
    """I + S with the skew conference matrix S of order q + 1."""
    matrix = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    matrix[1:, 0] = -1
    matrix[1:, 1:] = _jacobsthal(q) + torch.eye(q, dtype=torch.int8, device="cpu")
    return matrix


def _paley_two(q: int) -> torch.Tensor:
    """C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]] with the symmetric conference matrix C of order q + 1."""
    conference = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(q)
    first = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")
    second = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8, device="cpu")
    identity = torch.eye(q + 1, dtype=torch.int8, device="cpu")
    return torch.kron(conference, first) + torch.kron(identity, second)


def _williamson(p: int) -> torch.Tensor:
    blocks = []
    offsets = torch.arange(p, device="cpu")
    for negative in WILLIAMSON[p]:
        row = torch.ones(p, dtype=torch.int8, device="cpu")
        row[list(negative)] = -1
        row[[p - offset for offset in negative]] = -1
        blocks.append(row[(offsets[:, None] - offsets) % p])
    a, b, c, d = blocks
    rows = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, 1) for row in rows])


def _jacobsthal(q: int) -> torch.Tensor:
    """Returns chi(a - b) for all elements a, b of the field of q elements: 1 for squares, -1 for others, 0 for 0; int8 (q, q)."""
    p, k = _prime_power(q) or (0, 0)
    chi = torch.full((q,), -1, dtype=torch.int8, device="cpu")
    chi[0] = 0
    for power, element in enumerate(_powers(p, k)):
        if power % 2 == 0:
            chi[element] = 1
    # An element is a number whose digits to the base p are its coefficients: fields subtract digit by digit.
    elements = torch.arange(q, device="cpu")
    difference = torch.zeros(q, q, dtype=torch.int64, device="cpu")
    for weight in (p**i for i in range(k)):
        digit = elements // weight % p
        difference += (digit[:, None] - digit) % p * weight
    return chi[difference]


@cache
def _powers(p: int, k: int) -> tuple[int, ...]:
    """Returns g^0, g^1, ... g^(p^k - 2) of a generator g of the multiplicative group of the field of p^k elements."""
    q = p**k
    # Prime fields: g a number. Else g = x, modulo a monic polynomial of degree k: candidates until x has the full order.
    for candidate in range(1, q):
        powers: dict[int, None] = {1: None}
        element = 1
        while len(powers) < q - 1:
            element = element * candidate % p if k == 1 else _times_x(element, candidate, p, k)
            if element == 0 or element in powers:
                break
            powers[element] = None
        if len(powers) == q - 1:
            return tuple(powers)
    raise ValueError(f"q: {q} is not valid: expected a prime power")


def _times_x(element: int, polynomial: int, p: int, k: int) -> int:
    """Returns x times `element`, with x^k = -(the polynomial's lower coefficients); digits to the base p are coefficients."""
    top = element // p ** (k - 1)
    shifted = element % p ** (k - 1) * p
    result = 0
    for i in range(k):
        weight = p**i
        result += (shifted // weight % p - top * (polynomial // weight % p)) % p * weight
    return result
