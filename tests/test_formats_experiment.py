"""experiments/formats.py: its figures are those of theory where theory has one."""

import math

import torch

from experiments.formats import DB_PER_BIT, ROWS, OutlierShare, cost, table
from quantize.spec.quant_spec import QuantSpec


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_no_format_is_above_the_rate_distortion_bound_of_a_gaussian():
    weights = [normal(128, 256)]
    for label, spec in ROWS.items():
        figures = cost(weights, spec)
        assert 0 < figures.sqnr_db < DB_PER_BIT * figures.bits, label


def test_the_error_of_a_uniform_grid_is_its_step_squared_over_twelve():
    weight = torch.rand(64, 4096, generator=torch.Generator().manual_seed(0)) * 2 - 1
    step = 1 / 127
    expected = 10 * math.log10(float(weight.double().square().mean()) / (step**2 / 12))
    assert abs(cost([weight], QuantSpec()).sqnr_db - expected) < 0.05


def test_the_table_has_a_row_for_every_format_with_its_bits():
    lines = table([normal(64, 128), normal(32, 256)])
    assert len(lines) == 2 + len(ROWS)
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert any(line.startswith("| NF4, double quantization | 4.127 |") for line in lines)


def test_outlier_columns_are_counted_over_linears():
    class Block:
        def __init__(self):
            self.linears = {"a": torch.nn.Linear(4, 2), "b": torch.nn.Linear(6, 2)}

    counter, block = OutlierShare(6.0), Block()
    counter.enter(block)
    block.linears["a"](torch.tensor([[0.0, 7.0, -6.0, 5.0]]))
    block.linears["b"](torch.zeros(3, 6))
    counter.leave(block)
    block.linears["a"](torch.full((1, 4), 100.0))
    assert (counter.columns, counter.total) == (2, 10)
