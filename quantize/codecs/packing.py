"""Codes of 2 to 8 bits really packed: one rule for every width, along the last dimension."""

import torch

LANE = 8
"""Codes packed together: eight codes of b bits fill exactly b bytes."""


def packed_length(count: int, bits: int) -> int:
    """Returns the bytes that `count` codes of `bits` take: the last byte may have unused bits."""
    return -(-count * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes (..., n) into bytes, uint8 (..., ceil(n * bits / 8)).

    The rule: the last dimension is a stream of bits in which code i takes bits ``i * bits`` to ``(i + 1) * bits - 1``, least
    significant first, and byte k holds bits ``8 k`` to ``8 k + 7``. So 4-bit codes lie two in a byte, the earlier one in the
    low half; 2-bit codes four in a byte, the earliest lowest. Signed codes are written in two's complement. Unused bits at
    the end are 0.

    Args:
        codes: int8 or uint8; a code outside the width loses its upper bits.
        bits: 2 to 8.

    Raises:
        ValueError: for another width, or codes that are not 8-bit integers.
    """
    _check(bits)
    if codes.dtype not in {torch.int8, torch.uint8}:
        raise ValueError(f"codes: {codes.dtype} is not int8 or uint8")
    if bits == 8:
        return codes.contiguous().view(torch.uint8)
    count = codes.shape[-1]
    codes = torch.nn.functional.pad(codes, (0, -count % LANE)).unflatten(-1, (-1, LANE))
    words = torch.zeros(codes.shape[:-1], dtype=torch.int64, device=codes.device)
    for lane in range(LANE):
        words |= (codes[..., lane].long() & (2**bits - 1)) << (lane * bits)
    parts = [((words >> (8 * k)) & 255).to(torch.uint8) for k in range(bits)]
    return torch.stack(parts, dim=-1).flatten(-2)[..., : packed_length(count, bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, count: int, signed: bool = False) -> torch.Tensor:
    """Returns the `count` codes of each row of `packed` (..., bytes): uint8 (..., count), or int8 when `signed`.

    Raises:
        ValueError: for a width other than 2 to 8, or another number of bytes than `count` codes take.
    """
    _check(bits)
    if packed.shape[-1] != packed_length(count, bits):
        raise ValueError(f"packed: {packed.shape[-1]} bytes a row, and {count} codes take {packed_length(count, bits)}")
    if bits == 8:
        return packed.view(torch.int8) if signed else packed
    packed = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    words = torch.zeros(packed.shape[:-1], dtype=torch.int64, device=packed.device)
    for k in range(bits):
        words |= packed[..., k].long() << (8 * k)
    parts = [((words >> (lane * bits)) & (2**bits - 1)).to(torch.uint8) for lane in range(LANE)]
    codes = torch.stack(parts, dim=-1).flatten(-2)[..., :count].contiguous()
    if not signed:
        return codes
    sign = 2 ** (bits - 1)
    return (codes ^ sign).to(torch.int8) - sign


def unpack_at(packed: torch.Tensor, bits: int, places: torch.Tensor) -> torch.Tensor:
    """Returns the codes at these places of one packed row (bytes,), uint8 in the shape of `places`; the rest is not unpacked.

    Args:
        packed: uint8, as `pack` gives it.
        bits: 2 to 8.
        places: of codes, int64, any shape.
    """
    _check(bits)
    first = places * bits
    byte, shift = first // 8, first % 8
    # A code lies in two bytes at most; the last one has no byte after it, and needs none.
    after = (byte + 1).clamp_(max=len(packed) - 1)
    words = packed[byte].long() | (packed[after].long() << 8)
    return ((words >> shift) & (2**bits - 1)).to(torch.uint8)


def _check(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: {bits} is not a width of a code: use 2 to 8")
