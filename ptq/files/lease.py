"""Leases: of several processes that want the same work done, one does it while the others wait for it."""

import contextlib
import fcntl
import json
import os
import pathlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator

from ptq.files.bounded import parse_json
from ptq.files.scratch import scratch_path, start_of, this_host

BEAT_SECONDS = 5.0
"""How often a holder touches its lease."""
STALE_SECONDS = 60.0
"""Age of the last beat after which a holder on another machine counts as dead; one on this machine is looked for itself."""
POLL_SECONDS = 0.2


@contextlib.contextmanager
def lease(path: pathlib.Path, told: Callable[[str], None] = lambda line: None) -> Iterator[bool]:
    """Holds the lease file `path` while the context lasts; waits for another live holder first.

    The holder touches the file every `BEAT_SECONDS`. One that has died is taken over: its process has gone, or, on another
    machine, its last beat is `STALE_SECONDS` old by the file system's own clock. Two processes can hold one lease only where a
    holder was stopped for that long: what is leased has to stand that, as entries of the store do, which appear whole.

    Args:
        path: the lease's file, in a folder that exists or can be made.
        told: told once, in a line, whom this process waits for.

    Yields:
        Whether this process has waited: then the work may be done already.
    """
    token = {
        "host": this_host(),
        "pid": os.getpid(),
        "start": start_of(os.getpid()) or 0,
        "token": secrets.token_hex(8),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    while (holder := _take(path, token)) is not None:
        if not waited:
            told(f"waiting for process {holder}, which is computing this")
        waited = True
        time.sleep(POLL_SECONDS)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, token, ended), daemon=True)
    beating.start()
    try:
        yield waited
    finally:
        ended.set()
        beating.join()
        with contextlib.suppress(OSError), locked(path.parent):
            if _read(path) == token:
                path.unlink()


def is_held(path: pathlib.Path) -> bool:
    """Returns whether a live process holds the lease `path`."""
    holder = _read(path)
    return holder is not None and _lives(path, holder)


def _take(path: pathlib.Path, token: dict[str, object]) -> str | None:
    """Takes the lease where it is free or its holder dead. Returns None then, else the number of the holder's process."""
    with locked(path.parent):
        holder = _read(path)
        if holder is not None and _lives(path, holder):
            return str(holder.get("pid", "?"))
        new = scratch_path(path.parent, path.name)
        new.write_text(json.dumps(token), encoding="utf-8")
        os.replace(new, path)
    return None


def _lives(path: pathlib.Path, holder: dict[str, object]) -> bool:
    if holder.get("host") == this_host():
        start = start_of(int(str(holder["pid"])))
        if start is not None or pathlib.Path("/proc/self/stat").is_file():
            return start is not None and start == holder.get("start")
    try:
        return _now(path.parent) - path.stat().st_mtime < STALE_SECONDS
    except OSError:
        return False


def _now(folder: pathlib.Path) -> float:
    """Returns the time by the clock that dates the folder's files, which on a network is not this machine's."""
    probe = scratch_path(folder, "now")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _beat(path: pathlib.Path, token: dict[str, object], ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            if _read(path) == token:
                os.utime(path)


def _read(path: pathlib.Path) -> dict[str, object] | None:
    """Returns what a lease's file says; None without one. A damaged one has no host, so its age alone tells."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Lets one process at a time into a folder (its leases, its entries), where its file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
