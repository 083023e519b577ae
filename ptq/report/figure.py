"""A figure of matplotlib as a PNG file."""

import pathlib
from typing import Any

from ptq.files.atomic import write_atomic


def save_figure(figure: Any, path: pathlib.Path, dpi: int = 110) -> None:
    """Writes the figure, whole or not at all, at `dpi` dots an inch."""
    # Zlib's level 3 takes two thirds of the time of its usual 6, for a tenth to a fifth more bytes.
    write_atomic(path, lambda place: figure.savefig(place, format="png", dpi=dpi, pil_kwargs={"compress_level": 3}))
