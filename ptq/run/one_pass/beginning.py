"""What a run in one pass began with: which weights, by the state of their files until all have been read, and what it carries."""

import json
import pathlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Self

from ptq.files.atomic import write_text
from ptq.files.bounded import parse_json
from ptq.models.weights_digest import ModelDigest
from ptq.run.one_pass.visitor import digests_of

NAME = "one-pass.json"


@dataclass(frozen=True)
class Beginning:
    """What a pass began with.

    Attributes:
        state: of the weights' files (`ModelDigest.state`): their digest is known at the end only.
        traced: whether the pass finds the links, or knew them.
        evaluated: whether it evaluates the baseline, or knew its results.
        measured: whether it takes statistics, or knew them, or wants none.
    """

    state: str
    traced: bool
    evaluated: bool
    measured: bool

    @classmethod
    def read(
        cls,
        folder: pathlib.Path,
        digest: ModelDigest,
        kept: Iterable[pathlib.Path],
        figures: Callable[[pathlib.Path], dict[str, Any]],
    ) -> Self | None:
        """Returns what an interrupted pass began with, None where none did, or where what it has read is not there any more.

        Files in another state (touched, copied, mended) are believed where all that finished blocks were made of has the digests
        that it had: it is read again for that.

        Args:
            folder: where `write` wrote.
            digest: of the model.
            kept: files of the finished blocks.
            figures: reads the figures of one.
        """
        try:
            found = cls(**parse_json((folder / NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        if found.state == digest.state:
            return found
        try:
            read = {place: each for path in kept for place, each in digests_of(figures(path)).items()}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if read and digest.agrees(read) else None

    def goes_on_with(self, now: Self) -> bool:
        """Whether what this began with is enough for a pass that would begin `now`: what was known then and is not any more would
        have to be found from the first block on.
        """
        missing = ((now.traced, self.traced), (now.evaluated, self.evaluated), (now.measured, self.measured))
        return all(began or not needed for needed, began in missing)

    def write(self, folder: pathlib.Path) -> None:
        """Writes it, for `read`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / NAME, json.dumps(asdict(self)))
