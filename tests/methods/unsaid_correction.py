"""A method that corrects weights and does not say so: no export may lose what it adds."""

from ptq.steps.solvers.lowrank import Options
from ptq.steps.solvers.lowrank import Step as LowRank

__all__ = ["Options", "Step"]


class Step(LowRank):
    """Corrects weights, and names no place where it acts."""

    acts = frozenset()
