"""Gradients of parts add up to those of the whole, with the same bits whatever the number of ranks."""

import pytest
import torch
from torch import nn

from ptq.ranks.gradient_sum import PARTS, part_of, sum_gradients
from ptq.ranks.world import ALONE
from tests.tools.ranks import in_world, run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


def parameters_and_samples(count):
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(5, 5, generator=generator)) for _ in range(3)]
    return weights, torch.randn(count, 7, 5, generator=generator)


def loss(weights, x, reached=2):
    for weight in weights[:reached]:
        x = torch.tanh(x @ weight)
    return x.square().sum()


def summed(world, count):
    """Returns the gradients after `sum_gradients`, and which parts this rank has done. The last part alone reaches the last weight."""
    weights, x = parameters_and_samples(count)
    done = []

    def backward(part):
        done.append(part)
        loss(weights, x[part], 3 if part == count - 1 else 2).backward()

    sum_gradients(world, weights, range(count), backward)
    return [w.grad for w in weights], done


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_parts_add_up_to_the_gradient_of_the_whole(count):
    found, done = summed(ALONE, count)
    weights, x = parameters_and_samples(count)
    (sum(loss(weights, x[part]) for part in range(count - 1)) + loss(weights, x[count - 1], 3)).backward()
    assert done == list(range(count))
    for gradient, weight in zip(found, weights, strict=True):
        torch.testing.assert_close(gradient, weight.grad)


@pytest.mark.parametrize(("count", "ranks"), [(4, 2), (4, 4), (1, 3), (3, 3)])
def test_ranks_share_the_parts_and_all_have_the_bits_of_one(tmp_path, count, ranks):
    expected, _ = summed(ALONE, count)

    def work(world):
        found, done = summed(world, count)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        print(*done)

    ended = run_ranks(ranks, in_world(work), tmp_path)
    assert [e.status for e in ended] == [0] * ranks, ended
    assert " ".join(e.text.strip() for e in ended).split() == [str(part) for part in range(count)]


def test_what_no_part_reaches_has_no_gradient():
    weights, x = parameters_and_samples(2)
    sum_gradients(ALONE, weights, range(2), lambda part: loss(weights, x[part]).backward())
    assert weights[2].grad is None and weights[0].grad is not None


@pytest.mark.parametrize(("batch", "part"), [(1, 1), (2, 1), (4, 1), (8, 2), (6, 2), (5, 5), (32, 8)])
def test_parts_divide_a_batch_evenly_into_a_few(batch, part):
    assert part_of(batch) == part and batch % part == 0 and batch // part <= PARTS
