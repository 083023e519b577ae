"""How many points fit beside one another: threads and memory divided among them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ptq.config.schema import Recipe
from ptq.files.store import store_of
from ptq.models.locations import locate
from ptq.network.skeleton import skeleton
from ptq.run.forecast.memory_estimate import PROCESS, estimate, memory_of
from ptq.steps._registry import build_steps


def threads_for(jobs: int) -> int:
    """Returns the threads of one of `jobs` points at once: what this process has, divided."""
    return max(1, torch.get_num_threads() // jobs)


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """Inside the context this process computes with so many threads: they are part of what a run's identity covers."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory_need(recipe: Recipe) -> int | None:
    """Returns the bytes that a process needs for points like `recipe`: the run's estimated peak, and the model that is kept
    for the next point. None where the model is on the hub and has not been looked at.
    """
    if locate(recipe.model).kind == "hub":
        return None
    network = skeleton(recipe.model, store_of(recipe))
    found = estimate(recipe, network, build_steps(recipe.steps))
    kept = found.phases["load"] if recipe.execution.weights == "resident" else 0
    return found.worst[1] + PROCESS + kept


def jobs_that_fit(jobs: int, recipes: Sequence[Recipe]) -> tuple[int, str]:
    """Returns how many of `jobs` points at once the machine has memory for, at least 1, and a line about it, or "".

    Of points that share model, calibration, evaluation and execution one is looked at.
    """
    if jobs == 1 or (found := _need_and_there(recipes)) is None:
        return jobs, ""
    need, there = found
    fit = max(1, min(jobs, there // need))
    line = f"memory: some {need / 2**30:.1f} GiB a point, {there / 2**30:.1f} GiB there"
    return fit, f"{line}: {fit} at once" + (f" instead of {jobs}" if fit < jobs else "")


def room_of(jobs: int, recipes: Sequence[Recipe]) -> int:
    """Returns the bytes that each of `jobs` processes may keep of what it computes of a model: half of what their points leave."""
    found = _need_and_there(recipes)
    return 0 if found is None else max(0, found[1] // jobs - found[0]) // 2


def _need_and_there(recipes: Sequence[Recipe]) -> tuple[int, int] | None:
    """Returns the memory that the greediest of some points needs, and what there is; None where neither is known."""
    kinds = {(r.model, r.calibration, r.evaluation, r.execution, tuple(r.steps)): r for r in recipes}
    needs = [need for recipe in kinds.values() if (need := memory_need(recipe)) is not None]
    return (max(needs), min(memory_of(recipe) for recipe in kinds.values())) if needs else None
