"""The store: results of earlier work, found by a hash of everything that they depend on, and believed only when whole."""

import contextlib
import fcntl
import os
import pathlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping

from safetensors import SafetensorError

from ptq.config.schema import Recipe
from ptq.files.atomic import put_in_place, sync, sync_tree, writing_failed
from ptq.files.lease import is_held, lease, locked
from ptq.files.manifest import MANIFEST, DamagedEntry, check_entry, key_digest, write_manifest
from ptq.files.scratch import remove, remove_stale, scratch_path

FILE = "entry.safetensors"
"""The file of an entry that has one file."""


class Store:
    """Entries, each a folder ``<kind>/<hash of its key>`` with a manifest of every byte in it.

    An entry is read only where every byte is right; one that is not (cut short, changed, of another kind, no folder, not
    readable) is said to be damaged and made again. While a store that has read an entry lives, `ptq store gc` leaves
    that entry alone.

    Args:
        folder: where entries lie.
        say: told, in one line, of every entry that has to be made again.
    """

    def __init__(self, folder: pathlib.Path, say: Callable[[str], None] | None = None):
        self.folder = folder
        self._say = say or _to_stderr
        self._held: dict[pathlib.Path, int] = {}
        weakref.finalize(self, _close, self._held)

    def path(self, kind: str, key: Mapping[str, object]) -> pathlib.Path:
        """Returns where the file of the entry of `kind` for `key` is, or would be."""
        return self._entry(kind, key) / FILE

    def find(self, kind: str, key: Mapping[str, object]) -> pathlib.Path | None:
        """Returns the entry's file, or None when this work has not been done yet, or is damaged, which is said."""
        return self.path(kind, key) if self._whole(self._entry(kind, key)) else None

    def add(
        self, kind: str, key: Mapping[str, object], write: Callable[[pathlib.Path], None], about: str = ""
    ) -> pathlib.Path:
        """Lets `write` fill the entry's file, which appears under its name only when whole, in place of one that was there.

        `about` says to people what it was computed from.

        Raises:
            UserError: when it cannot be written or the disk is full.
        """
        return self._fill(kind, key, lambda folder: write(folder / FILE), about, replace=True) / FILE

    def keep(
        self, kind: str, key: Mapping[str, object], fill: Callable[[pathlib.Path], None], about: str = ""
    ) -> pathlib.Path:
        """Returns the folder of `kind` for `key`; `fill` fills it unless it is there and every byte in it is right.

        Raises:
            UserError: when it cannot be written or the disk is full.
        """
        with self.found_or_mine(kind, key) as found:
            return self._fill(kind, key, fill, about, replace=False) if found is None else found.parent

    def add_folder(
        self, kind: str, key: Mapping[str, object], fill: Callable[[pathlib.Path], None], about: str = ""
    ) -> pathlib.Path:
        """Lets `fill` fill the entry's folder, as `add` does a file. Raises `UserError` when it cannot be written."""
        return self._fill(kind, key, fill, about, replace=True)

    @contextlib.contextmanager
    def found_or_mine(
        self, kind: str, key: Mapping[str, object], told: Callable[[str], None] | None = None
    ) -> Iterator[pathlib.Path | None]:
        """Gives the entry's file, or None when it is this process's to compute for as long as the context lasts.

        Other processes that want the same entry wait meanwhile, as this one does for them; `told` hears of it.
        """
        if (found := self.find(kind, key)) is not None:
            yield found
            return
        entry = self._entry(kind, key)
        with contextlib.ExitStack() as stack:
            try:
                waited = stack.enter_context(lease(_lease_of(entry), told or (lambda line: None)))
            except OSError as error:
                raise writing_failed(entry, error) from None
            yield self.find(kind, key) if waited else None

    def being_made(self, kind: str, key: Mapping[str, object]) -> bool:
        """Returns whether another process computes the entry at this moment, and it is not there yet."""
        entry = self._entry(kind, key)
        return not os.path.lexists(entry) and is_held(_lease_of(entry))

    def made_again(self, kind: str, reason: str) -> None:
        """Says that an entry of `kind` is of no use for `reason`, and that its work is done again."""
        self._say(f"store: an entry of {kind} in {self.folder} is damaged ({reason}): it is made again")

    def sweep(self) -> None:
        """Removes what killed processes left half-written."""
        with contextlib.suppress(OSError):
            for folder in (self.folder, *self.folder.iterdir()):
                remove_stale(folder)

    def _entry(self, kind: str, key: Mapping[str, object]) -> pathlib.Path:
        return self.folder / kind / key_digest(key)

    def _whole(self, entry: pathlib.Path) -> bool:
        if not os.path.lexists(entry):
            return False
        # Held first and checked then: what is held cannot be collected between the two.
        if not self._hold(entry):
            return False
        try:
            check_entry(entry)
        except DamagedEntry as error:
            self._release(entry)
            if os.path.lexists(entry):
                self.made_again(entry.parent.name, str(error))
            return False
        with contextlib.suppress(OSError):  # a store may be readable only
            os.utime(entry / MANIFEST)
        return True

    def _fill(
        self, kind: str, key: Mapping[str, object], fill: Callable[[pathlib.Path], None], about: str, replace: bool
    ) -> pathlib.Path:
        entry = self._entry(kind, key)
        temporary: pathlib.Path | None = None
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(entry.parent)
            temporary = scratch_path(entry.parent, entry.name)
            temporary.mkdir(mode=0o700)
            fill(temporary)
            write_manifest(temporary, kind, key, about)
            os.chmod(temporary, 0o755)
            sync_tree(temporary)
            with locked(entry.parent):
                if replace or not _is_whole(entry):  # another process may have been quicker
                    self._release(entry)
                    put_in_place(temporary, entry)
                    sync(entry.parent)
                self._hold(entry)
        except (OSError, SafetensorError) as error:
            raise writing_failed(entry, error) from None
        finally:
            if temporary is not None:
                remove(temporary)
        return entry

    def _hold(self, entry: pathlib.Path) -> bool:
        """Keeps a shared lock on the entry's manifest for the life of this store, which `unused` sees.

        Returns False when the entry is being collected at this moment. Without a manifest, or locks, there is nothing to hold.
        """
        if entry in self._held:
            return True
        try:
            descriptor = os.open(entry / MANIFEST, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError:
            return True
        self._held[entry] = descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release(entry)
            return False
        except OSError:
            pass
        return True

    def _release(self, entry: pathlib.Path) -> None:
        if (descriptor := self._held.pop(entry, None)) is not None:
            os.close(descriptor)


def _lease_of(entry: pathlib.Path) -> pathlib.Path:
    return entry.with_name(f"{entry.name}.lease")


@contextlib.contextmanager
def unused(entry: pathlib.Path) -> Iterator[bool]:
    """Gives whether no live process holds the entry; while the context lasts none can take hold of it.

    Where the file system has no locks it cannot be told, and the entry counts as unused.
    """
    try:
        descriptor = os.open(entry / MANIFEST, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except BlockingIOError:
        free = False
    except OSError:
        free = True
    try:
        yield free
    finally:
        os.close(descriptor)


def store_of(recipe: Recipe, say: Callable[[str], None] | None = None) -> Store:
    """Returns the store that the recipe names; `say` is told of entries that have to be made again."""
    return Store(pathlib.Path(recipe.store).expanduser(), say)


def _is_whole(entry: pathlib.Path) -> bool:
    try:
        check_entry(entry)
    except DamagedEntry:
        return False
    return True


def _close(held: dict[pathlib.Path, int]) -> None:
    for descriptor in held.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)
    held.clear()


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)
