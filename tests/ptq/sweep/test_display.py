"""What a sweep shows: a live table with progress, time left and the best so far; where nobody watches, a line a point."""

import io
import types

import pytest
from rich.console import Console

from ptq.sweep import display as module
from ptq.sweep.display import Display, describe, span, table_of
from ptq.sweep.status import DONE, FAILED, RUNNING, WAITING, Status
from ptq.sweep.table import FIGURES, Row, by_result


def row(number: int, kind: str, perplexity: float | None = None, line: str = "") -> Row:
    figures = dict.fromkeys(FIGURES)
    if perplexity is not None:
        figures |= {
            "quantized_perplexity": perplexity, "difference": perplexity - 5, "difference_low": perplexity - 5.5,
            "difference_high": perplexity - 4.5, "kl_mean": 0.01, "bits_per_weight": 4.25,
        }  # fmt: skip
    return Row(number, Status(kind, line=line, seconds=3.0), {"steps.smooth.alpha": f"0.{number}"}, figures, None, "")


def console_of(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=110, height=30, color_system=None)


@pytest.fixture
def clock(monkeypatch):
    """The seconds that have passed, for a test to set."""
    now = [100.0]
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_on_a_terminal_a_live_table_has_progress_time_left_and_the_best_so_far(clock):
    console = console_of(True)
    shown = Display("alphas", console)
    with shown.showing():
        shown.update([row(1, DONE, 7.0), row(2, RUNNING), row(3, WAITING), row(4, WAITING), row(5, WAITING)])
        clock[0] += 20
        shown.update([row(1, DONE, 7.0), row(2, DONE, 6.0), row(3, FAILED, line="no luck"), row(4, RUNNING), row(5, WAITING)])  # fmt: skip
        shown._live.refresh()
    text = console.file.getvalue()
    # Two points have ended in 20 s, and two are left: what was done before the start says nothing of the speed.
    assert "alphas" in text and "3 of 5, 20 s left" in text
    assert "best so far: point 2, steps.smooth.alpha=0.2: perplexity 6.0000 (+1.0000 [+0.5000, +1.5000])" in text
    assert "running" in text and "failed: no luck" in text


def test_without_a_terminal_every_end_is_a_line(clock):
    console = console_of(False)
    shown = Display("alphas", console)
    with shown.showing():
        shown.update([row(1, RUNNING)])
        shown.ended(row(1, DONE, 7.0), 1, 2)
        shown.ended(row(2, FAILED, line="no luck"), 2, 2)
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("[1/2] point 1 done: steps.smooth.alpha=0.1: perplexity 7.0000 (+2.0000 [+1.5000, ")
    assert lines[-1] == "[2/2] point 2 failed: steps.smooth.alpha=0.2: no luck"


def test_nothing_is_said_of_time_before_a_point_has_ended(clock):
    shown = Display("x", console_of(False))
    shown.update([row(1, DONE, 7.0), row(2, RUNNING)])
    clock[0] += 50
    assert shown.left(1, 2) is None and shown.left(2, 3) == 50


def test_the_table_at_the_end_is_sorted_and_has_intervals():
    console = console_of(False)
    rows = [row(1, DONE, 7.0), row(2, WAITING), row(3, DONE, 6.0)]
    console.print(table_of(by_result(rows)))
    text = console.file.getvalue()
    assert text.index("6.0000") < text.index("7.0000") < text.index("waiting")
    assert "+1.0000 [+0.5000, +1.5000]" in text


@pytest.mark.parametrize(("seconds", "words"), [(59.4, "59 s"), (61, "1 min 01 s"), (7322, "2 h 02 min")])
def test_times_have_two_units(seconds, words):
    assert span(seconds) == words


def test_a_point_that_is_not_done_is_described_by_its_line():
    assert describe(row(1, FAILED, line="no luck")) == "steps.smooth.alpha=0.1: no luck"
