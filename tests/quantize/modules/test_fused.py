"""Linears that read one tensor are multiplied as one, with the bits that each has alone; whatever is otherwise takes them apart."""

import copy
import gc
import weakref

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quantize.kernels.choice import Choice
from quantize.modules.packed import PackedLinear
from quantize.modules.shared_input import SharedInput
from quantize.spec.quant_spec import QuantSpec
from tests.quantize.reference import normal

TOKEN = QuantSpec(bits=8, granularity="token", dynamic=True)


class Block(nn.Module):
    """Three Linears that read the same, and one that reads what they give."""

    def __init__(self, weight, inputs, widths=(16, 8, 8), bias=False, columns=32):
        super().__init__()
        made = [
            PackedLinear.from_weight(normal(n, columns, seed=i), normal(n, seed=9) if bias else None, weight, inputs)
            for i, n in enumerate(widths)
        ]
        self.first, self.readers = made[0], nn.ModuleList(made)
        self.last = PackedLinear.from_weight(normal(8, sum(widths)), None, QuantSpec(bits=8), TOKEN)

    def forward(self, x):
        return self.last(torch.cat([reader(x) for reader in self.readers], -1))


def with_kernels(block, kernels="auto", choice=None):
    choice, shared = choice or Choice(kernels), SharedInput()
    for module in block.modules():
        if isinstance(module, PackedLinear):
            module.use_kernels(choice, shared)
    return block


def run(block, *given):
    with torch.no_grad():
        return [block(x) for x in given]


def fused(block):
    return [reader.place is not None for reader in block.readers]


@given(
    st.builds(
        lambda bits, symmetric, size: QuantSpec(
            bits=bits, symmetric=symmetric, granularity="group" if size else "channel", group_size=size
        ),
        st.integers(2, 8), st.booleans(), st.sampled_from([None, 8]),
    ),
    st.builds(
        lambda bits, symmetric: QuantSpec(bits=bits, symmetric=symmetric, granularity="token", dynamic=True),
        st.integers(2, 8), st.booleans(),
    ),
    st.lists(st.integers(1, 9), min_size=2, max_size=4), st.booleans(), st.integers(0, 9),
    st.lists(st.integers(0, 9), min_size=2, max_size=4), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_fused_linears_give_the_bits_that_they_give_alone(weight, inputs, widths, bias, seed, rows, dtype):
    alone = Block(weight, inputs, widths, bias).to(dtype)
    together = with_kernels(copy.deepcopy(alone), "int_mm")
    for module in alone.modules():
        if isinstance(module, PackedLinear):
            module.use_kernels(Choice("int_mm"))
    given_x = [normal(2, n, 32, seed=seed + n).to(dtype) for n in rows]
    for a, b in zip(run(alone, *given_x), run(together, *given_x), strict=True):
        assert torch.equal(a, b)
    assert fused(together) == [True] * len(widths) and not any(fused(alone)) and together.last.place is None


def test_a_group_multiplies_once_for_all():
    calls = []
    block = with_kernels(Block(QuantSpec(bits=8), TOKEN), "int_mm")
    run(block, normal(3, 32), normal(3, 32))
    group = block.first.place[0]
    multiply = group.multiplier.run
    group.multiplier.run = lambda rows, n: calls.append(n) or multiply(rows, n)
    run(block, normal(5, 32), normal(1, 32))
    assert calls == [5, 1]
    assert all(reader._kernel._prepared.keys() <= {"int_mm"} for reader in block.readers)


def test_readers_that_are_called_again_with_nothing_read_in_between_stay_one():
    block = with_kernels(Block(QuantSpec(bits=8), TOKEN), "int_mm")
    with torch.no_grad():
        for seed in range(3):
            x = normal(3, 32, seed=seed)
            found = [reader(x) for reader in block.readers]
    assert fused(block) == [True] * 3
    block.last(torch.cat(found, -1))
    assert fused(block) == [True] * 3


def test_stored_codes_lie_once_in_memory_and_are_saved_as_before(tmp_path):
    block = with_kernels(Block(QuantSpec(bits=8), TOKEN))
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    run(block, normal(3, 32), normal(3, 32))
    storages = {reader.codes.untyped_storage().data_ptr() for reader in block.readers}
    assert len(storages) == 1 and block.first.codes.untyped_storage().nbytes() == 32 * 32
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_another_order_or_a_reader_left_out_takes_them_apart_and_changes_nothing():
    plain = with_kernels(Block(QuantSpec(bits=8), TOKEN))
    x, y = normal(3, 32), normal(4, 32, seed=1)
    wanted = run(plain, x, y, x)
    block = with_kernels(Block(QuantSpec(bits=8), TOKEN))
    run(block, x, y)
    with torch.no_grad():
        single = block.readers[1](y)  # not the first reader
        assert torch.equal(single, plain.readers[1](y))
    assert fused(block) == [False] * 3
    assert all(torch.equal(a, b) for a, b in zip(run(block, x, y, x), wanted, strict=True))
    assert fused(block) == [False] * 3  # for good
    block = with_kernels(Block(QuantSpec(bits=8), TOKEN))
    run(block, x, y)
    with torch.no_grad():
        block.first(x)
        block.first(y)  # the others were not called in between
    assert fused(block) == [False] * 3
    assert all(torch.equal(a, b) for a, b in zip(run(block, x, y, x), wanted, strict=True))


def test_a_tensor_that_changes_between_two_readers_is_read_anew():
    block = with_kernels(Block(QuantSpec(bits=8), TOKEN))
    run(block, normal(3, 32), normal(3, 32))
    x = normal(3, 32, seed=4)
    with torch.no_grad():
        block.readers[0](x)
        x.mul_(-2)
        again = block.readers[1](x)
        alone = Block(QuantSpec(bits=8), TOKEN).readers[1]
        assert torch.equal(again, with_kernels(alone)(x))


def test_a_weight_that_is_loaded_moved_or_set_anew_is_the_one_that_multiplies():
    x, y = normal(3, 32), normal(4, 32, seed=1)
    block, other = (with_kernels(Block(QuantSpec(bits=8), TOKEN)) for _ in range(2))
    for reader in other.readers:
        reader.store(normal(reader.out_features, 32, seed=20))
    run(block, x, y)
    block.load_state_dict(other.state_dict())
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(block, x, y), run(other, x, y), strict=True))
    assert fused(block) == [True] * 3
    block.readers[2].store(normal(8, 32, seed=30))
    other.readers[2].store(normal(8, 32, seed=30))
    assert torch.equal(run(block, y)[0], run(other, y)[0])
    wide = block.double()
    assert torch.equal(run(wide, y.double())[0].float(), run(copy.deepcopy(wide), y.double())[0].float())


def test_gradients_pass_and_a_training_step_fuses_nothing():
    block = with_kernels(Block(QuantSpec(bits=8), TOKEN))
    run(block, normal(3, 32), normal(3, 32))
    x = normal(3, 32).requires_grad_()
    block(x).sum().backward()
    found, x.grad = x.grad.clone(), None
    copy.deepcopy(block)(x).sum().backward()
    assert torch.equal(found, x.grad)


def test_only_linears_of_one_format_are_multiplied_together():
    block = Block(QuantSpec(bits=8), TOKEN)
    block.readers[1] = PackedLinear.from_weight(normal(8, 32, seed=1), None, QuantSpec(bits=4), TOKEN)
    run(with_kernels(block), normal(3, 32), normal(3, 32))
    assert fused(block) == [True, False, True]


def test_what_a_group_holds_is_counted_and_goes_with_the_model():
    block = with_kernels(Block(QuantSpec(bits=4), TOKEN), "int_mm")
    run(block, normal(3, 32), normal(3, 32))
    assert sum(reader.kernel_bytes() for reader in block.readers) == 32 * 32  # codes one a byte
    gone = weakref.ref(block.first)
    enabled = gc.isenabled()
    gc.disable()
    try:
        del block
        assert gone() is None
    finally:
        if enabled:
            gc.enable()
