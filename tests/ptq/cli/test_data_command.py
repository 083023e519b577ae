"""ptq data: says what a protocol needs, knows the files by their bytes, and puts them where recipes look."""

import hashlib

import pytest

from ptq.cli.app import main
from ptq.data.protocols import PROTOCOLS, ProtocolFile, data_folder

LINES = b" \n = Title = \n \n Text of the first article . \n \n = Another = \n"
HEAD = b" = Title = \n Text of the first article . \n"


def file_of(name: str, content: bytes) -> ProtocolFile:
    return ProtocolFile(name, len(content), hashlib.sha256(content).hexdigest(), f"the archive of {name}")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The data folder, with a protocol that needs two small files."""
    monkeypatch.setitem(PROTOCOLS, "smol-wt2", (file_of("whole.txt", LINES), file_of("head.txt", HEAD)))
    monkeypatch.setenv("PTQ_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_what_is_missing_is_named_with_its_size_its_digest_and_where_it_comes_from(folder, capsys):
    assert main(["data", "smol-wt2"]) == 1
    said = capsys.readouterr().out
    assert str(folder) in said and not folder.exists()
    for name, content in (("whole.txt", LINES), ("head.txt", HEAD)):
        assert f"{name}: is not there: {len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}" in said
        assert f"the archive of {name}" in said


def test_files_are_taken_out_of_what_holds_them_and_known_again(folder, tmp_path, capsys):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "wiki.raw").write_bytes(LINES + b"And more articles. \n")
    assert main(["data", "smol-wt2", str(tmp_path / "downloads")]) == 0
    assert (folder / "whole.txt").read_bytes() == LINES and (folder / "head.txt").read_bytes() == HEAD
    assert capsys.readouterr().out.count("taken from") == 2
    assert main(["data", "smol-wt2"]) == 0 and capsys.readouterr().out.count("as it should be") == 2
    (folder / "head.txt").write_bytes(HEAD[:-1] + b"!")
    assert main(["data", "smol-wt2"]) == 1 and "head.txt: is another file: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["smol-wt3"], "did you mean 'smol-wt2'"), (["smol-wt2", "/no/such/path"], "/no/such/path: is not there"),
        (["smol-wt2", "--fold", "x"], "--fold"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(folder, capsys, arguments, said):
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not folder.exists()


def test_without_a_folder_named_files_lie_in_the_users_own(monkeypatch):
    monkeypatch.delenv("PTQ_DATA", raising=False)
    assert data_folder().as_posix().endswith(".local/share/ptq") and data_folder().is_absolute()
