"""Packed codes: the stated rule, byte by byte, and the way back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.codecs.packing import pack, packed_length, unpack, unpack_at

WIDTHS = st.integers(2, 8)


@given(WIDTHS, st.booleans(), st.integers(0, 3), st.integers(0, 41), st.integers(0, 2**32))
def test_codes_come_back_from_their_bytes(bits, signed, rows, count, seed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    codes = torch.randint(low, high, (rows, count), generator=torch.Generator().manual_seed(seed))
    codes = codes.to(torch.int8 if signed else torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_length(count, bits))
    back = unpack(packed, bits, count, signed)
    assert back.dtype == codes.dtype
    assert torch.equal(back, codes)


@given(WIDTHS, st.lists(st.integers(0, 255), max_size=40))
def test_the_bytes_are_a_stream_of_bits_least_significant_first(bits, values):
    codes = np.array(values, dtype=np.uint8) & (2**bits - 1)
    stream = np.unpackbits(codes[:, None], axis=1, bitorder="little")[:, :bits].reshape(-1)
    expected = np.packbits(stream, bitorder="little")
    assert pack(torch.from_numpy(codes), bits).tolist() == expected.tolist()


def test_the_earlier_of_two_codes_lies_in_the_low_half_and_memory_falls():
    assert pack(torch.tensor([1, 15, 2], dtype=torch.uint8), 4).tolist() == [0xF1, 0x02]
    assert pack(torch.tensor([3, 0, 1, 2], dtype=torch.uint8), 2).tolist() == [0b10010011]
    weight = torch.zeros(64, 128, dtype=torch.int8)
    assert [pack(weight, bits).nbytes for bits in (2, 4, 8)] == [2048, 4096, 8192]


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="^bits: 9 is not a width of a code: use 2 to 8$"):
        pack(torch.zeros(4, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="^codes: torch.float32 is not int8 or uint8$"):
        pack(torch.zeros(4), 4)
    with pytest.raises(ValueError, match="^packed: 3 bytes a row, and 4 codes take 2$"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, 4)


@given(WIDTHS, st.integers(1, 41), st.data())
def test_codes_at_some_places_are_those_of_the_whole_row(bits, count, data):
    places = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, count - 1), min_size=2, max_size=2), min_size=1)))
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(count)).to(torch.uint8)
    assert torch.equal(unpack_at(pack(codes, bits), bits, places), codes[places])
