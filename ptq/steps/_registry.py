"""From a recipe's steps to `Step` objects: shipped ones by name, others by the import path in ``_target_``."""

import dataclasses
import functools
import importlib
import pkgutil
import shlex
from collections.abc import Mapping
from typing import Any

import ptq.steps.solvers
import ptq.steps.transforms
import ptq.steps.tuners
from ptq.config.building import build
from ptq.config.options import in_yaml
from ptq.errors import UserError, nearest
from ptq.steps._step import SOLVER, TRANSFORM, TUNER, Step

KINDS = (TRANSFORM, SOLVER, TUNER)
TARGET = "_target_"
"""The key of a step's import path, for one that does not come with this package."""


@functools.cache
def shipped() -> Mapping[str, str]:
    """Returns the steps that come with this package, one module each: by name, where that module is."""
    folders = {
        m.__name__: list(m.__path__) for m in (ptq.steps, ptq.steps.transforms, ptq.steps.solvers, ptq.steps.tuners)
    }
    found = [
        (m.name, f"{at}.{m.name}") for at, path in folders.items() for m in pkgutil.iter_modules(path) if not m.ispkg
    ]
    return dict(sorted((name, module) for name, module in found if not name.startswith("_")))


def with_defaults(steps: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the steps of a recipe with all their options, the defaults written out: two spellings of one are one.

    Raises:
        UserError: as `build_steps`.
    """
    full = {}
    for name, given in steps.items():
        options = dict(given or {})
        _, schema = _found(name, options.pop(TARGET, None))
        path = {TARGET: given[TARGET]} if TARGET in (given or {}) else {}
        full[name] = path | dataclasses.asdict(build(schema, options, f"steps.{name}"))
    return full


def build_steps(steps: dict[str, dict[str, Any]]) -> dict[str, Step]:
    """Builds the steps of a recipe, in order.

    A step is a class with a dataclass `Options` beside it in its module; unknown options are refused like any other key.

    Raises:
        UserError: for an unknown step, an import path that leads nowhere, wrong options, or an order that makes no sense.
    """
    built = {name: _build(name, dict(options or {})) for name, options in steps.items()}
    _check_order(built, steps)
    return built


def _check_order(steps: dict[str, Step], given: dict[str, dict[str, Any]]) -> None:
    """Transforms come first, then at most one solver: a quantized weight is neither scaled nor quantized again; then at most one
    tuner.

    Of the transforms one that goes by what the others leave comes last.
    """
    solver = measured = tuner = ""
    for name, step in steps.items():
        if step.kind not in KINDS:
            raise UserError(f"steps.{name}: its kind is {step.kind!r}: expected {', '.join(map(repr, KINDS))}")
        if tuner:
            raise UserError(
                f"steps.{name}: after steps.{tuner}, which learns on the finished network: put steps.{tuner} last, once"
            )
        if step.kind == TUNER:
            if not solver:
                raise UserError(
                    f"steps.{name}: no solver before it has quantized anything: put it after one such as gptq"
                )
            tuner = name
            continue
        if solver and step.kind == TRANSFORM:
            words = (f"~steps.{solver}", *(f"+steps.{key}={in_yaml(given[key] or {})}" for key in (name, solver)))
            raise UserError(
                f"steps.{name}: a transform after the solver {solver}, which leaves quantized weights: put steps.{name} "
                f"before steps.{solver}, on a command line by {shlex.join(words)}"
            )
        if solver:
            raise UserError(
                f"steps.{name}: a second solver after {solver}: keep one (~steps.{solver} removes the other)"
            )
        if measured and step.kind == TRANSFORM:
            raise UserError(
                f"steps.{name}: changes what steps.{measured} has measured: put steps.{name} before steps.{measured}"
            )
        measured = name if step.last else measured
        solver = name if step.kind == SOLVER else ""


def _build(name: str, options: dict[str, Any]) -> Step:
    step, schema = _found(name, options.pop(TARGET, None))
    built: Step = step(build(schema, options, f"steps.{name}"))
    return built


def _found(name: str, target: Any) -> tuple[type[Step], type]:
    """Returns a step's class and that of its options; of what comes from outside nothing runs beyond its import."""
    field = f"steps.{name}.{TARGET}"
    if target is None and name not in shipped():
        hint = nearest(name, shipped())
        raise UserError(f"steps.{name}: no such step{hint}; one from outside has {field}=module.Class")
    if target is not None and (not isinstance(target, str) or not all(map(str.isidentifier, target.split(".")))):
        raise UserError(f"{field}: {target!r:.80} is no import path: give module.Class")
    module_name, _, class_name = (target or f"{shipped()[name]}.Step").rpartition(".")
    try:
        module = importlib.import_module(module_name)
        step = getattr(module, class_name)
    except Exception as error:  # the module is somebody's own: whatever it raises is told with its type
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(f"{field}: {target!r} cannot be imported ({reason}): give module.Class") from None
    schema = getattr(module, "Options", None)
    if not (isinstance(step, type) and issubclass(step, Step)):
        raise UserError(
            f"{field}: {target!r} is no step: a class of its own based on ptq.steps.Transform, Solver or Tuner"
        )
    if not (isinstance(schema, type) and dataclasses.is_dataclass(schema)):
        raise UserError(f"{field}: {module_name} has no dataclass Options beside {class_name}: add one")
    return step, schema
