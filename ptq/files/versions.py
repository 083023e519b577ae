"""Which release of a package is installed, without importing it."""

import importlib.metadata
from functools import cache


@cache
def version_of(package: str) -> str | None:
    """Returns the version of an installed distribution, or None. Read once a process: its metadata takes a hundredth of a second."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
