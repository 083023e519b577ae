"""What computes a result is part of its key: a changed source is another digest, and nothing else is."""

import importlib
import json
import shutil
import sys
import time

import pytest

from ptq.errors import UserError
from ptq.files.source_digest import module_digest, package_digest


@pytest.fixture
def fresh():
    """Digests as a new process would take them, before and after."""

    def clear():
        package_digest.cache_clear()
        module_digest.cache_clear()

    clear()
    yield clear
    clear()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The framework's own package of grids, by another name and free to be changed."""
    source = importlib.import_module("quantize.grid").__path__[0]
    shutil.copytree(source, tmp_path / "copied")
    (tmp_path / "copied" / "inner").mkdir()
    (tmp_path / "copied" / "inner" / "deep.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "copied"
    for name in [name for name in sys.modules if name.split(".")[0] == "copied"]:
        del sys.modules[name]


def test_the_digest_of_packages_changes_with_every_source_and_with_nothing_else(package, fresh):
    before = package_digest("copied")
    (package / "notes.txt").write_text("changed")
    (package / "__pycache__").mkdir(exist_ok=True)
    (package / "__pycache__" / "x.py").write_text("")
    fresh()
    assert package_digest("copied") == before
    seen = {before}
    for name in ("affine.py", "__init__.py", "inner/deep.py"):
        path = package / name
        path.write_text(path.read_text() + "# changed\n")
        fresh()
        seen.add(package_digest("copied"))
    (package / "affine.py").rename(package / "affin.py")
    fresh()
    seen.add(package_digest("copied"))
    assert len(seen) == 5


def test_the_frameworks_digest_covers_its_three_packages_and_is_quick(fresh):
    start = time.perf_counter()
    whole = package_digest()
    assert time.perf_counter() - start < 1
    assert whole == package_digest("ptq", "quantize", "group_methods") != package_digest("ptq")
    assert module_digest(importlib.import_module("ptq.steps.solvers.rtn")) == whole


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Writes and imports an outside method; returns a function from sources by file name to the digest of `method`."""
    monkeypatch.syspath_prepend(tmp_path)

    def digest(files, name="own_method"):
        for file, content in files.items():
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text(content)
        importlib.invalidate_caches()
        for loaded in [m for m in sys.modules if m.startswith("own_")]:
            del sys.modules[loaded]
        return module_digest(importlib.import_module(name))

    yield digest
    for loaded in [m for m in sys.modules if m.startswith("own_")]:
        del sys.modules[loaded]


def test_an_outside_method_is_its_file_and_the_files_of_its_own_that_it_imports(outside):
    method = "import json\nimport torch\nimport own_helper\n"
    one = outside(
        {"own_method.py": method, "own_helper.py": "import own_deep", "own_deep.py": "x = 1", "own_other.py": "y = 1"}
    )
    assert outside({"own_other.py": "y = 2"}) == one
    assert len({one, outside({"own_deep.py": "x = 2"}), outside({"own_method.py": method + "# new\n"})}) == 3


def test_a_method_in_a_package_is_the_whole_package(outside):
    one = outside(
        {"own_package/__init__.py": "", "own_package/steps.py": "x = 1", "own_package/help.py": ""}, "own_package.steps"
    )
    assert outside({"own_package/help.py": "z = 1"}, "own_package.steps") != one


def test_a_method_without_a_source_is_refused(monkeypatch):
    module = type(json)("typed_in_a_notebook")
    with pytest.raises(UserError, match="typed_in_a_notebook: its source cannot be read"):
        module_digest(module)
