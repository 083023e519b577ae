"""Standard output that somebody may stop reading: the run goes on, and its results are written."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Unbroken:
    """A text stream whose reader may leave (``| head -1``): from then on nothing is written, and nobody is told of it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes `text` for as long as somebody reads."""
        with self._reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hands on what was written for as long as somebody reads."""
        with self._reader():
            self._stream.flush()

    @contextlib.contextmanager
    def _reader(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What is still in the stream's buffer goes nowhere too, and Python does not try again while it exits.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Inside, standard output and standard error are `Unbroken`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Unbroken(sys.stdout), Unbroken(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
