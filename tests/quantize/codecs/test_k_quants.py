"""K-quants: what llama.cpp's own library reads, bounded error, a weighing that is listened to, levels for solvers."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.export.packing.k_blocks import TYPES, k_blocks
from quantize.codecs.k_quants.codec import FORMS
from quantize.codecs.k_quants.fitting import fitted
from quantize.codecs.registry import codec_of
from quantize.solvers.clip import nearest_clipped
from quantize.solvers.gptq import GptqOptions, solve_format
from quantize.spec.quant_spec import spec_of
from tests.quantize.reference import normal

NAMES = sorted(FORMS)


@given(
    st.sampled_from(NAMES), st.integers(1, 3), st.integers(1, 3), st.integers(0, 50), st.sampled_from([1e-2, 1.0, 300.0]),
    st.sampled_from([0.0, 1.0, -3.0]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_ggufs_own_library_reads_the_blocks_as_what_the_codec_decodes(name, rows, superblocks, seed, size, shift):
    spec, codec = spec_of(name), codec_of(spec_of(name))
    w = (normal(rows, 256 * superblocks, seed=seed) + shift) * size
    w[0, :32] = size * shift
    stored = codec.encode(w, spec)
    read = gguf.dequantize(k_blocks(stored, spec), gguf.GGMLQuantizationType[TYPES[name]])
    decoded = codec.decode(stored, spec, w.shape)
    assert np.array_equal(read.reshape(w.shape), decoded.numpy())
    # A step of the widest range of a superblock, which a scale of 6 bits may miss by a 63rd.
    worst = (w.amax() - w.amin()).clamp_min(w.abs().amax()) * 2 / (2**spec.bits - 1)
    assert float((decoded - w).abs().max()) <= float(worst) * 1.5


@pytest.mark.parametrize("name", NAMES)
def test_more_bits_lose_less_and_none_lose_much(name):
    w = normal(32, 512)
    spec = spec_of(name)
    loss = float((codec_of(spec).fake(w, spec) - w).square().mean() / w.square().mean())
    assert loss < {"q4_k": 7e-3, "q5_k": 1.8e-3, "q6_k": 5e-4}[name]


@pytest.mark.parametrize("name", NAMES)
def test_columns_that_weigh_more_lose_less(name):
    w, spec = normal(64, 256), spec_of(name)
    weighing = torch.where(torch.arange(256) % 4 == 0, 100.0, 1.0)
    heavy = weighing > 1
    plain, form = codec_of(spec).fake(w, spec), codec_of(spec).form
    assert fitted(w, form, weighing).scale.shape == fitted(w, form).scale.shape
    weighed = codec_of(spec).decode(nearest_clipped(w, spec, weighing, None), spec, w.shape)
    assert (weighed - w)[:, heavy].square().sum() < (plain - w)[:, heavy].square().sum()


@pytest.mark.parametrize("name", NAMES)
def test_gptq_finds_codes_of_less_loss_than_nearest(name):
    w, x = normal(24, 256, seed=1), normal(1024, 256, seed=2)
    x = x + 0.7 * x[:, :1]
    spec, hessian = spec_of(name), x.t() @ x / len(x)
    solution = solve_format(w, hessian, spec, GptqOptions())
    found = codec_of(spec).decode(solution.stored, spec, w.shape)
    nearest = codec_of(spec).fake(w, spec)
    loss = [float(((other - w) @ hessian * (other - w)).sum()) for other in (found, nearest)]
    assert loss[0] < 0.8 * loss[1]


@pytest.mark.parametrize("name", NAMES)
def test_constant_and_zero_blocks_are_kept(name):
    spec = spec_of(name)
    w = torch.cat([torch.zeros(1, 256), torch.full((1, 256), 0.5), torch.full((1, 256), -0.5)])
    torch.testing.assert_close(codec_of(spec).fake(w, spec), w, rtol=2e-2, atol=1e-6)
