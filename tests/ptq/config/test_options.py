"""What a field says of its values: choices, bounds, and the options that it is read with."""

import dataclasses
from dataclasses import dataclass

import pytest

from ptq.config.building import build
from ptq.config.options import check_fields, in_yaml, option
from ptq.errors import UserError
from ptq.steps.transforms.cluster import Options as ClusterOptions
from ptq.steps.transforms.smooth import Options as SmoothOptions


@dataclass(frozen=True)
class Inner:
    """Inside."""

    count: int = option(1, least=0, most=9)


@dataclass(frozen=True)
class Options:
    """Of a step that searches or takes what it is given."""

    search: bool = False
    strength: float = option(0.5, only_with={"search": (False,)})
    tries: tuple[int, ...] = option((1, 2), least=1, only_with={"search": (True,)})
    kinds: tuple[str, ...] | None = option(None, choices=("norm", "down"))
    inner: Inner = option(default_factory=Inner)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"search": True, "strength": 0.7}, "steps.mine.strength: 0.7 changes nothing beside steps.mine.search=true: "),
        ({"tries": [3]}, "steps.mine.tries: [3] changes nothing beside steps.mine.search=false"),
        ({"search": True, "tries": [3, 0]}, "steps.mine.tries: 0 is too small: use 1 or more"),
        (
            {"kinds": ["nrom"]},
            "steps.mine.kinds: 'nrom' is not valid: expected one of norm, down; did you mean 'norm'?",
        ),
        ({"inner": {"count": 10}}, "steps.mine.inner.count: 10 is too great: use 9 or less"),
    ],
)
def test_a_value_that_cannot_be_or_changes_nothing_is_refused_by_name(values, said):
    with pytest.raises(UserError) as error:
        build(Options, values, "steps.mine")
    assert said in str(error.value)


def test_what_is_read_passes_and_so_does_a_default_that_is_written_out():
    for values in ({}, {"search": True, "tries": [5]}, {"strength": 0.9}, {"kinds": ["norm", "down"]}):
        built = build(Options, values, "steps.mine")
        again = build(Options, dataclasses.asdict(built), "steps.mine")  # as a run's recipe.yaml has it
        assert again == built
        check_fields(built, "steps.mine")


def test_shipped_steps_refuse_what_they_would_not_read():
    for schema, values, name in (
        (SmoothOptions, {"search": True, "alpha": 0.7}, "alpha"),
        (SmoothOptions, {"candidates": [0.1]}, "candidates"),
        (ClusterOptions, {"method": "max_min_kmeans", "features": ["max"]}, "features"),
    ):
        with pytest.raises(UserError, match=f"{name}.*changes nothing"):
            build(schema, values, "steps.x")


def test_plain_values_are_spelt_as_in_yaml():
    given = {None: "null", True: "true", "text": "text", 0.5: "0.5", (1, None): "[1, null]"}
    assert {value: in_yaml(value) for value in given} == given
    assert in_yaml(Inner()) == "{count: 1}"
