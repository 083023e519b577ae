"""The command ``ptq store``: what is kept of earlier work, whether it is whole, and making room."""

import pathlib
import re
import time

from ptq.cli.parser import Parser
from ptq.config.schema import Recipe
from ptq.errors import UserError, nearest

ACTIONS = {
    "ls": "what is kept: kind, age, size, what it was computed from",
    "verify": "reads every byte of it; exit status 1 when something is damaged",
    "gc": "removes the least recently used until the rest takes --max-size",
}
UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)},
}
EXIT_DAMAGED = 1


def store_command(arguments: list[str], program: str) -> int:
    """``ptq store ls | verify | gc --max-size SIZE [--store FOLDER]``."""
    default = str(Recipe.store)
    actions = "; ".join(f"{name}: {what}" for name, what in ACTIONS.items())
    parser = Parser(prog=program, allow_abbrev=False, description=f"Looks after the store of earlier work. {actions}.")
    parser.add_argument("action", metavar="ls|verify|gc", help="what to do")
    parser.add_argument("--store", metavar="FOLDER", default=default, help=f"the store of the recipes ({default})")
    parser.add_argument("--max-size", metavar="SIZE", help="of gc: bytes that may stay, such as 500MB, 10GB, 2GiB or 0")
    given, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(f"{unknown[0]}: no such option; see --help")
    if given.action not in ACTIONS:
        raise UserError(
            f"{given.action!r} is nothing to do with a store: use ls, verify or gc{nearest(given.action, ACTIONS)}"
        )
    if (given.action == "gc") != (given.max_size is not None):
        wanted = "give the bytes that may stay, such as 10GB" if given.max_size is None else "leave it out, or use gc"
        raise UserError(f"--max-size: {'missing' if given.max_size is None else 'of gc only'}: {wanted}")
    most = None if given.max_size is None else size_of(given.max_size)
    folder = pathlib.Path(given.store).expanduser()
    if not folder.is_dir():
        raise UserError(f"--store: {folder} is no folder: name the folder of store= in your recipes")
    if given.action == "ls":
        return _list(folder)
    return _verify(folder) if most is None else _collect(folder, most)


COMMANDS = {"store": ("what is kept of earlier work: ls, verify, gc --max-size SIZE", store_command)}


def size_of(text: str) -> int:
    """Returns the bytes that a size such as ``500MB``, ``2.5GiB`` or ``1000`` means. Raises `UserError` for anything else."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([a-zA-Z]*)", text.strip(), re.ASCII)
    if match is None or match[2].upper() not in UNITS:
        raise UserError(
            f"--max-size: {text!r} is no size: use bytes, or a number with KB, MB, GB, TB, KiB, MiB, GiB or TiB"
        )
    return int(float(match[1]) * UNITS[match[2].upper()])


def _list(folder: pathlib.Path) -> int:
    from rich.table import Table

    from ptq.files.store import Store
    from ptq.files.store_upkeep import entries
    from ptq.report.plain import plain_console, printable

    found = entries(Store(folder))
    table = Table(title=printable(str(folder)), title_justify="left")
    for column in ("kind", "entry"):
        table.add_column(column, no_wrap=True)
    for column in ("age", "unused for", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("computed from")
    now = time.time()
    for entry in reversed(found):
        age = "?" if entry.made is None else _duration(now - entry.made)
        words = entry.about if entry.damage is None else f"damaged: {entry.damage}"
        row = (entry.kind, entry.path.name[:12], age, _duration(now - entry.used), _bytes(entry.bytes), words)
        table.add_row(*map(printable, row))
    console = plain_console()
    if not console.is_terminal:
        console = plain_console(width=160)
    console.print(table)
    print(f"{len(found)} entries, {_bytes(sum(entry.bytes for entry in found))}")
    return 0


def _verify(folder: pathlib.Path) -> int:
    from ptq.files.store import Store
    from ptq.files.store_upkeep import damage_of, entries
    from ptq.report.plain import printable

    found = entries(Store(folder))
    damaged = [(entry, reason) for entry in found if (reason := entry.damage or damage_of(entry)) is not None]
    for entry, reason in damaged:
        print(printable(f"damaged: {entry.path} ({reason})"))
    print(
        f"{len(found)} entries, {len(damaged)} damaged{': the next run that needs one makes it again' if damaged else ''}"
    )
    return EXIT_DAMAGED if damaged else 0


def _collect(folder: pathlib.Path, most: int) -> int:
    from ptq.files.store import Store
    from ptq.files.store_upkeep import collect, entries
    from ptq.report.plain import printable

    store = Store(folder)
    gone, busy = collect(store, most)
    for entry in gone:
        words = entry.about or entry.damage or ""
        print(printable(f"removed: {entry.path} ({_bytes(entry.bytes)}{', ' if words else ''}{words})"))
    for entry in busy:
        print(printable(f"in use by a running process, left: {entry.path} ({_bytes(entry.bytes)})"))
    left = entries(store)
    print(
        f"{len(gone)} removed, {_bytes(sum(e.bytes for e in gone))}; {len(left)} left, {_bytes(sum(e.bytes for e in left))}"
    )
    return 0


def _duration(seconds: float) -> str:
    """Returns a span in its greatest unit that it fills."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
