"""The schema: what is refused, with which line."""

import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq.config.building import recipe_from
from ptq.config.checking import named
from ptq.config.schema import Recipe
from ptq.errors import UserError

GOOD = {"name": "x", "model": {"path": "somewhere"}, "scheme": {"weight": {"bits": 4}}, "steps": {"rtn": {}}}


def _with(**changes):
    return {**GOOD, **changes}


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (_with(scheme={"weight": {"bits": 9}}), ["scheme.weight.bits", "9", "nearest: 8"]),
        (_with(scheme={"wieght": {"bits": 8}}), ["scheme.wieght", "did you mean 'weight'"]),
        (_with(scheme={"weight": {"granularity": "chanel"}}), ["scheme.weight.granularity", "'chanel'", "'channel'"]),
        (_with(scheme={"weight": {"granularity": "group"}}), ["scheme.weight.group_size", "64"]),
        (_with(scheme={"weight": {"group_size": 64}}), ["scheme.weight.group_size", "null"]),
        (_with(scheme={"weight": {"dynamic": True}}), ["scheme.weight", "dynamic"]),
        (_with(scheme={"input": {"granularity": "token"}}), ["scheme.input.dynamic", "token"]),
        (_with(scheme={"key": {"granularity": "tensor", "dynamic": True}}), ["scheme.key.granularity"]),
        (_with(scheme={"key": {"granularity": "tensor", "range": "mse"}}), ["scheme.key.range", "minmax"]),
        (_with(scheme={"weight": {"range": "ema"}}), ["scheme.weight.range", "minmax"]),
        (_with(scheme={"input": {"granularity": "cluster", "dynamic": True}}), ["scheme.input.dynamic", "cluster"]),
        (_with(scheme={"attention_probs": {"granularity": "tensor"}}), ["scheme.attention_probs.symmetric", "false"]),
        (_with(evaluation={"windows": "many"}), ["evaluation.windows", "'many'", "whole number"]),
        (_with(evaluation={"windows": 0}), ["evaluation.windows", "1 or more"]),
        (_with(evaluation={"confidence": 2.0}), ["evaluation.confidence"]),
        (_with(data={"calibration": {"source": "wikitex2"}}), ["data.calibration.source", "'wikitext2'"]),
        (_with(data={"evaluation": {"source": "c4"}}), ["data.evaluation.variant", "old"]),
        (_with(data={"evaluation": {"source": "file"}}), ["data.evaluation.path"]),
        (_with(execution={"weights": "ofloaded"}), ["execution.weights", "'offloaded'"]),
        ({"name": "x", "model": {}}, ["model.path", "missing"]),
        (_with(scheme={"overrides": [{"modules": "*", "tensors": {"inputt": None}}]}), ["overrides[0]", "'input'"]),
        (_with(scheme=3), ["scheme", "not a mapping"]),
        (_with(calibration={"seed": 1}), ["calibration.seed: 1 changes nothing", "calibration.sampling=random"]),
        (_with(calibration={"seed": 2**70, "sampling": "random"}), ["calibration.seed", "use 4294967295 or less"]),
        (_with(evaluation={"seed": -1}), ["evaluation.seed", "use 0 or more"]),
        (_with(evaluation={"resamples": 10**9}), ["evaluation.resamples", "use 1000000 or less"]),
        (_with(evaluation={"confidence": 10**400}), ["evaluation.confidence", "floating point"]),
        (_with(data={"evaluation": {"source": "file", "path": "x.txt", "text_column": "body"}}), ["text_column"]),
        (_with(data={"evaluation": {"source": "docs", "mix": [{}]}}), ["data.evaluation.mix", "source=mix"]),
        (_with(data={"evaluation": {"path": "x.txt"}}), ["data.evaluation.path: x.txt changes nothing", "source=file"]),
        (_with(scheme={"weight": {"percentile": 99.0}}), ["scheme.weight.percentile", "range minmax"]),
        (_with(name="../up"), ["name", "letters, digits", "such as up"]),
        (_with(name=".."), ["name"]),
        (_with(name=""), ["name", "such as recipe"]),
        (_with(name="a" * 101), ["name", "1 to 100"]),
        (_with(name="\u00e9t\u00e9"), ["name", "such as t"]),
        (_with(model={"path": "x" * 10_000, "rev": 1}), ["model.rev"]),
        (_with(model={"path": ["x" * 10_000]}), ["model.path", "..."]),
    ],
)
def test_a_mistake_gets_one_line_with_the_field_the_value_and_the_nearest_choice(recipe, words):
    with pytest.raises(UserError) as error:
        recipe_from(recipe)
    line = str(error.value)
    assert "\n" not in line
    assert all(word in line for word in words), line
    assert len(line) < 600


def test_what_a_part_leaves_out_is_as_it_is_where_the_whole_part_is_left_out():
    assert recipe_from(_with()).data.evaluation.split == "test"
    made = recipe_from(_with(data={"evaluation": {"source": "wikitext2"}})).data
    assert (made.evaluation.split, made.calibration.split) == ("test", "train")
    assert recipe_from(_with(data={"evaluation": {"split": "validation"}})).data.evaluation.split == "validation"


def test_the_digest_depends_on_the_experiment_and_not_on_where_files_go():
    base = recipe_from(GOOD)
    assert recipe_from(_with(outputs="elsewhere", store="/tmp/store")).digest() == base.digest()
    assert recipe_from(_with(evaluation={"windows": 3})).digest() != base.digest()


def test_a_resolved_recipe_builds_the_same_recipe_again():
    recipe = recipe_from(
        _with(scheme={"weight": {"bits": 3}, "overrides": [{"modules": "*.fc2", "tensors": {"input": None}}]})
    )
    assert recipe_from(recipe.as_dict()) == recipe


@given(st.text(max_size=130))
def test_every_name_is_refused_with_one_that_is_valid_or_is_a_folder_below_the_outputs(name):
    try:
        recipe_from(_with(name=name))
    except UserError as error:
        recipe_from(_with(name=named(name)))
        assert named(name) in str(error)
    else:
        assert (pathlib.Path("/outputs") / name).resolve().parent == pathlib.Path("/outputs")


@given(
    st.dictionaries(
        st.sampled_from(["name", "model", "scheme", "steps", "evaluation", "data", "zzz"]),
        st.none() | st.integers() | st.text(),
    )
)
def test_any_mapping_is_a_recipe_or_a_user_error(value):
    try:
        assert isinstance(recipe_from(value), Recipe)
    except UserError as error:
        assert "\n" not in str(error)
