"""What a search of alpha measures: the error that rounding leaves, on evenly spaced tokens and outputs that stand for all."""

import pytest
import torch

from ptq.calibration.statistics import ChannelStatistics
from ptq.steps.transforms.smooth import Trial
from quantize.codecs.registry import codec_of
from quantize.modules.simulated import InputQuantizer
from quantize.spec.quant_spec import QuantSpec

TOKEN = QuantSpec(bits=8, granularity="token", dynamic=True)
CASES = {
    "weights and inputs by rows": (QuantSpec(bits=4), TOKEN),
    "weights of one range": (QuantSpec(bits=4, granularity="tensor"), TOKEN),
    "inputs of one range": (QuantSpec(bits=4), QuantSpec(bits=8, granularity="tensor", dynamic=True)),
    "static inputs": (QuantSpec(bits=8), QuantSpec(bits=8, granularity="tensor", symmetric=False)),
    "a format of blocks": (QuantSpec(bits=4, format="nvfp4", granularity="group", group_size=16), None),
    "inputs alone": (None, TOKEN),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("tokens", "outputs"), [(1000, 1000), (16, 12)])
def test_a_trial_measures_what_rounding_all_leaves_at_the_tokens_and_outputs_that_it_looks_at(case, tokens, outputs):
    weight, inputs = CASES[case]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 32, generator=generator) * torch.linspace(0.2, 9, 60)[:, None]
    readers = [torch.randn(out, 32, generator=generator) * torch.linspace(0.1, 2, out)[:, None] for out in (24, 8)]
    scale = torch.rand(32, generator=generator) + 0.5
    seen = ChannelStatistics.empty(32)
    seen.update(rows)
    found = Trial.of(rows, readers, weight, inputs, seen, tokens, outputs).error(scale)
    ranges = seen.divided(scale)
    x = rows / scale
    if inputs is not None:
        x = InputQuantizer(inputs, None if inputs.dynamic else (ranges.min, ranges.max))(x)
    # 60 tokens for 16: every third; 32 rows for 12: every second.
    each, every = (1, 1) if tokens > 60 else (3, 2)
    total = 0.0
    for reader in readers:
        rounded = reader * scale if weight is None else codec_of(weight).fake_weight(reader * scale, weight)
        left = rows.double() @ reader.double().t() - x.double() @ rounded.double().t()
        total += float(left[::each, ::every].square().sum())
    assert found == pytest.approx(total, rel=1e-4)
