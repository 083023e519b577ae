"""A run's saved blocks are the files that its pass has kept, not copies of them, where the file system can do that."""

import types

import pytest

from ptq.run.kept.kept_pass import KeptPass


@pytest.mark.parametrize("links", [True, False])
def test_finished_blocks_are_handed_over(tmp_path, monkeypatch, links):
    def refused(*paths):
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr("os.link", refused)
    kept = KeptPass(tmp_path / "kept", "key", [], None)
    blocks = [types.SimpleNamespace(index=i) for i in range(2)]
    kept.folder.mkdir()
    for block in blocks:
        kept.file_of(block).write_text(f"block {block.index}")
    for _ in range(2):  # what lies there already is replaced
        kept.hand_over(blocks, tmp_path / "quantized")
    for block in blocks:
        path = tmp_path / "quantized" / kept.file_of(block).name
        assert path.read_text() == f"block {block.index}"
        assert path.samefile(kept.file_of(block)) == links
    assert len(list((tmp_path / "quantized").iterdir())) == 2
    kept.drop()
    assert (tmp_path / "quantized" / "block-00001.safetensors").read_text() == "block 1"
