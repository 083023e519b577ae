"""The small picture of a sweep: which lines it has, and that it is a small PNG."""

import pytest

from experiments.sweep_picture import draw, lines_of, spans_decades
from ptq.errors import UserError

pytestmark = pytest.mark.usefixtures("drawn")


def row(number, alpha, bits, difference, status="done"):
    return {
        "point": number, "status": status, "alpha": alpha, "scheme.bits": bits, "difference": difference,
        "difference_low": None if difference is None else difference - 0.1, "difference_high": None if difference is None else difference + 0.2,
    }  # fmt: skip


ROWS = [
    row(1, "0.5", "8", 0.3), row(2, "0.1", "8", 0.5), row(3, "0.5", "4", 2.0), row(4, "10", "8", 0.4),
    row(5, "0.7", "8", None, "failed"), row(6, "0.1", "4", 3.0),
]  # fmt: skip


def test_lines_are_the_settings_of_the_other_options_best_first_and_numbers_in_order():
    lines = lines_of(ROWS, ["alpha", "scheme.bits"], "alpha")
    assert {rest: [r["point"] for r in found] for rest, found in lines.items()} == {
        "bits=8": [2, 1, 4],
        "bits=4": [6, 3],
    }
    assert list(lines) == ["bits=8", "bits=4"]


@pytest.mark.parametrize("option", ["alpha", "scheme.bits"])
def test_the_picture_is_a_small_png(tmp_path, option):
    path = tmp_path / "a.png"
    draw([*ROWS, row(7, "auto", "text", 1.0)], ["alpha", "scheme.bits"], option, path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size < 100_000


def test_a_sweep_without_a_finished_point_has_no_picture(tmp_path):
    with pytest.raises(UserError, match="no point of this sweep"):
        draw([ROWS[4]], ["alpha"], "alpha", tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("differences", "low", "decades"), [((1, 40), 0.5, True), ((1, 20), 0.5, False), ((1, 40), -0.5, False), ((-1, 40), None, False)])  # fmt: skip
def test_the_axis_is_logarithmic_where_differences_above_zero_span_decades(differences, low, decades):
    assert spans_decades([{"difference": d, "difference_low": low} for d in differences]) is decades
