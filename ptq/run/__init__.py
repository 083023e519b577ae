"""One experiment: session, checks before the work, plan, quantization, resume, journal.

Not here: many experiments, command lines (`ptq.cli`). ``ptq.run(recipe, overrides)`` is the Python door
(`ptq.cli.door.run`): it has the name of this folder, so the folder can be called.
"""

import importlib
import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """This module, which can be called as ``ptq.run``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `ptq.cli.door.run`."""
        # By name: the door composes recipes, which is the edge's, and nothing here imports the edge.
        return importlib.import_module("ptq.cli.door").run(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
