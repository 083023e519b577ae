"""Who multiplies in a run: what a recipe asks for, checked before the work, and what is known of each kernel's speed here."""

import json

from ptq.config.schema import Recipe
from ptq.config.scheme import linear_specs
from ptq.errors import UserError, nearest
from ptq.files.atomic import write_text
from ptq.network.network import Network
from ptq.run.kept.identity import machine
from ptq.run.session import Session, device_of
from quantize.kernels.base import SIMULATED
from quantize.kernels.choice import AUTO, Choice, describe, names

TIMINGS = "kernel-timings"
"""Kind of the store's entry that says which kernel is fast here."""


def check_kernels(recipe: Recipe, network: Network) -> str:
    """Returns who will multiply, in a sentence.

    Raises:
        UserError: for a kernel that is not there, or that one of the quantized Linears cannot have here.
    """
    wanted, device = recipe.execution.kernels, device_of(recipe)
    if wanted not in names():
        raise UserError(
            f"execution.kernels: {wanted!r} is not valid: expected one of {', '.join(names())}{nearest(wanted, names())}"
        )
    choice = Choice(wanted)
    for name, shape in network.shapes.items():
        specs = linear_specs(recipe.scheme, name)
        if not specs.any:
            continue
        able, reason = choice.candidates(specs.weight, specs.input, shape, device)
        if not able and wanted not in {AUTO, SIMULATED}:
            others = [k.name for k in Choice().candidates(specs.weight, specs.input, shape, device)[0]]
            raise UserError(
                f"execution.kernels: {wanted!r} cannot multiply {name}: {reason}: use {', '.join([*others, AUTO, SIMULATED])}"
            )
        choice.multiplier(specs.weight, specs.input, shape, device)
    return describe(choice.ran, choice.refused)


def choice_of(session: Session) -> Choice:
    """Returns what the session's recipe asks for, with the timings of this machine, its versions and threads that are kept."""
    return Choice(session.recipe.execution.kernels, _timings(session))


def keep_timings(session: Session, choice: Choice) -> None:
    """Keeps what was timed, beside what other runs have found meanwhile."""
    known = _timings(session)
    if choice.timings.keys() - known.keys():
        text = json.dumps({**choice.timings, **known})
        key = machine(session.stream.device)
        session.store.add(TIMINGS, key, lambda path: write_text(path, text), "which kernel is fast here")


def _timings(session: Session) -> dict[str, dict[str, float]]:
    found = session.store.find(TIMINGS, machine(session.stream.device))
    if found is None:
        return {}
    try:
        return dict(json.loads(found.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        session.store.made_again(TIMINGS, str(error))
        return {}
