"""What quantizing each Linear's weight to each candidate format costs, in nats of KL to the baseline: one pass for all of them."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ptq.allocation.candidates import candidates, stored_bytes
from ptq.allocation.outside_costs import OutsideFisher
from ptq.allocation.quantized_weights import Quantize, chosen, solved_by, to_nearest
from ptq.calibration.fisher import (
    backward,
    block_inputs,
    cost_of_rows,
    embedding_gradients,
    gradients_dtype,
    output_gradients,
)
from ptq.calibration.kept_outputs import KeptOutputs, room_on
from ptq.config.scheme import linear_specs
from ptq.errors import UserError
from ptq.files.atomic import write_text
from ptq.files.bounded import parse_json
from ptq.network.block_stream import Flow
from ptq.network.network import Block, weight_of
from ptq.network.outside import RoundedOutside
from ptq.run.experiment import sources_of
from ptq.run.planning import open_context, plan_steps
from ptq.run.session import Session
from ptq.steps._step import TRANSFORM, Context, Solver, Step
from quantize.kernels.matmul import multiplies_bfloat16
from quantize.spec.quant_spec import QuantSpec

KIND = "sensitivity"
"""The kind of the store's entries."""
DRAWS = 4
"""At least so many squares of gradients are averaged, where there are as many samples."""


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing each Linear costs.

    Attributes:
        formats: the candidate formats by name.
        shapes: (out, in) of every Linear by full name.
        groups: full names of the Linears that a runtime keeps in one format (q/k/v, gate/up, a layer's experts), in order.
        costs: by Linear and format the KL divergence to the baseline that quantizing this weight alone is predicted to
            cause, nats a token. They add up over Linears.
        tokens: how many it was measured on.
        unreached: Linears that no token reached; they cost nothing as far as is known.
        solver: the step whose choices of weights are measured; None for rounding to nearest.
        outside: by full name those of `costs` that are no Linear of a block: ``embedding``, ``head``, or both where they are tied.
    """

    formats: dict[str, QuantSpec]
    shapes: dict[str, tuple[int, int]]
    groups: tuple[tuple[str, ...], ...]
    costs: dict[str, dict[str, float]]
    tokens: int
    unreached: tuple[str, ...] = ()
    outside: dict[str, tuple[str, ...]] = field(default_factory=dict)
    solver: str | None = None

    def bits(self, name: str, form: str) -> float:
        """Returns the stored bits a weight of one Linear in one format."""
        out, columns = self.shapes[name]
        return 8 * stored_bytes((out, columns), self.formats[form]) / (out * columns)

    def uniform_bits(self, form: str) -> float:
        """Returns the bits a weight of all these Linears in one format."""
        total = sum(stored_bytes(shape, self.formats[form]) for shape in self.shapes.values())
        return 8 * total / sum(out * columns for out, columns in self.shapes.values())

    def uniform_cost(self, form: str) -> float:
        """Returns the predicted KL, nats a token, of all these Linears in one format."""
        return sum(costs[form] for costs in self.costs.values())

    def save(self, path: pathlib.Path) -> None:
        """Writes it as JSON."""
        write_text(path, json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, path: pathlib.Path) -> "Sensitivity":
        """Reads what `save` wrote. Raises `ValueError` for anything else."""
        try:
            found = parse_json(path.read_text(encoding="utf-8"))
            return cls(
                {name: QuantSpec(**spec) for name, spec in found["formats"].items()},
                {name: (int(shape[0]), int(shape[1])) for name, shape in found["shapes"].items()},
                tuple(tuple(group) for group in found["groups"]),
                {name: {f: float(v) for f, v in costs.items()} for name, costs in found["costs"].items()},
                int(found["tokens"]),
                tuple(found["unreached"]),
                {name: tuple(tensors) for name, tensors in found["outside"].items()},
                found["solver"],
            )
        except (OSError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


@dataclass(frozen=True)
class Solving:
    """The recipe's solver, and the samples whose Hessians it goes by: `inputs` has what of them reaches each block."""

    name: str
    step: Solver
    flow: Flow
    inputs: list[torch.Tensor]


@dataclass(frozen=True)
class Forward:
    """The samples that a sensitivity is measured on.

    Attributes:
        context: of the recipe's transforms.
        flow: what leaves the last block.
        inputs: what reaches each block.
        solving: how weights are quantized; None where they are rounded to nearest.
        outputs: what the Linears gave, where there was memory for it.
        dtype: in which gradients are multiplied; None: as the model is.
    """

    context: Context
    flow: Flow
    inputs: list[torch.Tensor]
    solving: Solving | None = None
    outputs: KeptOutputs | None = None
    dtype: torch.dtype | None = None

    def quantize(self, formats: Mapping[str, QuantSpec]) -> Quantize:
        """Returns what quantizes the weights of a block to `formats`."""
        if self.solving is None:
            return to_nearest(self.context, formats)
        return solved_by(self.context, formats, self.solving.step, self.solving.flow, self.solving.inputs)


def open_forward(session: Session, steps: Mapping[str, Step], solved: int = 0) -> Forward:
    """Carries the calibration samples through the network as the recipe's transforms leave it, and keeps what reaches each block.

    Args:
        session: its calibration samples are used.
        steps: the recipe's.
        solved: how many of the samples, the last ones, are for the Hessians by which the recipe's solver quantizes weights: errors
            are measured on the others, since on its own samples a solver leaves less error than on any other text, least of
            all where columns are many. 0 for weights that are rounded to nearest.

    Raises:
        UserError: where NaN or inf arises.
    """
    transforms = {name: step for name, step in steps.items() if step.kind == TRANSFORM}
    solver = weighing_solver(steps) if solved else None
    # Static ranges of inputs, which a Hessian is of, need what the solver captures.
    context = open_context(session, transforms | ({} if solver is None else dict([solver])))
    plan_steps(session, transforms, context)
    stream, ids = session.stream, session.calibration_tokens().ids
    # What is measured is what rounding adds: nothing is rounded yet.
    stream.outside[:] = [change for change in stream.outside if not isinstance(change, RoundedOutside)]
    solving = None
    with session.journal.phase("forward"):
        # A batch's gradients are summed before they are squared: the random signs of its samples keep them apart.
        count = len(ids) - solved
        flow = stream.calibration(ids[:count], max(1, min(context.batch_size, count // DRAWS)))
        # What is multiplied in another type on the way back is not what the way forward gives.
        dtype = _gradients_dtype(session)
        kept = stream.hidden_states != "disk" and dtype is None
        outputs = KeptOutputs(room_on(stream.device) if kept else 0)
        inputs = block_inputs(stream, flow, context.shown, outputs=outputs)
        if solver is not None:
            others = stream.calibration(ids[count:], context.batch_size)
            solving = Solving(*solver, others, block_inputs(stream, others, context.shown, "forward, for Hessians"))
    if (place := flow.first_nonfinite()) is not None:
        raise UserError(f"NaN or inf in the unquantized model from {place} on: try model.dtype=float32")
    return Forward(context, flow, inputs, solving, outputs, dtype)


def weighing_solver(steps: Mapping[str, Step]) -> tuple[str, Solver] | None:
    """Returns the solver among these steps with its name, where it weighs errors by what Linears read."""
    found = [(name, step) for name, step in steps.items() if isinstance(step, Solver) and step.weighs]
    return found[0] if found else None


def measured(
    session: Session,
    steps: Mapping[str, Step],
    names: Sequence[str],
    given: bool,
    seed: int = 0,
    solved: int = 0,
) -> Sensitivity:
    """Returns the sensitivity of the session's model to the formats `names`, out of the store where it was measured before.

    Args:
        session: its recipe's calibration samples are used, its scheme and its transforms.
        steps: the recipe's.
        names: of candidates.
        given: whether somebody has named them, as in `candidates`.
        seed: of the random signs.
        solved: as in `open_forward`.

    Raises:
        UserError: for formats that do not fit, and where NaN or inf arises.
    """
    recipe = session.recipe
    found, dropped = candidates(names, recipe.scheme, recipe.export, session.network, given)
    for line in dropped:
        session.journal.say(f"formats: {line}")
    solver = weighing_solver(steps) if solved else None
    session.journal.say(
        f"costs: of {'rounding to nearest' if solver is None else f'what steps.{solver[0]} makes of weights'}"
    )
    if (dtype := _gradients_dtype(session)) is not None:
        session.journal.say(f"gradients: multiplied in {str(dtype).removeprefix('torch.')}, faster on this device")
    key = _key(session, steps, found, seed, solved)
    with session.store.found_or_mine(KIND, key, lambda line: session.journal.say(f"sensitivity: {line}")) as entry:
        if entry is not None:
            try:
                known = Sensitivity.load(entry)
            except ValueError as error:
                session.store.made_again(KIND, str(error))
            else:
                session.journal.say("sensitivity: measured before, read from the store")
                return known
        made = measure(session, open_forward(session, steps, solved), found, seed)
        session.store.add(KIND, key, made.save, session.about(session.calibration_tokens()))
        return made


def measure(session: Session, forward: Forward, formats: Mapping[str, QuantSpec], seed: int = 0) -> Sensitivity:
    """Measures the sensitivity to `formats` in one backward pass.

    Raises:
        UserError: where a gradient is NaN or inf.
    """
    context, flow, stream = forward.context, forward.flow, session.stream
    outside = OutsideFisher(session.recipe.scheme, session.network, stream.device)
    positions = flow.ids.shape[0] * (flow.ids.shape[1] - 1)
    sums: dict[str, dict[str, torch.Tensor]] = {}

    quantize = forward.quantize(formats)

    def entered(block: Block) -> Callable[[Mapping[str, torch.Tensor]], None]:
        errors = quantize(block)
        for name, weights in errors.items():
            exact = weight_of(context.module(name)).float()
            for weight in weights.values():
                weight.sub_(exact)

        def seen(gradients: Mapping[str, torch.Tensor]) -> None:
            for name in errors.keys() & gradients.keys():
                known = sums.setdefault(name, {})
                for form, error in errors[name].items():
                    cost = cost_of_rows(error, gradients[name]).double()
                    known[form] = known[form] + cost if form in known else cost

        return seen

    with session.journal.phase("head"):
        chunk = session.recipe.evaluation.chunk
        gradients = output_gradients(stream, flow.hidden, chunk, seed, outside.head, forward.dtype)
    with session.journal.phase("backward"):
        backward(stream, flow, forward.inputs, gradients, context.shown, entered, forward.outputs, forward.dtype)
        if outside.embedding is not None:
            embedding_gradients(stream, flow, gradients, outside.embedding)
    costs = {name: {form: float(v) / (2 * positions) for form, v in known.items()} for name, known in sums.items()}
    if outside.tensors:
        with stream.hold_outside():
            costs |= outside.costs(formats, positions)
    if bad := [name for name, known in costs.items() if not all(map(math.isfinite, known.values()))]:
        raise UserError(f"NaN or inf in the gradients at {bad[0]}: try model.dtype=float32")
    order = [name for block in session.network.blocks for name in chosen(session.recipe.scheme, block)]
    unreached = tuple(name for name in order if name not in costs)
    order += outside.tensors
    shapes = session.network.shapes | outside.shapes
    groups = [group for block in session.network.blocks for group in kept_together(context, block)]
    return Sensitivity(
        formats=dict(formats),
        shapes={name: shapes[name] for name in order},
        groups=(*groups, *((name,) for name in outside.tensors)),
        costs={name: costs.get(name, dict.fromkeys(formats, 0.0)) for name in order},
        tokens=positions,
        unreached=unreached,
        outside=outside.tensors,
        solver=None if forward.solving is None else forward.solving.name,
    )


def _gradients_dtype(session: Session) -> torch.dtype | None:
    return gradients_dtype(session.stream.device, session.loaded.model.dtype)


def kept_together(context: Context, block: Block) -> list[tuple[str, ...]]:
    """Returns the Linears of a block that runtimes keep in one format: those that read one tensor, and all its experts'."""
    quantized = {name for name in block.linears if linear_specs(context.scheme, name).weight is not None}
    experts = {name for names in block.experts.values() for name in names}
    groups: list[tuple[str, ...]] = []
    together: list[str] = []
    for stage in context.stages(block):
        alone = tuple(name for name in stage if name in quantized and name not in experts)
        together += [name for name in stage if name in quantized and name in experts]
        if alone:
            groups.append(alone)
    return [*groups, *([tuple(together)] if together else [])]


def _key(
    session: Session, steps: Mapping[str, Step], formats: Mapping[str, QuantSpec], seed: int, solved: int
) -> dict[str, object]:
    solver = dict([found]) if solved and (found := weighing_solver(steps)) else {}
    transforms = {name: step for name, step in steps.items() if step.kind == TRANSFORM}
    planned = {name: dataclasses.asdict(step.options) for name, step in transforms.items()}
    return {
        **session.key(session.calibration_tokens()),
        "scheme": dataclasses.asdict(session.recipe.scheme),
        "transforms": planned,
        "solved": solved,
        "solver": {name: dataclasses.asdict(step.options) for name, step in solver.items()},
        "sources": sources_of(transforms | solver),
        "statistics": session.recipe.calibration.statistics,
        "batch_size": session.recipe.calibration.batch_size,
        # Of two CPUs of one capability one may have such products, and round otherwise.
        "multiplies_bfloat16": multiplies_bfloat16(session.stream.device),
        "formats": {name: dataclasses.asdict(spec) for name, spec in formats.items()},
        "seed": seed,
    }
