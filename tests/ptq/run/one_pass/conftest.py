"""What runs in one pass are tested with."""

import pytest

from tests.tools.one_pass import counted_reads


@pytest.fixture(autouse=True)
def kept(every_block):
    """Every block of every run."""


@pytest.fixture
def read(monkeypatch):
    """How often each tensor of the checkpoint was read, by the place of its bytes."""
    return counted_reads(monkeypatch)
