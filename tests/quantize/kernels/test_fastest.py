"""Which of several products is taken: by their least times, whatever else has the machine meanwhile."""

import itertools

import pytest
import torch

from quantize.kernels import fastest
from quantize.kernels.fastest import Fastest


class Clock:
    """Tells the milliseconds that products say they took, in place of the machine's clock."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now / 1e3


class Scripted(Fastest):
    """Products that take what a list says, call by call; the last of it from then on. The first call warms up."""

    def __init__(self, clock, takes):
        super().__init__(list(takes), "products", {})
        self.clock, self.calls = clock, dict.fromkeys(takes, 0)
        self.takes = {name: itertools.chain(times, itertools.repeat(times[-1])) for name, times in takes.items()}

    def _prepare(self, name):
        def multiply(given):
            self.calls[name] += 1
            self.clock.now += next(self.takes[name])
            return given

        return multiply

    def _check(self, results, given):
        pass


@pytest.fixture
def timed(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(fastest, "time", clock)

    def run(**takes):
        products = Scripted(clock, takes)
        products.run(torch.zeros(4, 2), 4)
        return products

    return run


def test_a_kernel_that_something_disturbed_at_first_is_found_nevertheless(timed):
    products = timed(slow=[9, 4], fast=[9, 8, 14, 25, 1])
    assert products.fastest(4) == "fast"


def test_where_the_machine_stays_disturbed_the_timing_ends(timed):
    products = timed(one=[1, *range(2, 2000, 7)], other=[1, *range(3, 3000, 9)])
    assert products.fastest(4) in {"one", "other"}
    assert max(products.calls.values()) < 15


def test_quiet_kernels_are_called_no_more_than_the_least_number_of_times(timed):
    products = timed(one=[5], other=[6])
    assert products.calls == {"one": 1 + fastest.ROUNDS, "other": 1 + fastest.ROUNDS}


def test_short_calls_are_counted_until_there_are_enough(timed):
    products = timed(one=[0.01], other=[0.02])
    assert products.fastest(4) == "one" and products.calls["one"] == 1 + fastest.MOST_ROUNDS


def test_slow_products_are_timed_the_least_number_of_times_whatever_it_takes(timed):
    products = timed(one=[500], other=[400])
    assert products.fastest(4) == "other" and products.calls["one"] == 1 + fastest.ROUNDS


def test_before_each_call_that_is_timed_other_memory_and_a_few_rows_pass_the_caches(monkeypatch):
    clock, few = Clock(), []
    monkeypatch.setattr(fastest, "time", clock)
    products = Scripted(clock, {"hot": [1], "cold": [2]})
    monkeypatch.setattr(products, "_weight_bytes", lambda: 64)
    monkeypatch.setattr(products, "_few_rows", lambda name: lambda given: few.append(name))
    products.run(torch.zeros(4, 2), 4)
    timed = {name: count - 1 for name, count in products.calls.items()}
    assert {name: few.count(name) for name in timed} == timed
