"""The wheel, unpacked anywhere, does what the checkout does: configs travel in it."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The built wheel, unpacked into a folder outside the checkout."""
    built, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def call(unpacked, folder, *arguments):
    # -P keeps the checkout out when the tests run in it; the unpacked wheel comes before what is installed.
    command = [sys.executable, "-P", "-m", "ptq", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_wheel_holds_the_packages_the_configs_and_the_licence(unpacked):
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    configs = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {f"ptq/_configs/{name}" for name in configs} <= files
    assert {
        "ptq/cli/app.py",
        "ptq/report/page/page.html.j2",
        "ptq/report/page/page.js",
        "ptq/report/page/page.css",
        "quantize/spec/quant_spec.py",
        "group_methods/__init__.py",
        "experiments/__init__.py",
    } <= files
    assert any(name.endswith("licenses/LICENSE") for name in files)
    assert not any(name.startswith(("tests/", "outputs/", "docs/")) for name in files)
    [points] = unpacked.glob("*.dist-info/entry_points.txt")
    assert "ptq = ptq.cli.app:main" in points.read_text()


def test_the_unpacked_wheel_composes_a_recipe_from_another_folder(unpacked, tmp_path):
    done = call(unpacked, tmp_path, "run", "--config", "demo", "--cfg", "job", "evaluation.windows=3")
    assert done.returncode == 0, done.stderr
    composed = yaml.safe_load(done.stdout)
    assert composed["name"] == "demo"
    assert composed["evaluation"]["windows"] == 3
    assert list(tmp_path.iterdir()) == []


def test_the_unpacked_wheel_resolves_groups_for_a_file_of_the_user(unpacked, tmp_path):
    text = "defaults: [{model: opt-125m}, {scheme: w4a16}, {method: rtn}, _self_]\n"
    (tmp_path / "mine.yaml").write_text(text)
    done = call(unpacked, tmp_path, "run", "--config", "mine.yaml", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["path"] == "facebook/opt-125m"


def test_the_unpacked_wheel_finds_the_shapes_that_it_ships(unpacked, tmp_path):
    done = call(unpacked, tmp_path, "footprint", "--config", "chatglm-like")
    assert done.returncode == 0, done.stderr
    assert "ptq/_configs/shapes/chatglm-6b-like, 28 blocks" in done.stdout
