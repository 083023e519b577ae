"""The control groups of Linux that hold this process, such as a container's: where their limits are to be read."""

import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path("/")


def group_folders(controller: str, root: pathlib.Path = ROOT) -> Iterator[tuple[pathlib.Path, int]]:
    """Yields (folder, version 1 or 2) of each group above this process that may limit what `controller` counts, from the inside out.

    Args:
        controller: as version 1 names it: ``cpu``, ``memory``.
        root: where ``proc`` and ``sys`` are mounted. Folders need not exist.
    """
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        mounts = (controllers, controller) if controllers else ("", "unified")
        inner = pathlib.PurePosixPath(path.lstrip("/"))
        # In a container the path may be one of the host's: its own group is then where the mount begins.
        for mount in mounts:
            for part in (inner, *inner.parents):
                yield root / "sys/fs/cgroup" / mount / part, 1 if controllers else 2


def text_of(path: pathlib.Path) -> str:
    """Returns what a small file says, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
