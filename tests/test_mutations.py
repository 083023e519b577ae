"""The list of the mutation check does not rot: each piece that it changes is there, once, and so are the tests that it runs."""

import pathlib

import pytest

from tests.tools.mutations import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}:{m.old[:30]}")
def test_a_mutation_changes_a_piece_that_is_there_once(mutation):
    source = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert source.count(mutation.old) == 1 and mutation.new != mutation.old
    compile(source.replace(mutation.old, mutation.new), mutation.file, "exec")
    assert all((ROOT / "tests" / test).exists() for test in mutation.tests)


def test_the_check_reaches_every_part_of_the_arithmetic():
    folders = {pathlib.PurePath(m.file).parts[0 if m.file[0] in "gq" else 1] for m in MUTATIONS}
    assert folders >= {"quantize", "group_methods", "evaluation", "calibration", "files", "export"}
    assert len(MUTATIONS) >= 40
