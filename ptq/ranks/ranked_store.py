"""The store as the ranks of a run see it: rank 0 looks, waits and writes; the others follow what it found."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping

from ptq.files.store import Store
from ptq.ranks.world import Message, World


class RankedStore(Store):
    """A store whose entries all ranks find, or none: an entry's work is either read by all of them or shared by all.

    All ranks call its methods in the same order, and see one file system.

    Args:
        store: rank 0's view of it.
        world: the ranks.
    """

    def __init__(self, store: Store, world: World):
        super().__init__(store.folder, store._say)
        self._store, self._world = store, world

    def find(self, kind: str, key: Mapping[str, object]) -> pathlib.Path | None:
        """Returns what rank 0 finds."""
        found = self._store.find(kind, key) if self._world.leads else None
        return self._told(kind, key, found)

    def add(
        self, kind: str, key: Mapping[str, object], write: Callable[[pathlib.Path], None], about: str = ""
    ) -> pathlib.Path:
        """Lets rank 0 write; returns when it has."""
        if self._world.leads:
            self._store.add(kind, key, write, about)
        self._world.broadcast(Message())
        return self.path(kind, key)

    @contextlib.contextmanager
    def found_or_mine(
        self, kind: str, key: Mapping[str, object], told: Callable[[str], None] | None = None
    ) -> Iterator[pathlib.Path | None]:
        """Gives what rank 0 finds; where it finds nothing, rank 0 holds the entry while all ranks compute it."""
        if not self._world.leads:
            yield self._told(kind, key, None)
            return
        with self._store.found_or_mine(kind, key, told) as found:
            yield self._told(kind, key, found)

    def being_made(self, kind: str, key: Mapping[str, object]) -> bool:
        """Returns what rank 0 sees."""
        seen = self._world.leads and self._store.being_made(kind, key)
        return bool(self._world.broadcast(Message(seen)).facts)

    def _told(self, kind: str, key: Mapping[str, object], found: pathlib.Path | None) -> pathlib.Path | None:
        return self.path(kind, key) if self._world.broadcast(Message(found is not None)).facts else None


def ranked(store: Store, world: World) -> Store:
    """Returns the store as the ranks of `world` see it."""
    return store if world.size == 1 else RankedStore(store, world)
