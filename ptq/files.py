"""Writing files so that a name holds either the old content or the new, whole."""

import errno
import os
import pathlib
import tempfile
from collections.abc import Callable

from ptq.errors import UserError


def write_atomic(path: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
    """Lets `write` fill a temporary file beside `path`, then renames it; on failure `path` keeps its old content.

    Raises:
        UserError: when the folder cannot be written to or the disk is full.
    """
    temporary: pathlib.Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = pathlib.Path(name)
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise writing_failed(path, error) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes `text` as UTF-8 by `write_atomic`."""
    write_atomic(path, lambda temporary: _fill(temporary, text))


def ensure_folder(path: pathlib.Path, field: str) -> None:
    """Creates the folder and proves that files can be made in it. Raises `UserError` naming `field` when they cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{field}: {path} cannot be written to ({error.strerror}): choose another folder") from None


def writing_failed(path: pathlib.Path, error: OSError) -> UserError:
    """Returns the one line for an `OSError` met while writing `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{path}: the disk is full: free some space and run the same command again; the old file is whole"
        )
    return UserError(f"{path}: cannot be written ({error.strerror or error}): choose another folder")


def _fill(path: pathlib.Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
