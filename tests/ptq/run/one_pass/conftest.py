"""What runs in one pass are tested with."""

import pytest

from tests.tools.one_pass import counted_reads


@pytest.fixture(autouse=True)
def every_block(monkeypatch):
    """Keeps every block, although a tiny one takes less time than its writing."""
    monkeypatch.setattr("ptq.run.kept.kept_pass.WORST_SHARE", 1e9)


@pytest.fixture
def read(monkeypatch):
    """How often each tensor of the checkpoint was read, by the place of its bytes."""
    return counted_reads(monkeypatch)
