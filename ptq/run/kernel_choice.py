"""Who multiplies in a run: what a recipe asks for, checked before the work, and what is known of each kernel's speed here."""

from collections.abc import Iterator
from contextlib import contextmanager

from ptq.config.schema import Recipe
from ptq.config.scheme import linear_specs
from ptq.errors import UserError, one_of
from ptq.files import kernel_timings
from ptq.files.kernel_timings import read_timings
from ptq.network.network import Network
from ptq.ranks.world import Message
from ptq.run.session import Session, device_of
from quantize.kernels.base import SIMULATED
from quantize.kernels.choice import AUTO, Choice, describe, names
from quantize.kernels.fastest import KernelMismatch


def check_kernels(recipe: Recipe, network: Network) -> str:
    """Returns who will multiply, in a sentence.

    Raises:
        UserError: for a kernel that is not there, or that one of the quantized Linears cannot have here.
    """
    wanted, device = recipe.execution.kernels, device_of(recipe)
    if wanted not in names():
        raise UserError(f"execution.kernels: {wanted!r} is not valid: {one_of(wanted, names())}")
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
    return Choice(session.recipe.execution.kernels, read_timings(session.store, session.stream.device))


def keep_timings(session: Session, choice: Choice) -> None:
    """Keeps what was timed, beside what other runs have found meanwhile."""
    timed = session.world.broadcast(Message(choice.timings)).facts  # rank 0's: each rank may have timed others
    kernel_timings.keep_timings(session.store, session.stream.device, timed)


@contextmanager
def agreeing() -> Iterator[None]:
    """Ends the run where two kernels give results that differ by more than rounding.

    Raises:
        UserError: then, with what differs.
    """
    try:
        yield
    except KernelMismatch as error:
        raise UserError(
            f"execution.kernels: {error}: a library or the processor is at fault: use execution.kernels={SIMULATED}"
        ) from None
