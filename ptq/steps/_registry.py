"""From a recipe's steps to `Step` objects: shipped ones by name, others by the import path in ``_target_``."""

import importlib
import pkgutil
from typing import Any

import ptq.steps.solvers
import ptq.steps.transforms
from ptq.config.building import build
from ptq.errors import UserError, nearest
from ptq.steps._step import SOLVER, TRANSFORM, Step


def shipped() -> dict[str, str]:
    """Returns the steps that come with this package, one module each: by name, where that module is."""
    folders = {m.__name__: list(m.__path__) for m in (ptq.steps, ptq.steps.transforms, ptq.steps.solvers)}
    found = [
        (m.name, f"{at}.{m.name}") for at, path in folders.items() for m in pkgutil.iter_modules(path) if not m.ispkg
    ]
    return dict(sorted((name, module) for name, module in found if not name.startswith("_")))


def build_steps(steps: dict[str, dict[str, Any]]) -> dict[str, Step]:
    """Builds the steps of a recipe, in order.

    A step is a class with a dataclass `Options` beside it in its module; unknown options are refused like any other key.

    Raises:
        UserError: for an unknown step, an import path that leads nowhere, wrong options, or an order that makes no sense.
    """
    built = {name: _build(name, dict(options or {})) for name, options in steps.items()}
    _check_order(built)
    return built


def _check_order(steps: dict[str, Step]) -> None:
    """Transforms come first, then at most one solver: a quantized weight is neither scaled nor quantized again."""
    solver = ""
    for name, step in steps.items():
        if step.kind not in {TRANSFORM, SOLVER}:
            raise UserError(f"steps.{name}: its kind is {step.kind!r}: expected {TRANSFORM!r} or {SOLVER!r}")
        if solver and step.kind == TRANSFORM:
            raise UserError(
                f"steps.{name}: a transform after the solver {solver}, which leaves quantized weights: "
                f"put steps.{name} before steps.{solver}"
            )
        if solver:
            raise UserError(
                f"steps.{name}: a second solver after {solver}: keep one (~steps.{solver} removes the other)"
            )
        solver = name if step.kind == SOLVER else ""


def _build(name: str, options: dict[str, Any]) -> Step:
    target = options.pop("_target_", None)
    if target is None and name not in shipped():
        raise UserError(f"steps.{name}: no such step{nearest(name, shipped())}")
    module_name, _, class_name = (target or f"{shipped()[name]}.Step").rpartition(".")
    try:
        module = importlib.import_module(module_name)
        step, schema = getattr(module, class_name), module.Options
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"steps.{name}._target_: {target!r} cannot be imported ({error}): give module.Class") from None
    built: Step = step(build(schema, options, f"steps.{name}"))
    return built
