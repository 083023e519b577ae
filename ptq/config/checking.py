"""Values that the fields of a recipe cannot have, alone or together; needs no model and no data."""

import re

from ptq.config.cache import check_cache, check_rounded
from ptq.config.options import check_fields
from ptq.config.schema import AT_MOST, CalibrationConfig, Recipe, SchemeConfig, TextConfig
from ptq.errors import UserError, nearest, one_of
from quantize.spec.quant_spec import QuantSpec, SpecError
from quantize.spec.rules import OUTSIDE, TENSORS, TensorRuleError, check_tensor

NAME = re.compile(r"[A-Za-z0-9._-]{1,100}", re.ASCII)
"""What a recipe may be called: the name of a folder on every system, below `outputs` and nowhere else."""


def check(recipe: Recipe) -> None:
    """Raises `UserError` for values that no part of a recipe can use together; needs no model and no data."""
    check_name(recipe.name)
    check_fields(recipe, "")
    if not 0 < recipe.evaluation.confidence < 1:
        raise UserError(f"evaluation.confidence: {recipe.evaluation.confidence} is not between 0 and 1: use 0.95")
    _check_bos("calibration.bos", recipe.calibration.bos)
    _check_bos("evaluation.bos", recipe.evaluation.bos)
    _check_text("data.calibration", recipe.data.calibration)
    _check_text("data.evaluation", recipe.data.evaluation)
    _check_seed(recipe.calibration, recipe.data.calibration)
    _check_experts(recipe.calibration.experts)
    _check_tuning_samples(recipe.calibration.tuning_samples)
    if recipe.evaluation.task_samples is not None and not recipe.evaluation.tasks:
        raise UserError(
            f"evaluation.task_samples: {recipe.evaluation.task_samples} changes nothing without evaluation.tasks: leave it out"
        )
    check_specs(recipe.scheme)
    check_rounded(recipe.scheme.cache, recipe.evaluation.length)


def check_name(name: str) -> None:
    """Raises `UserError` for a name that no folder below `outputs` can have."""
    if not NAME.fullmatch(name) or not name.strip("."):
        raise UserError(
            f"name: {name[:120]!r} is not valid: use 1 to 100 letters, digits, . _ or -, such as {named(name)}"
        )


def named(text: str) -> str:
    """Returns the valid name that is nearest to `text`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:100] or "recipe"


def _check_bos(path: str, bos: bool | str) -> None:
    if isinstance(bos, str) and bos != "auto":
        raise UserError(f"{path}: {bos!r} is not valid: expected auto, true or false")


def _check_seed(calibration: CalibrationConfig, text: TextConfig) -> None:
    """A seed draws windows where sampling is random; slices of C4's documents are always drawn."""
    sliced = any((part.source, part.variant) == ("c4", "old") for part in (text, *text.mix))
    if calibration.seed and calibration.sampling != "random" and not sliced:
        raise UserError(
            f"calibration.seed: {calibration.seed} changes nothing beside calibration.sampling={calibration.sampling}: "
            "leave it out, or use calibration.sampling=random"
        )


def _check_tuning_samples(samples: int | str) -> None:
    known = "0 or more windows, or at-most-N, such as at-most-256"
    if isinstance(samples, bool) or (isinstance(samples, int) and samples < 0):
        raise UserError(f"calibration.tuning_samples: {samples!r} is not valid: expected {known}: use 0")
    if isinstance(samples, str) and not re.fullmatch(rf"{AT_MOST}[1-9][0-9]{{0,8}}", samples):
        raise UserError(f"calibration.tuning_samples: {samples!r} is not valid: expected {known}")


def _check_experts(experts: str) -> None:
    if experts not in {"routed", "all"} and not re.fullmatch(r"at-least-[1-9][0-9]*", experts):
        known = ("routed", "all", "at-least-64")
        raise UserError(
            f"calibration.experts: {experts!r} is not valid: expected routed, all or at-least-N, such as at-least-64"
            f"{nearest(experts, known)}"
        )


def check_specs(scheme: SchemeConfig) -> None:
    """Raises `UserError` for a spec that its tensor cannot have; needs no model."""
    for tensor in TENSORS:
        _check_tensor(f"scheme.{tensor}", tensor, getattr(scheme, tensor))
    for tensor in OUTSIDE:
        _check_tensor(f"scheme.{tensor}", "weight", spec := getattr(scheme, tensor))
        if spec is not None and spec.granularity == "cluster":
            raise UserError(
                f"scheme.{tensor}.granularity: 'cluster', but its channels have no clusters: use channel or group"
            )
    for i, override in enumerate(scheme.overrides):
        for tensor, spec in override.tensors.items():
            _choice(f"scheme.overrides[{i}].tensors", tensor, TENSORS)
            _check_tensor(f"scheme.overrides[{i}].tensors.{tensor}", tensor, spec)
    check_cache(scheme.cache, _specs_of(scheme))


def _specs_of(scheme: SchemeConfig) -> list[tuple[str, str, QuantSpec]]:
    """Returns (path in the recipe, tensor, spec) of every spec of a scheme."""
    given = [(f"scheme.{tensor}", tensor, getattr(scheme, tensor)) for tensor in TENSORS]
    for i, override in enumerate(scheme.overrides):
        given += [
            (f"scheme.overrides[{i}].tensors.{tensor}", tensor, spec) for tensor, spec in override.tensors.items()
        ]
    return [(path, tensor, spec) for path, tensor, spec in given if spec is not None]


def _check_text(path: str, text: TextConfig) -> None:
    if text.source == "file" and not text.path:
        raise UserError(f"{path}.path: null, but source is file: name a .txt, .jsonl or .parquet file")
    if text.source == "mix" and not text.mix:
        raise UserError(f"{path}.mix: empty, but source is mix: list the texts to mix")
    if text.source in {"c4", "ptb"} and text.variant is None:
        raise UserError(f"{path}.variant: null, but {text.source} has two: use old or new")
    if text.source == "file" and text.text_column != "text" and str(text.path).lower().endswith(".txt"):
        raise UserError(f"{path}.text_column: {text.text_column!r}, but a .txt file has no columns: leave it out")
    for i, part in enumerate(text.mix):
        if part.source == "mix":
            raise UserError(f"{path}.mix[{i}].source: 'mix' inside a mix: list the texts in one mix")
        _check_text(f"{path}.mix[{i}]", part)


def _check_tensor(path: str, tensor: str, spec: QuantSpec | None) -> None:
    if spec is None:
        return
    try:
        check_tensor(tensor, spec)
    except SpecError as error:
        raise refused(path, error) from None


def refused(path: str, error: SpecError) -> UserError:
    """Returns the one line for a spec that is refused; `path` is its place in the recipe."""
    where = f"{path}.{error.field}" if path else error.field
    if isinstance(error, TensorRuleError):
        return UserError(f"{where}: {error.sentence}")
    close = nearest(str(error.value), error.choices) if error.choices else ""
    return UserError(f"{where}: {error.value!r} is not valid: expected {error.expected}{close}")


def _choice(path: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{path}: {value!r} is not valid: {one_of(value, choices)}")
