"""Statistics: any split and order, against numpy in float64; files that fit, and files that do not."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq.calibration.statistics import ChannelStatistics, Provenance, Statistics, WeightStatistics
from ptq.calibration.statistics_visitor import StatisticsVisitor
from ptq.errors import UserError
from ptq.models.weights import ResidentWeights
from ptq.network.block_stream import BlockStream
from ptq.network.network import build_network, weight_of
from ptq.report.channel_ranges import outlier_ratios
from ptq.testing import random_tiny


def _data(rows, channels, seed, mean=0.0):
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed)) + mean


def _of(parts, channels):
    statistics = ChannelStatistics.empty(channels)
    for part in parts:
        statistics.update(part)
    return statistics


@given(st.integers(2, 700), st.integers(0, 1000), st.lists(st.integers(1, 90), max_size=6), st.booleans())
def test_any_split_and_order_gives_the_statistics_of_the_whole(rows, seed, cuts, backwards):
    x = _data(rows, 5, seed, mean=3.0)
    bounds = sorted({min(c, rows) for c in np.cumsum([0, *cuts])} | {rows})
    parts = [x[a:b] for a, b in itertools.pairwise(bounds)]
    whole, split = _of([x], 5), _of(parts[::-1] if backwards else parts, 5)
    assert split.count == whole.count == rows
    assert torch.equal(split.min, whole.min) and torch.equal(split.max, whole.max)
    torch.testing.assert_close(split.mean, whole.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(split.std, whole.std, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 100))
def test_two_halves_merged_are_the_whole(first, second, seed):
    x = _data(first + second, 4, seed)
    whole, merged, other = _of([x], 4), _of([x[:first]], 4), _of([x[first:]], 4)
    merged.merge(other)
    assert merged.count == whole.count and torch.equal(merged.absmax, whole.absmax)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged.std, whole.std, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 600), st.integers(0, 100), st.lists(st.floats(0.01, 100), min_size=5, max_size=5))
def test_divided_statistics_are_those_of_the_divided_tokens(rows, seed, divisors):
    x, scale = _data(rows, 5, seed, mean=2.0), torch.tensor(divisors)
    found, expected = _of([x], 5).divided(scale), _of([x / scale], 5)
    assert found.count == rows
    torch.testing.assert_close(found.min, expected.min)
    torch.testing.assert_close(found.max, expected.max)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.std, expected.std, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 1.0, 1000.0])
def test_figures_equal_numpy_in_float64_even_far_from_zero(mean):
    x = _data(5000, 16, 7, mean).view(5, 1000, 16)
    s = _of([x], 16)
    reference = x.view(-1, 16).numpy().astype(np.float64)
    np.testing.assert_allclose(s.mean.numpy(), reference.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(s.std.numpy(), reference.std(0), rtol=1e-5)
    np.testing.assert_array_equal(s.min.numpy(), reference.min(0))
    np.testing.assert_array_equal(s.max.numpy(), reference.max(0))


def test_weight_statistics_equal_numpy():
    w = _data(7, 9, 1)
    s, n = WeightStatistics.of(w), w.numpy().astype(np.float64)
    np.testing.assert_allclose(s.in_std.numpy(), n.std(0), rtol=1e-5)
    np.testing.assert_allclose(s.out_std.numpy(), n.std(1), rtol=1e-5)
    assert torch.equal(s.in_min, w.amin(0)) and torch.equal(s.out_max, w.amax(1))


def _collect(model, ids, batch_size=2):
    network = build_network(model)
    stream = BlockStream(network, ResidentWeights(), torch.device("cpu"))
    visitor = StatisticsVisitor()
    stream.run([stream.open(ids, batch_size)], visitor)
    provenance = Provenance("m", None, "w" * 64, "d" * 64, "docs/train", len(ids), ids.shape[1], "fp32", "0")
    return network, visitor.result(provenance)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "mixtral"])
def test_every_linear_and_conv1d_is_measured_on_its_own_input(architecture, ids):
    model = random_tiny(architecture)
    seen = {}
    network = build_network(model)
    measured = {name: module for block in network.blocks for name, module in block.readers.items()}
    for name, module in measured.items():
        module.register_forward_pre_hook(lambda m, a, name=name: seen.setdefault(name, []).append(a[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    expected = {name: torch.cat(parts) for name, parts in seen.items()}
    _, statistics = _collect(model, ids)
    assert statistics.inputs.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(statistics.inputs[name].max, x.amax(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.inputs[name].std.float(), x.std(0, correction=0), rtol=1e-3, atol=1e-5)
        assert len(statistics.weights[name].in_min) == x.shape[1]


def test_a_saved_file_comes_back_the_same(tmp_path, ids):
    network, statistics = _collect(random_tiny("llama"), ids)
    path = tmp_path / "s.safetensors"
    statistics.save(path)
    loaded = Statistics.load(path)
    assert loaded.provenance == statistics.provenance and loaded.inputs.keys() == statistics.inputs.keys()
    for name, s in statistics.inputs.items():
        assert torch.equal(loaded.inputs[name].m2, s.m2) and loaded.inputs[name].count == s.count
    loaded.check_fits("w" * 64, {n: tuple(weight_of(m).shape) for n, m in network.linears.items()})


def test_files_that_are_missing_cut_short_or_foreign_get_one_line(tmp_path, ids):
    _, statistics = _collect(random_tiny("llama"), ids)
    path = tmp_path / "s.safetensors"
    statistics.save(path)
    whole = path.read_bytes()
    for content, reason in ((whole[: len(whole) // 2], "cut short"), (whole[:5], "cut short"), (b"", "cut short")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=reason):
            Statistics.load(path)
    with pytest.raises(UserError, match="is not there"):
        Statistics.load(tmp_path / "none")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="holds no statistics"):
        Statistics.load(path)


def test_statistics_of_other_weights_or_shapes_are_refused_with_the_reason(ids):
    network, statistics = _collect(random_tiny("llama"), ids)
    shapes = {n: tuple(weight_of(m).shape) for n, m in network.linears.items()}
    with pytest.raises(UserError, match="other weights"):
        statistics.check_fits("x" * 64, shapes)
    with pytest.raises(UserError, match="has no nowhere"):
        statistics.check_fits("w" * 64, {"nowhere": (1, 1)})
    with pytest.raises(UserError, match="channels"):
        statistics.check_fits("w" * 64, {name: (rows, columns + 1) for name, (rows, columns) in shapes.items()})


def test_halves_of_the_samples_merge_into_the_whole_and_other_models_are_refused(ids):
    model = random_tiny("llama")
    whole, first, second = (_collect(model, part)[1] for part in (ids, ids[:2], ids[2:]))
    merged = first.merge(second)
    assert merged.provenance.samples == 4
    for name, s in whole.inputs.items():
        torch.testing.assert_close(merged.inputs[name].std, s.std, rtol=1e-5, atol=1e-7)
        assert torch.equal(merged.inputs[name].min, s.min)
    with pytest.raises(UserError, match="cannot be merged"):
        first.merge(_collect(random_tiny("opt"), ids)[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite_is_reported_with_the_modules_name(bad, ids):
    model = random_tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = bad
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj: its input holds NaN or inf"):
        _collect(model, ids)


def test_the_most_outlying_channel_comes_first(ids):
    model = random_tiny("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 500
    _, statistics = _collect(model, ids)
    name, ratio, channel = outlier_ratios(statistics)[0]
    assert "layers.0.self_attn" in name and channel == 3 and ratio > 50


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_far_apart_in_16_bits_have_finite_figures_those_of_float32(dtype):
    x = torch.tensor([[40000.0, 1.0], [-40000.0, 1.1], [1.0, 0.9]]).to(dtype)
    found, expected = _of([x], 2), _of([x.float()], 2)
    assert bool(found.is_finite())
    for field in ("min", "max", "mean", "m2"):
        assert torch.equal(getattr(found, field), getattr(expected, field))
    np.testing.assert_allclose(found.mean.numpy(), x.double().mean(0).numpy(), atol=4e-3)


@given(st.integers(1, 9), st.integers(1, 700), st.integers(0, 100), st.integers(1, 9))
def test_figures_are_the_same_bits_however_many_samples_come_at_once(samples, length, seed, batch):
    x = _data(samples * length, 6, seed, mean=2.0).view(samples, length, 6)
    whole, split = _of([x], 6), _of(x.split(batch), 6)
    assert all(torch.equal(getattr(whole, f), getattr(split, f)) for f in ("min", "max", "mean", "m2"))


def test_threads_do_not_change_a_bit_of_the_figures():
    x, found = _data(3 * 1500, 257, 3, mean=1.0).view(3, 1500, 257), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(_of([x], 257))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.mean, found[0].mean) and torch.equal(other.m2, found[0].m2)


def _with_a_spare_linear():
    model = random_tiny("llama")
    model.model.layers[0].mlp.spare = torch.nn.Linear(32, 16, bias=False).requires_grad_(False)
    return model, "model.layers.0.mlp.spare"


def test_a_linear_that_no_token_reaches_is_named_and_has_its_weights_statistics_only(tmp_path, ids):
    model, name = _with_a_spare_linear()
    network, statistics = _collect(model, ids)
    assert statistics.unreached == [name] and name in statistics.weights
    statistics.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert loaded.unreached == [name] and loaded.inputs.keys() == statistics.inputs.keys()
    loaded.check_fits("w" * 64, network.shapes)
    other = _collect(model, ids[:2])[1]
    other.inputs[name] = ChannelStatistics.empty(32)
    other.inputs[name].update(torch.ones(2, 32))
    assert statistics.merge(other).inputs[name].count == other.merge(statistics).inputs[name].count == 2


LINEAR = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(f"{LINEAR}/input/mean"), "up_proj lacks figures"),
        (lambda t: t.pop(f"{LINEAR}/weight/in_std"), "up_proj lacks figures"),
        (lambda t: t.update({"other/input/none": torch.zeros(1)}), "other lacks figures"),
        (lambda t: t.update({f"{LINEAR}/input/extra": torch.zeros(1)}), "extra' is no figure"),
        (lambda t: t.update(odd=torch.zeros(1)), "odd lacks figures"),
        (lambda t: t[f"{LINEAR}/input/m2"].neg_(), "spread below 0"),
        (lambda t: t[f"{LINEAR}/input/mean"].fill_(torch.nan), "NaN or inf"),
        (lambda t: t[f"{LINEAR}/weight/out_std"].fill_(torch.inf), "NaN or inf"),
        (lambda t: t.update({f"{LINEAR}/input/min": torch.zeros(3)}), "another shape"),
        (lambda t: t.update({f"{LINEAR}/input/min": torch.zeros(32, dtype=torch.float64)}), "shape or type"),
        (lambda t: t.update({f"{LINEAR}/input/count": torch.tensor(-4)}), "counts no tokens"),
        (lambda t: t.update({f"{LINEAR}/input/count": torch.tensor(1.5)}), "counts no tokens"),
        (
            lambda t: t.update(
                {f"{LINEAR}/input/min": t[f"{LINEAR}/input/max"], f"{LINEAR}/input/max": t[f"{LINEAR}/input/min"]}
            ),
            "least value above",
        ),
        (
            lambda t: t.update(
                {f"{LINEAR}/input/mean": t[f"{LINEAR}/input/m2"], f"{LINEAR}/input/m2": t[f"{LINEAR}/input/m2"] * 0}
            ),
            "mean outside",
        ),
    ],
)
def test_a_file_whose_figures_cannot_be_is_refused_with_one_line(tmp_path, ids, change, reason):
    from safetensors.torch import load_file, save_file

    _, statistics = _collect(random_tiny("llama"), ids)
    path = tmp_path / "s.safetensors"
    statistics.save(path)
    metadata = {"kind": "ptq-statistics/1", "provenance": json.dumps(dataclasses.asdict(statistics.provenance))}
    tensors = load_file(path)
    change(tensors)
    save_file({key: value.clone() for key, value in tensors.items()}, path, metadata=metadata)
    with pytest.raises(UserError, match=rf"^calibration\.statistics: .* is damaged \(.*{reason}") as error:
        Statistics.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("provenance", ["", "[]", "3", "{", '{"model": "m"}', "[" * 100_000, '{"model": 3}'])
def test_a_file_with_another_provenance_is_refused_with_one_line(tmp_path, ids, provenance):
    from safetensors.torch import save_file

    path = tmp_path / "s.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"kind": "ptq-statistics/1", "provenance": provenance})
    with pytest.raises(UserError, match="is damaged .its provenance is not what"):
        Statistics.load(path)
