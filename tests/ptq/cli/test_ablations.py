"""Shipped ablations compose, whole, on the recipe that they are made for; what is typed comes before what they say."""

import pytest

from ptq.cli import catalog
from ptq.cli.app import main
from ptq.cli.compose.hydra_edge import compose_points
from ptq.cli.sweeps.ablations import ablation_named, ablations
from ptq.errors import UserError
from ptq.run.planning import check_steps
from ptq.steps._registry import build_steps


def test_the_promised_ablations_are_shipped():
    promised = {
        "smooth_alpha",
        "clusters",
        "bits_group",
        "calibration_size",
        "calibration_text",
        "ranges",
        "methods",
        "rotations",
    }
    assert promised <= set(ablations())
    assert all(ablations().values())
    assert "ablation" not in catalog.groups()


@pytest.mark.parametrize("name", list(ablations()))
def test_every_point_of_a_shipped_ablation_composes_with_steps_that_fit(name):
    found = ablation_named(name)
    points = compose_points(catalog.locate(found.recipe), list(found.overrides), found.zipped)
    assert len(points) >= 3
    assert [point.refused for point in points] == [""] * len(points)
    for point in points:
        check_steps(point.recipe.scheme, build_steps(point.recipe.steps))
    assert len({point.recipe.digest() for point in points}) == len(points)


def test_what_is_typed_replaces_what_the_ablation_says(tmp_path, capsys):
    arguments = ["run", "--ablation", "smooth_alpha", "--launcher", "here", "--dry-run", f"outputs={tmp_path}"]
    assert main([*arguments, "steps.smooth.alpha=0.3,0.4"]) == 0
    out = capsys.readouterr().out
    assert "2 points, 0 refused" in out and "point 2 steps.smooth.alpha=0.4: ok" in out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "--ablation: 'smoth_alpha' is neither a shipped ablation nor a file; did you mean 'smooth_alpha'?"),
        ("overrides: a=1,2", "overrides: expected a list"),
        ("[1]", "expected recipe, overrides"),
        ("{recipe: demo, override: []}", "expected recipe, overrides"),
        ("{", "not valid YAML"),
    ],
)
def test_what_is_no_ablation_is_one_line(tmp_path, content, said):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        ablation_named("smoth_alpha" if content is None else str(path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
