"""What ``torchrun`` says in the environment of a process that it starts; imports no torch."""

import os
from collections.abc import Mapping

from ptq.errors import UserError


def ranks_asked_for(environment: Mapping[str, str] = os.environ) -> int:
    """Returns how many ranks the environment, as ``torchrun`` makes it, says that this process is one of.

    Raises:
        UserError: for a number that is none.
    """
    text = environment.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"WORLD_SIZE: {text!r:.40} is no number of ranks: start this by torchrun, or unset it")
    return int(text)


def name_of_rank(environment: Mapping[str, str] = os.environ) -> str:
    """Returns what a line of this process begins with where it is one of several ranks and not the first, such as ``rank 1: ``."""
    rank = environment.get("RANK", "0")
    return "" if rank == "0" or environment.get("WORLD_SIZE", "1") == "1" else f"rank {rank:.9}: "
