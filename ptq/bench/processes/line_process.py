"""A runtime in a process of its own, so that its threads and torch's are not in each other's way: a line of JSON asked, a line answered."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from ptq.errors import UserError


class LineProcess:
    """The other end.

    Args:
        name: what messages call the runtime.
        command: starts it; it reads a line of JSON and answers each with a line that begins with ``[``. What else it writes is not looked at.
        environment: of the process; None for this one's.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self._name = name
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
        )

    def ask(self, request: object) -> list[Any]:
        """Returns the answer to `request`.

        Raises:
            UserError: when the runtime has ended.
        """
        sent, answered = self._process.stdin, self._process.stdout
        if sent is None or answered is None:
            raise UserError(f"--against: {self._name} has no pipes to speak by")
        try:
            sent.write(json.dumps(request) + "\n")
            sent.flush()
        except BrokenPipeError:
            raise self._ended() from None
        for line in answered:
            if line.startswith("["):
                return list(json.loads(line))
        raise self._ended()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()

    def _ended(self) -> UserError:
        return UserError(f"--against: {self._name} has ended: it cannot read the model or its libraries")
