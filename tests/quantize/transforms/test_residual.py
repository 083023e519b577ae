"""Folding a rotation of the residual stream: a two-layer network computes in the new basis what it computed in the old one."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import layer_norm, linear, rms_norm

from quantize.transforms.hadamard import hadamard_matrix, hadamard_transform, random_signs
from quantize.transforms.orthogonal import random_orthogonal
from quantize.transforms.residual import center_embedding, center_writer, fold_gain, rotate_reader, rotate_writer

WIDTH = 12


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 20), st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_rotated_block_with_an_rms_norm_gives_the_rotated_stream(seed, offset):
    stream, gain = normal(5, WIDTH, seed=seed), normal(WIDTH, seed=seed + 1)
    reader, writer, bias = (
        normal(20, WIDTH, seed=seed + 2),
        normal(WIDTH, 20, seed=seed + 3),
        normal(WIDTH, seed=seed + 4),
    )
    shift = 1.0 if offset else 0.0
    q = random_orthogonal(WIDTH, seed)
    before = stream + linear(linear(rms_norm(stream, (WIDTH,)) * (gain + shift), reader).relu(), writer, bias)
    folded, none = fold_gain(reader, None, gain, shift)
    assert none is None
    turned, turned_bias = rotate_writer(writer, bias, q)
    rotated = stream @ q
    after = rotated + linear(linear(rms_norm(rotated, (WIDTH,)), rotate_reader(folded, q)).relu(), turned, turned_bias)
    torch.testing.assert_close(after @ q.t(), before)


@given(st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_a_layer_norm_becomes_an_rms_norm_where_writers_and_embeddings_are_centred(seed):
    embedding = normal(7, WIDTH, seed=seed)
    gain, shift = normal(WIDTH, seed=seed + 1), normal(WIDTH, seed=seed + 2)
    reader, reader_bias = normal(9, WIDTH, seed=seed + 3), normal(9, seed=seed + 4)
    writer, writer_bias = normal(WIDTH, 9, seed=seed + 5), normal(WIDTH, seed=seed + 6)
    stream = embedding + linear(normal(7, 9, seed=seed + 7), writer, writer_bias)
    before = linear(layer_norm(stream, (WIDTH,), gain, shift), reader, reader_bias)
    centred, centred_bias = center_writer(writer, writer_bias)
    plain = center_embedding(embedding) + linear(normal(7, 9, seed=seed + 7), centred, centred_bias)
    folded, bias = fold_gain(reader, reader_bias, gain, 0.0, shift)
    torch.testing.assert_close(linear(rms_norm(plain, (WIDTH,), eps=1e-5), folded, bias), before)


def test_a_reader_without_a_bias_takes_a_norms_bias_over_and_none_where_it_is_zero():
    reader, gain, shift = normal(4, WIDTH), torch.ones(WIDTH, dtype=torch.float64), normal(WIDTH, seed=1)
    torch.testing.assert_close(fold_gain(reader, None, gain, 0.0, shift)[1], reader @ shift)
    assert fold_gain(reader, None, gain, 0.0, torch.zeros_like(shift))[1] is None


def test_a_function_turns_as_its_matrix_does_and_a_small_matrix_turns_heads():
    weight, bias, signs = normal(6, WIDTH), normal(6, seed=1), random_signs(WIDTH, 2)
    turn = partial(hadamard_transform, signs=signs)
    torch.testing.assert_close(rotate_reader(weight, turn), rotate_reader(weight, hadamard_matrix(WIDTH, signs)))
    heads = random_orthogonal(3, 0)
    torch.testing.assert_close(rotate_writer(weight, bias, heads)[0], torch.block_diag(heads, heads).t() @ weight)
    torch.testing.assert_close(rotate_writer(weight, bias, heads)[1], bias @ torch.block_diag(heads, heads))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_keep_their_type_and_are_rounded_once(dtype):
    weight, q = normal(5, WIDTH).to(dtype), random_orthogonal(WIDTH, 1)
    turned = rotate_reader(weight, q)
    assert turned.dtype == dtype and torch.equal(turned, (weight.double() @ q).to(dtype))


def test_great_weights_are_turned_some_rows_at_a_time_and_end_as_in_one(monkeypatch):
    weight, gain, q = normal(2 * WIDTH + 3, WIDTH), normal(WIDTH, seed=1), random_orthogonal(WIDTH, 0)
    whole = rotate_reader(weight, q), fold_gain(weight, None, gain)[0], center_embedding(weight)
    monkeypatch.setattr("quantize.transforms.residual.PIECE", 2 * WIDTH)
    widened, double = [], torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda x: widened.append(x.numel()) or double(x))
    parts = rotate_reader(weight, q), fold_gain(weight, None, gain)[0], center_embedding(weight)
    assert max(widened) == 2 * WIDTH
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, expected)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="rotation: shape .* whose width divides 12"):
        rotate_reader(normal(3, WIDTH), torch.eye(5))
    with pytest.raises(ValueError, match=r"gain: shape \(3,\) is not valid: expected \(12,\)"):
        fold_gain(normal(3, WIDTH), None, torch.ones(3))
    with pytest.raises(ValueError, match="norm_bias"):
        fold_gain(normal(3, WIDTH), None, torch.ones(WIDTH), 0.0, torch.ones(3))
