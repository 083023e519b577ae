"""Files that a test wants to be there."""

import pathlib
from collections.abc import Mapping


def write_files(root: pathlib.Path, files: Mapping[str, str]) -> pathlib.Path:
    """Writes `files`, contents by path below `root`, with the folders that they need; returns `root`."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root
