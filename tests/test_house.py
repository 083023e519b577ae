"""The house holds: imports only go down, Hydra stays at the edge, modules stay small, public things are described."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BELOW = {
    "quantize": set(),
    "group_methods": set(),
    "ptq": {"quantize", "group_methods"},
    "experiments": {"ptq", "quantize", "group_methods"},
    "main": {"ptq", "quantize", "group_methods", "experiments"},
    "gen_act_stat": {"ptq", "quantize", "group_methods", "experiments"},
}
FLOORS = (
    "cli", "allocation", "bench", "sweep", "run", "integrations", "footprint", "export", "inspect", "report", "steps", "evaluation", "calibration",
    "network", "models", "data", "ranks", "files", "config", "errors",
)  # fmt: skip
"""The folders of ptq from the edge down: each imports those after it only."""
MOST_MODULES = 13
ALLOWED_BESIDE = {
    "quantize": {"torch", "gemlite", "onnx", "onnxruntime"},
    "group_methods": {"torch", "sklearn", "threadpoolctl", "numpy"},
}
"""gemlite, onnx and onnxruntime: optional kernels, imported when they first multiply."""
MOST_LINES = 449


def modules():
    for top in BELOW:
        yield from sorted((ROOT / top).rglob("*.py")) if (ROOT / top).is_dir() else [ROOT / f"{top}.py"]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path):
    """Top-level names that a module imports, wherever in it."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            own = path.relative_to(ROOT).parts[0]
            yield own if node.level else (node.module or "").split(".")[0]


def inside(path):
    """The folders of ptq that a module imports from, however it spells that."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("ptq."))


every_module = pytest.mark.parametrize("path", list(modules()), ids=name_of)


@every_module
def test_imports_only_go_down(path):
    top = path.relative_to(ROOT).parts[0].removesuffix(".py")
    up = {name for name in imports(path) if name in BELOW and name != top} - BELOW[top]
    assert up == set()


def test_inside_ptq_imports_only_go_down():
    up = set()
    for path in (ROOT / "ptq").rglob("*.py"):
        own = path.relative_to(ROOT / "ptq").parts[0].removesuffix(".py")
        for there in inside(path):
            if own in FLOORS and there in FLOORS and FLOORS.index(there) < FLOORS.index(own):
                up.add(f"{name_of(path)} imports ptq.{there}")
    assert up == set()


def test_every_folder_of_ptq_has_its_floor_and_is_of_a_size_to_be_looked_over():
    folders = {path.parent for top in ("ptq", "quantize", "group_methods") for path in (ROOT / top).rglob("*.py")}
    assert {f.name for f in folders if f.parent == ROOT / "ptq"} <= set(FLOORS)
    crowded = {name_of(f): n for f in folders if (n := len(list(f.glob("*.py")))) > MOST_MODULES}
    assert crowded == {}


def test_every_file_that_the_documentation_names_is_there():
    named = re.compile(r"`((?:ptq|quantize|group_methods|experiments|tests|docs|configs)/[\w/.*-]+)`")
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    gone = [(page.name, name) for page in pages for name in named.findall(page.read_text("utf-8"))]
    assert [each for each in gone if not any(True for _ in ROOT.glob(each[1].rstrip("/")))] == []


@every_module
def test_hydra_stays_at_the_edge(path):
    found = {"hydra", "omegaconf"} & set(imports(path))
    assert not found or name_of(path).startswith("ptq/cli/")


@every_module
def test_a_module_stays_small_and_finished(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MOST_LINES
    unfinished = [word for word in ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error") if word in text]
    assert unfinished == []


@every_module
def test_modules_and_their_public_things_have_a_docstring(path):
    tree = tree_of(path)
    kinds = (ast.FunctionDef, ast.ClassDef)
    bare = [n.name for n in tree.body if isinstance(n, kinds) and n.name[0] != "_" and not ast.get_docstring(n)]
    assert bare == []
    assert ast.get_docstring(tree)


@every_module
def test_no_assert_validates_and_no_pickle_is_read(path):
    nodes = list(ast.walk(tree_of(path)))
    assert not [n.lineno for n in nodes if isinstance(n, ast.Assert)]
    assert "pickle" not in set(imports(path))


@pytest.mark.parametrize("package", sorted(ALLOWED_BESIDE))
def test_the_ground_floor_uses_its_tools_only(package):
    import sys

    used = {name for path in (ROOT / package).rglob("*.py") for name in imports(path)}
    assert used - set(sys.stdlib_module_names) - {package} <= ALLOWED_BESIDE[package]
