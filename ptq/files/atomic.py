"""Writing files so that a name holds either the old content or the new, whole."""

import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable

from safetensors import SafetensorError

from ptq.errors import UserError

MANIFEST = "manifest.json"
STALE_SECONDS = 86400
"""Age after which the temporary folder of a killed process is taken for rubbish."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    except (OSError, SafetensorError) as error:
        raise writing_failed(path, error) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_folder_atomic(path: pathlib.Path, fill: Callable[[pathlib.Path], None]) -> None:
    """Lets `fill` fill a temporary folder beside `path`, then renames it; a folder that was there goes only then.

    Raises:
        UserError: when the place cannot be written to or the disk is full.
    """
    temporary: pathlib.Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        fill(temporary)
        os.chmod(temporary, 0o755)
        old = temporary.with_name(f"{temporary.name}.old")
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        _remove(old)
    except (OSError, SafetensorError) as error:
        raise writing_failed(path, error) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes `text` as UTF-8 by `write_atomic`."""
    write_atomic(path, lambda temporary: _fill(temporary, text))


def keep_folder(folder: pathlib.Path, fill: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """Returns `folder`, which `fill` fills unless it is there already and whole.

    It is filled under another name, written through to the disk, given a manifest of its files' SHA-256 and renamed. A folder
    that does not agree with its manifest (cut short, damaged, tampered with) is thrown away and filled again.

    Raises:
        UserError: when it cannot be written or the disk is full.
    """
    if _agrees(folder):
        return folder
    temporary: pathlib.Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{folder.name}.*"):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        fill(temporary)
        digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        write_text(temporary / MANIFEST, json.dumps(digests))
        for path in temporary.iterdir():
            _through(path)
        if not _agrees(folder):  # another process may have been quicker
            _remove(folder)
            os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise writing_failed(folder, error) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _agrees(folder: pathlib.Path) -> bool:
    """Returns whether every file of the manifest is there with the bytes it had."""
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(digests) and all(_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _through(path: pathlib.Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


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
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
