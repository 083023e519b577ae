"""Scratch files and folders that carry their owner in their name, so that those of killed processes are found and removed.

A name is ``.<stem>.ptq-<host>-<pid>-<start>-<random>``: whose it is can be told as soon as it exists, without opening it.
"""

import contextlib
import errno
import hashlib
import os
import pathlib
import re
import secrets
import shutil
import socket
import tempfile
import time
import weakref

from ptq.errors import UserError

STALE_SECONDS = 86400
"""Age after which the scratch of another machine, whose processes cannot be seen from here, is taken for rubbish."""
OLD = ".old"
"""Ends the name of what stood under a name before, while its successor takes the place."""
_NAME = re.compile(
    r"\.(?P<stem>.*)\.ptq-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{8}(?P<old>\.old)?", re.S
)
_LONGEST_STEM = 200
"""Bytes of a stem that are kept: a file's name has at most 255."""


def scratch_path(parent: pathlib.Path, stem: str) -> pathlib.Path:
    """Returns a path in `parent` that nothing has and that names this process as its owner. Creates nothing."""
    pid = os.getpid()
    short = os.fsdecode(os.fsencode(stem)[:_LONGEST_STEM])
    return parent / f".{short}.ptq-{this_host()}-{pid}-{start_of(pid) or 0}-{secrets.token_hex(4)}"


class ScratchFolder:
    """A folder of this process for files that nobody needs after it: removed by `cleanup`, with this object, or at exit.

    Where the process is killed, `remove_stale` of a later one removes it.

    Args:
        stem: what it is for; part of its name.
        parent: where it lies; None for the system's folder of temporary files.
    """

    def __init__(self, stem: str, parent: pathlib.Path | None = None):
        above = parent or pathlib.Path(tempfile.gettempdir())
        remove_stale(above)
        self.path = scratch_path(above, stem)
        self.path.mkdir(mode=0o700)
        self._finalizer = weakref.finalize(self, _remove_of_process, os.getpid(), self.path)

    @property
    def name(self) -> str:
        """The folder's path as a text."""
        return str(self.path)

    def cleanup(self) -> None:
        """Removes the folder and what is in it."""
        self._finalizer()


def stale_scratch(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the scratch files and folders directly in `folder` whose process has ended; a live process's are never among them.

    A process is known by number and start time. Those of another host, or container, cannot be seen: its scratch is
    stale when nothing in it was written for `STALE_SECONDS`.
    """
    try:
        names = [entry.name for entry in os.scandir(folder) if _NAME.fullmatch(entry.name) and _is_mine(entry)]
    except OSError:
        return []
    found = [(folder / name, match) for name in sorted(names) if (match := _NAME.fullmatch(name))]
    return [path for path, match in found if not _in_use(path, match)]


def remove_stale(folder: pathlib.Path) -> list[pathlib.Path]:
    """Removes `stale_scratch` of `folder`; returns what went.

    What stood under a name when its process was killed between two renames gets its name back.
    """
    gone: list[pathlib.Path] = []
    for path in stale_scratch(folder):
        match = _NAME.fullmatch(path.name)
        target = folder / match["stem"] if match and match["old"] else None
        if target is not None and len(os.fsencode(target.name)) >= _LONGEST_STEM:
            continue  # its name was cut: whose place it had cannot be told, and it may be all that is left
        with contextlib.suppress(OSError):
            if target is not None and not os.path.lexists(target):
                os.rename(path, target)
            else:
                remove(path)
                gone.append(path)
    return gone


def remove(path: pathlib.Path) -> None:
    """Removes a file or a whole folder, as far as it is permitted; a link goes, what it points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def reserve(path: pathlib.Path, size: int) -> None:
    """Creates the file `path` with `size` bytes that are really there, so that writing through a memory map cannot fail.

    Without it a full disk ends the process by SIGBUS at some later page.

    Raises:
        UserError: when there is no room for it; nothing is left then.
    """
    try:
        with path.open("xb") as file:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            elif size > shutil.disk_usage(path.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            else:
                file.truncate(size)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"{path.parent}: cannot be written to ({error.strerror}): name another folder by TMPDIR"
            ) from None
        free = shutil.disk_usage(path.parent).free
        raise UserError(
            f"{path.parent}: {size / 1e9:.3f} GB are needed there, {free / 1e9:.3f} GB are free: "
            "free some space, name another folder by TMPDIR, or use execution.hidden_states=memory"
        ) from None


def _is_mine(entry: os.DirEntry[str]) -> bool:
    """Whether a file is this user's: in a folder that all may write to, anyone can give a file any name."""
    try:
        return entry.stat(follow_symlinks=False).st_uid == os.getuid()
    except OSError:
        return False


def _in_use(path: pathlib.Path, match: re.Match[str]) -> bool:
    if match["host"] != this_host():
        return time.time() - _last_written(path) < STALE_SECONDS
    pid, start = int(match["pid"]), int(match["start"])
    if start:
        return start_of(pid) == start
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _last_written(path: pathlib.Path) -> float:
    """Returns the newest modification time of anything in `path`; now where it cannot be looked at."""
    try:
        inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
        return max([path.lstat().st_mtime, *(item.lstat().st_mtime for item in inside)])
    except OSError:
        return time.time()


def this_host() -> str:
    """Returns 8 hex digits of the machine and its table of processes: containers of one machine have their own."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()[:8]


def start_of(pid: int) -> int | None:
    """Returns when process `pid` began, in clock ticks since the machine did; None when there is none, or no /proc."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_bytes()
        fields = text[text.rindex(b")") + 2 :].split()
        # A zombie has ended: it only waits for its parent to ask how.
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _remove_of_process(pid: int, path: pathlib.Path) -> None:
    if os.getpid() == pid:  # a forked child that ends leaves its parent's folder alone
        remove(path)
