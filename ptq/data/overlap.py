"""Whether calibration and evaluation share text: runs of equal tokens, found by their hashes at every offset."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ptq.data.sampling import Tokens
from ptq.errors import UserError

RUN_TOKENS = 64
RUN_CHARACTERS = 256
"""Equal runs of as many tokens, which hold as many characters, are copies: WikiText-2's validation and test parts share none of 24
tokens, and documents that quote one another share far longer ones. Tokens of a byte each need more of them."""
LEAST_TOKENS = 16
"""Shorter runs recur by chance: windows without one are not compared."""
_PROBED = 4096
_MULTIPLIER = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Overlap:
    """What evaluation windows share with calibration samples.

    Attributes:
        run: length in tokens of the runs that were compared; 0 where the windows are too short to be.
        windows: number of evaluation windows that hold such a run of a calibration sample.
        tokens: number of evaluation tokens that lie in such runs.
        first: the first of these windows, and a sample that it shares a run with; None without any.
        copied: whether it is a copy, and no chance.
    """

    run: int
    windows: int
    tokens: int
    first: tuple[int, int] | None
    copied: bool


def overlap_of(tokenizer: Any, calibration: Tokens, evaluation: Tokens) -> Overlap:
    """Returns what the windows of `evaluation` share with those of `calibration`, however they are shifted.

    A run has 64 tokens, more where tokens have less than four characters: one of them is a copy. Of windows that are shorter than
    two such runs it has half a window's, which any shift of copied windows leaves in one piece; as these recur by chance now and
    then, they are a copy where they hold a quarter of the evaluation's tokens, or of the samples'. What begins a window (BOS) is no
    part of the text.
    """
    ours, theirs = (t.text_ids.numpy().astype(np.uint64) for t in (calibration, evaluation))
    whole = max(RUN_TOKENS, math.ceil(RUN_CHARACTERS / _characters(tokenizer, evaluation.text_ids)))
    shortest = min(ours.shape[1], theirs.shape[1])
    run = min(whole, max(LEAST_TOKENS, shortest // 2))
    if run > shortest:
        return Overlap(0, 0, 0, None, False)
    seen, windows = _hashes(ours, run), _hashes(theirs, run)
    shared = np.isin(windows, seen)
    if not shared.any():
        return Overlap(run, 0, 0, None, False)
    held = int(_covered(shared, run).sum())
    window = int(shared.any(axis=1).argmax())
    sample = int((seen == windows[window, shared[window].argmax()]).any(axis=1).argmax())
    calibrated = int(_covered(np.isin(seen, windows), run).sum())
    copied = run == whole or 4 * held >= theirs.size or 4 * calibrated >= ours.size
    return Overlap(run, int(shared.any(axis=1).sum()), held, (window, sample), copied)


def check_overlap(overlap: Overlap, calibration: Tokens, evaluation: Tokens) -> None:
    """Raises `UserError` where evaluation windows hold copies of calibration samples."""
    if not overlap.copied or overlap.first is None:
        return
    window, sample = overlap.first
    raise UserError(
        f"data: {overlap.windows} of {len(evaluation.ids)} evaluation windows ({evaluation.source}) hold {overlap.tokens} tokens "
        f"that are calibrated on ({calibration.source}; window {window} and sample {sample} share {overlap.run} or more): "
        "calibrate on another text, or use data.allow_overlap=true, and the result says so"
    )


def _characters(tokenizer: Any, ids: torch.Tensor) -> float:
    """Returns the mean number of characters of a token."""
    probed = ids.flatten()[:_PROBED].tolist()
    return max(1.0, len(tokenizer.decode(probed)) / len(probed))


def _hashes(ids: npt.NDArray[np.uint64], run: int) -> npt.NDArray[np.uint64]:
    """Returns the hash of every run of tokens in ids (windows, length): (windows, length - run + 1).

    Polynomials modulo 2^64 with an odd base, whose powers have inverses: the sums from one token to another give those of all runs.
    """
    base, length = _MULTIPLIER, ids.shape[1]
    powers = _powers(base, length)
    inverses = _powers(pow(base, -1, 1 << 64), length)
    mixed = (ids + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(31)
    sums = np.zeros((len(ids), length + 1), np.uint64)
    np.cumsum(mixed * powers, axis=1, out=sums[:, 1:])
    hashes: npt.NDArray[np.uint64] = (sums[:, run:] - sums[:, :-run]) * inverses[: length - run + 1]
    return hashes


def _powers(base: int, count: int) -> npt.NDArray[np.uint64]:
    """Returns base^0 ... base^(count - 1) modulo 2^64."""
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    powers: npt.NDArray[np.uint64] = np.cumprod(factors, dtype=np.uint64)
    return powers


def _covered(starts: npt.NDArray[np.bool_], run: int) -> npt.NDArray[np.bool_]:
    """Returns which tokens lie in a run that starts at one of `starts` (windows, length - run + 1): (windows, length)."""
    windows, places = starts.shape
    edges = np.zeros((windows, places + run), np.int64)
    edges[:, :places] += starts
    edges[:, run:] -= starts
    covered: npt.NDArray[np.bool_] = np.cumsum(edges, axis=1)[:, :-1] > 0
    return covered
