"""A figure with room for what stands around its axes, drawn once: every run has its pictures."""

import pathlib
from typing import Any

from ptq.files.atomic import write_atomic

DPI = 110
"""Dots an inch of a picture."""
_POINT = DPI / 72
_PAD = 6 * _POINT
"""Dots between what stands beside one another."""
_LINE = 1.5
"""Lines of text are this many times as high as their letters' size."""


def save_picture_file(figure: Any, path: pathlib.Path, beside: Any = None, below: Any = None) -> None:
    """Writes a figure of axes in one column as PNG, with room for their ticks, labels and titles, a title and a legend.

    Matplotlib's own constrained layout measures all of it twice and draws it once in vain, which is most of the time of a picture:
    here lines of text are as high as their letters say, and only widths are measured.

    Args:
        figure: of `DPI`, without a layout of its own; its title is at the top.
        path: where to.
        beside: a legend right of the axes, or None.
        below: a legend under them, or None.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    width, height = figure.bbox.size
    axes = figure.axes
    ticks, title = _height(8) + 4 * _POINT, max(_height(9) if axis.get_title(loc="left") else 0.0 for axis in axes)
    top = height - _height(10) - title - _PAD
    bottom = ticks + _height(9) + (below.get_window_extent(renderer).height if below else _PAD)
    between = ticks + title + _PAD
    each = (top - bottom - between * (len(axes) - 1)) / len(axes)
    # Which numbers stand at an axis goes by its height.
    figure.subplots_adjust(bottom=bottom / height, top=top / height, hspace=between / each)
    left = _PAD + max(axis.bbox.x0 - axis.yaxis.get_tightbbox(renderer).x0 for axis in axes)
    taken = beside.get_window_extent(renderer).width if beside else 0.0
    figure.subplots_adjust(left=left / width, right=max((width - taken - _PAD) / width, left / width + 0.1))
    if beside:
        beside.set_loc("upper right")
        beside.set_bbox_to_anchor((1.0, top / height), transform=figure.transFigure)
    # Zlib's level 3 takes two thirds of the time of its usual 6, for a tenth to a fifth more bytes.
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", pil_kwargs={"compress_level": 3}))


def _height(size: float) -> float:
    """Returns how many dots a line of text of `size` points takes."""
    return _LINE * size * _POINT
