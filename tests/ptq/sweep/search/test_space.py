"""Search spaces: what is read, what is refused, how many points there are, and Pareto fronts against a plain definition."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq.errors import UserError
from ptq.sweep.search.definition import SearchOptions, search_options
from ptq.sweep.search.front import front
from ptq.sweep.search.space import Choices, Range, as_plain, combinations, space_from, text_of
from ptq.sweep.status import Status
from ptq.sweep.table import FIGURES, Row


def row(number, kind="done", **figures):
    bits = figures.pop("model_bits", None)
    return Row(number, Status(kind), {}, {**dict.fromkeys(FIGURES), **figures}, bits, "")


def test_choices_and_ranges_are_read_and_written_as_the_same_space():
    plain = {
        "scheme.weight.bits": [2, 3, 4],
        "steps.smooth.alpha": {"low": 0, "high": 1.0, "step": 0.25},
        "calibration.samples": {"low": 4, "high": 128, "log": True},
        "steps.smooth.search": [True, False],
    }
    space = space_from(plain, "here")
    assert space["scheme.weight.bits"] == Choices(("2", "3", "4"))
    assert space["steps.smooth.search"] == Choices(("true", "false"))
    assert space["calibration.samples"] == Range(4, 128, 1, True, True)
    assert not space["steps.smooth.alpha"].whole
    assert space_from(as_plain(space), "again") == space
    assert combinations(space) == 3 * 5 * 125 * 2
    assert combinations(space_from({"a": {"low": 0.0, "high": 1.0}}, "x")) is None


@given(st.floats(-1e6, 1e6, allow_nan=False))
def test_a_number_is_typed_with_six_digits_and_reads_as_itself(value):
    assert float(text_of(value)) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        (4, "x: 4 is neither a list of choices nor a range"),
        ("many", "x: many is neither a list of choices nor a range"),
        ([], "is neither a list of choices nor a range"),
        ({"low": 1}, "is neither a list of choices nor a range"),
        ([3, 3], "one choice is nothing to search"),
        ({"low": "a", "high": 3}, "x: low: a is not a number"),
        ({"low": 1, "high": True}, "x: high: true is not a number"),
        ({"low": 0.1, "high": math.inf}, "x: high: inf is not a number"),
        ({"low": 3, "high": 1}, "low 3 is not below high 1"),
        ({"low": 1, "high": 3, "step": 5}, "step: 5 does not go from 1 to 3"),
        ({"low": 0, "high": 3, "log": True}, "log: needs low above 0"),
        ({"low": 1, "high": 3, "log": "yes"}, "log: yes is not true or false"),
        ({"low": 1, "high": 3, "stpe": 1}, "stpe: no such key of a range; did you mean 'step'?"),
    ],
)
def test_what_is_neither_numbers_nor_choices_is_one_line(axis, said):
    with pytest.raises(UserError) as error:
        space_from({"x": axis}, "mine.yaml")
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("plain", [None, {}, [1], "bits"])
def test_an_empty_space_is_one_line(plain):
    with pytest.raises(UserError, match="space: expected options with their choices"):
        space_from(plain, "mine.yaml")


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"sampler": "tpee"}, "search.sampler: 'tpee' is not valid: expected one of tpe, .*did you mean 'tpe'"),
        ({"samplr": "tpe"}, "search.samplr: no such key .*did you mean 'sampler'"),
        ({"objectives": ["ratoi"]}, "search.objectives: 'ratoi' is no figure of a row; did you mean 'ratio'"),
        ({"objectives": ["ratio", "ratio"]}, "expected one, or two different ones"),
        ({"objectives": ["ratio", "kl_mean", "bytes"]}, "expected one, or two different ones"),
        ({"prune": 1}, "search.prune: 1 is too small: use 2 or more"),
        ({"prune": 4, "objectives": ["kl_mean"]}, "search.prune: 4, but a few windows do not tell of kl_mean"),
        ({"prune": 4, "objectives": ["ratio", "kl_mean"]}, "do not tell of ratio, kl_mean"),
        ({"confidence": 1.5}, "search.confidence: 1.5 is not between 0 and 1"),
    ],
)
def test_options_that_no_search_can_have_are_one_line(plain, said):
    with pytest.raises(UserError, match=said):
        search_options(plain)


def test_options_of_searches_have_defaults():
    assert search_options({}) == SearchOptions("tpe", 0, ("ratio", "model_bits"), None, 0.95)


places = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25)


@given(places)
def test_a_front_holds_exactly_the_values_that_none_is_as_good_as_and_better_in_one(values):
    rows = [row(i, ratio=float(a), model_bits=float(b)) for i, (a, b) in enumerate(values, 1)]
    found = [(r.figure("ratio"), r.figure("model_bits")) for r in front(rows, ["ratio", "model_bits"])]
    expected = {(a, b) for a, b in values if not any((c, d) != (a, b) and c <= a and d <= b for c, d in values)}
    assert len(found) == len(expected) and set(found) == expected
    assert found == sorted(found)


def test_points_without_figures_are_on_no_front_and_agreement_is_the_better_the_greater():
    rows = [row(1, top1_agreement=0.5), row(2, top1_agreement=0.9), row(3), row(4, "pruned", top1_agreement=1.0)]
    assert [r.number for r in front(rows, ["top1_agreement"])] == [2]
    assert front([row(1, ratio=math.nan)], ["ratio"]) == []


def test_shipped_searches_are_read():
    from ptq.cli.sweeps.search_commands import search_named, searches

    assert {"bits", "smoothing"} <= set(searches()) and all(searches().values())
    for name in searches():
        found = search_named(name)
        assert search_options(found.options) and (combinations(found.space) or math.inf) > 9
    with pytest.raises(
        UserError, match="--search: 'bitz' is neither a shipped search nor a file; did you mean 'bits'?"
    ):
        search_named("bitz")
