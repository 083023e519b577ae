"""A run that is killed in the middle."""

import pytest

from ptq.run.experiment import run
from ptq.run.kept.kept_pass import KeptPass


class Killed(BaseException):
    """Stands for a signal that nothing can catch."""


def interrupted(monkeypatch, recipe, blocks):
    """Runs until so many blocks are kept."""
    keep, done = KeptPass.keep, []

    def killed(self, block):
        keep(self, block)
        done.append(block)
        if len(done) == blocks:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(KeptPass, "keep", killed)
        with pytest.raises(Killed):
            run(recipe)
