"""Timings of kernels lie in a folder of the test's own."""

import pytest


@pytest.fixture(autouse=True)
def own_timings(monkeypatch, tmp_path):
    monkeypatch.setattr("ptq.files.kernel_timings.DEFAULT_FOLDER", str(tmp_path / "timings"))
