"""Pictures: every Linear's error has its point, names are drawn as they are, axes are logarithmic where values lie decades apart."""

import dataclasses
import pathlib

import matplotlib
import matplotlib.figure
import pytest
import torch

from ptq.calibration.statistics import ChannelStatistics, Provenance, Statistics, WeightStatistics
from ptq.report.channel_ranges import save_picture, save_transformed
from ptq.report.layer_errors import linear_kinds, save_errors
from ptq.report.plain import plain_console, plain_text, printable
from ptq.report.results import LayerResult

pytestmark = pytest.mark.usefixtures("drawn")
HOSTILE = "m$x_{$ [bold]a[/bold] \\frac \x1b[31m :smile:"


def layer(name, error):
    return LayerResult(name, "", "int4", 4.0, "16-bit float", 16, 20.0, error, 100)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, with their texts drawn: a formula that cannot be read raises there."""
    saved = []
    original = matplotlib.figure.Figure.savefig

    def kept(self, *args, **kwargs):
        saved.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", kept)
    return saved


def statistics(outlier):
    """Of one Linear of 40 channels, one of which is `outlier` times as wide."""
    x = torch.randn(1, 50, 40, generator=torch.Generator().manual_seed(0))
    x[..., 39] *= outlier
    inputs = ChannelStatistics.empty(40)
    inputs.update(x)
    weight = WeightStatistics.of(torch.randn(8, 40))
    return Statistics({"a.fc": inputs}, {"a.fc": weight}, Provenance(HOSTILE, None, "", "", "", 1, 50, "", ""))


def test_linears_of_a_name_are_one_kind_and_experts_share_theirs():
    layers = [layer("m.layers.0.attn.q", 0.1), layer("m.layers.1.attn.q", 0.2), layer("m.layers.1.attn.k", None)]
    layers += [layer(f"m.layers.1.experts.{i}.w1", 0.3) for i in range(2)]
    kinds = {kind.name: kind.points for kind in linear_kinds(layers)}
    assert kinds == {"attn.q": ((0, 0.1), (1, 0.2)), "experts.*.w1": ((1, 0.3), (1, 0.3))}


@pytest.mark.parametrize(
    ("errors", "scale"), [((0.01, 0.02), "linear"), ((0.001, 0.02), "log"), ((0.0, 0.001, 0.2), "log")]
)
def test_the_picture_of_errors_has_a_point_for_each_error_and_an_axis_that_shows_them(tmp_path, figures, errors, scale):
    path = tmp_path / "errors.png"
    assert save_errors([layer(f"layers.{i}.fc", e) for i, e in enumerate(errors)], HOSTILE, path)
    [axis] = figures[0].axes
    [line] = axis.get_lines()
    drawn = [100 * e for e in errors if e > 0 or scale == "linear"]
    assert axis.get_yscale() == scale and line.get_ydata().tolist() == pytest.approx(drawn)
    low, high = axis.get_ylim()
    assert low < min(drawn) and max(drawn) < high
    assert "%" in axis.get_ylabel() and axis.get_xlabel() == "block"
    assert ("no error" in figures[0]._suptitle.get_text()) == (len(drawn) < len(errors))
    assert path.read_bytes().startswith(b"\x89PNG")
    frame, legend = axis.get_window_extent(), figures[0].legends[0].get_window_extent()
    assert legend.x0 >= frame.x1


def test_no_errors_have_no_picture(tmp_path):
    assert not save_errors([layer("a.0.fc", None)], "x", tmp_path / "errors.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("outlier", "scale"), [(2, "linear"), (500, "symlog")])
def test_every_channels_bar_is_whole_and_the_legend_off_the_data(tmp_path, figures, outlier, scale):
    s = statistics(outlier)
    save_picture(s, tmp_path / "a.png")
    after = dataclasses.replace(s, inputs={"a.fc": statistics(1).inputs["a.fc"]})
    save_transformed(s, after, {"a.fc": torch.arange(40) // 10}, tmp_path / "b.png")
    assert [len(figure.axes) for figure in figures] == [1, 2]
    assert figures[0].axes[0].get_yscale() == scale
    for figure in figures:
        for axis in figure.axes:
            assert axis.get_xlim() == (-0.5, 39.5) and axis.get_ylabel() and axis.get_legend() is None
        assert figure.legends[0].get_window_extent().y1 <= figure.axes[-1].get_window_extent().y0
    low, high = figures[0].axes[0].get_ylim()
    assert low < float(s.inputs["a.fc"].min.min()) and float(s.inputs["a.fc"].max.max()) < high


def test_names_are_drawn_and_printed_as_they_are(tmp_path):
    assert plain_text("m$x_{$") == r"m\$x_{\$" and "\x1b" not in printable(HOSTILE)
    file = pathlib.Path(tmp_path / "out.txt")
    with file.open("w", encoding="utf-8") as stream:
        plain_console(stream).print(printable(HOSTILE))
    assert file.read_text(encoding="utf-8").strip() == HOSTILE.replace("\x1b", "\\x1b")
