"""Writing files so that a name holds either the old content or the new, whole."""

import ctypes
import errno
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable

from safetensors import SafetensorError

from ptq.errors import UserError
from ptq.files.scratch import OLD, remove, remove_stale, scratch_path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""What Linux calls the working folder of a system call, and the flag of renameat2 that exchanges two names."""


def write_atomic(path: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
    """Lets `write` fill a temporary file beside `path`, writes it through to the disk and renames it.

    On failure `path` keeps its old content. Temporary files that killed processes left beside it are removed.

    Raises:
        UserError: when the folder cannot be written to or the disk is full.
    """
    temporary: pathlib.Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent)
        temporary = scratch_path(path.parent, path.name)
        temporary.touch(mode=0o600, exist_ok=False)
        write(temporary)
        os.chmod(temporary, 0o644)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise writing_failed(path, error) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_folder_atomic(path: pathlib.Path, fill: Callable[[pathlib.Path], None]) -> None:
    """Lets `fill` fill a temporary folder beside `path`, writes it through and renames it; a folder that was there goes only then.

    At every moment `path` is the old folder or the new one, whole, where the file system can exchange two names; elsewhere
    a process that is killed between two renames leaves the old folder under another name, and `remove_stale` puts it back.

    Raises:
        UserError: when the place cannot be written to or the disk is full.
    """
    temporary: pathlib.Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent)
        temporary = scratch_path(path.parent, path.name)
        temporary.mkdir(mode=0o700)
        fill(temporary)
        os.chmod(temporary, 0o755)
        sync_tree(temporary)
        put_in_place(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise writing_failed(path, error) from None
    finally:
        if temporary is not None:
            remove(temporary)


def linked(source: pathlib.Path, path: pathlib.Path) -> None:
    """Gives a file another name as well; copies it where the file system has no links."""
    try:
        path.unlink(missing_ok=True)
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def put_in_place(new: pathlib.Path, path: pathlib.Path) -> None:
    """Gives the folder `new` the name `path`; whatever had it goes, and is back where this fails or is interrupted."""
    if not os.path.lexists(path):
        os.replace(new, path)
        return
    if _exchange(new, path):
        remove(new)
        return
    old = new.with_name(f"{new.name}{OLD}")
    try:
        os.replace(path, old)
        os.replace(new, path)
    except BaseException:  # an interrupt as well: whoever ends here must not lose what was there
        if os.path.lexists(old) and not os.path.lexists(path):
            os.replace(old, path)
        raise
    remove(old)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Exchanges two names in one step; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def sync(path: pathlib.Path) -> None:
    """Writes a file through to the disk, or a folder's names; some file systems refuse the latter, which then do it themselves."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: pathlib.Path) -> None:
    """Writes every file and folder in `folder`, and itself, through to the disk."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes `text` as UTF-8 by `write_atomic`."""
    write_atomic(path, lambda temporary: _fill(temporary, text))


def check_folder(path: pathlib.Path, field: str) -> None:
    """Proves that the folder can be written to, or made, and leaves nothing. Raises `UserError` naming `field` otherwise."""
    try:
        there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{field}: {path} cannot be written to ({error.strerror}): choose another folder") from None


def ensure_folder(path: pathlib.Path, field: str) -> None:
    """Creates the folder and proves that files can be made in it. Raises `UserError` naming `field` when they cannot."""
    check_folder(path, field)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{field}: {path} cannot be written to ({error.strerror}): choose another folder") from None


def writing_failed(path: pathlib.Path, error: Exception) -> UserError:
    """Returns the one line for an `OSError`, or safetensors' wrapping of one, met while writing `path`."""
    # safetensors, in Rust, keeps the system's number in its text only.
    wrapped = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(wrapped[1]) if wrapped else None
    if number in _FULL:
        return UserError(
            f"{path}: the disk is full: free some space and run the same command again; the old file is whole"
        )
    reason = os.strerror(number) if number else " ".join(str(error).split())
    return UserError(f"{path}: cannot be written ({reason}): choose another folder")


def _fill(path: pathlib.Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
