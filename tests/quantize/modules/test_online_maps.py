"""Online maps: the inverse in the weights undoes what acts on the input, and a description builds the module again."""

import pytest
import torch

from quantize.modules.online import OnlineShared, attach_input, carry_online, folded_inputs, online_bytes
from quantize.modules.online_maps import OnlineBlocks, OnlineKronecker


def make(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind is OnlineBlocks:
        return OnlineBlocks(torch.eye(8) + 0.2 * torch.randn(3, 8, 8, generator=generator))
    left, right = (torch.eye(n) + 0.2 * torch.randn(n, n, generator=generator) for n in (4, 6))
    return OnlineKronecker(left, right, 1 + torch.rand(24, generator=generator))


@pytest.mark.parametrize("kind", [OnlineBlocks, OnlineKronecker])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_weight_behind_a_map_gives_what_the_plain_one_gave(kind, dtype):
    made = make(kind)
    x, weight = torch.randn(5, 7, 24).to(dtype), torch.randn(10, 24, dtype=torch.float64)
    mapped = made(x)
    assert mapped.dtype == dtype and not torch.allclose(mapped, x)
    expected = x.double() @ weight.t()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 0.03}[dtype] * expected.abs().max()
    assert torch.allclose(mapped.double() @ made.inverse_weight(weight).t(), expected, atol=float(tolerance))


@pytest.mark.parametrize("kind", [OnlineBlocks, OnlineKronecker])
def test_a_description_and_the_tensors_build_the_map_again(kind):
    made, x = make(kind), torch.randn(3, 24)
    again = kind.from_description(made.description())
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(x), made(x))
    # What acts is what 16 bits hold, so that the bits that are counted are the bits that are needed.
    assert all(torch.equal(t, t.half().float()) for t in made.state_dict().values())


def test_a_map_that_linears_share_counts_once_and_a_seed_counts_nothing():
    shared, linears = OnlineShared(make(OnlineKronecker)), [torch.nn.Linear(24, 4) for _ in range(3)]
    for linear in linears[:2]:
        attach_input(linear, shared)
    assert online_bytes(linears) == 2 * (16 + 36 + 24)


def test_what_cannot_be_undone_or_stored_is_refused():
    with pytest.raises(ValueError, match="expected invertible"):
        OnlineBlocks(torch.ones(1, 4, 4)).inverse_weight(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"matrices: shape \(2, 4, 3\)"):
        OnlineBlocks(torch.ones(2, 4, 3))
    with pytest.raises(ValueError, match="left: holds NaN or inf, or numbers beyond 16-bit floats"):
        OnlineKronecker(torch.eye(2) * 1e9, torch.eye(2), torch.ones(4))
    with pytest.raises(ValueError, match="diagonal: holds a 0 in 16 bits"):
        OnlineKronecker(torch.eye(2), torch.eye(2), torch.tensor([1.0, 1.0, 1e-30, 1.0]))


@pytest.mark.parametrize("kind", [OnlineBlocks, OnlineKronecker])
def test_a_folded_map_is_the_same_product_and_is_unfolded_again(kind):
    made, linear, x = make(kind), torch.nn.Linear(24, 10), torch.randn(5, 24)
    attach_input(linear, OnlineShared(made))
    weight, expected, calls = linear.weight, linear(x).detach(), []
    made.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), folded_inputs([linear]):
        torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-5)
    assert not calls and linear.weight is weight
    with torch.no_grad():
        assert torch.equal(linear(x), expected) and calls


def test_batches_that_take_turns_are_each_mapped_once_for_all_linears_and_nothing_stays():
    made, calls = make(OnlineBlocks), []
    made.register_forward_hook(lambda *_: calls.append(1))
    shared, linears = OnlineShared(made), [torch.nn.Linear(24, 4) for _ in range(3)]
    for linear in linears:
        attach_input(linear, shared)
    one, other = torch.randn(5, 24), torch.randn(5, 24)
    with torch.no_grad():
        for linear in linears:
            for x in (one, other):
                linear(x)
        assert len(calls) == 2 and not shared._kept
        # A Linear in another's place is no reader more.
        new = torch.nn.Linear(24, 4)
        carry_online(linears[0], new)
        assert shared.readers == 3
        new(one)
        one += 1
        assert torch.equal(shared(one), made(one))
        del one
        assert not shared._kept
