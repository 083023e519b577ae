"""The only schema: a recipe as plain dataclasses, checked before any work. Nothing here knows Hydra."""

import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from ptq.errors import UserError, nearest
from quantize.spec.quant_spec import QuantSpec, SpecError
from quantize.spec.rules import TENSORS, TensorRuleError, check_tensor

SOURCES = ("docs", "file", "wikitext2", "c4", "ptb", "pile", "mix")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is read.

    Attributes:
        path: hub id, local directory, a ``.gguf`` file, or ``package:<module>/<file>``.
        revision: branch, tag or commit on the hub.
        dtype: ``auto`` (fp32 arithmetic on CPU, the checkpoint's 16-bit type on CUDA), ``float32``, ``float16``, ``bfloat16``.
        trust_remote_code: run Python code that comes with the model. Off unless asked for.
    """

    path: str
    revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class TextConfig:
    """A text to draw tokens from.

    Attributes:
        source: ``docs`` (CPython's own documentation), ``file``, ``wikitext2``, ``c4``, ``ptb``, ``pile`` or ``mix``.
        variant: ``old`` or ``new`` for ``c4`` and ``ptb`` (METHODS.md section 8), null otherwise.
        split: ``train``, ``validation`` or ``test``; for ``docs`` disjoint parts of the text.
        path: the file, with source ``file`` (``.txt``, ``.jsonl`` or ``.parquet``).
        text_column: the column or key with the text in ``.jsonl`` and ``.parquet``.
        mix: the texts to draw from in equal parts, with source ``mix``.
    """

    source: str = "docs"
    variant: str | None = None
    split: str = "train"
    path: str | None = None
    text_column: str = "text"
    mix: tuple["TextConfig", ...] = ()


@dataclass(frozen=True)
class DataConfig:
    """The texts of a recipe: one to calibrate on, one to evaluate on."""

    calibration: TextConfig = field(default_factory=TextConfig)
    evaluation: TextConfig = field(default_factory=lambda: TextConfig(split="test"))


@dataclass(frozen=True)
class CalibrationConfig:
    """How calibration samples are drawn: `samples` windows of `length` tokens, ``contiguous`` from the start or ``random``.

    `statistics` names a file written by gen_act_stat.py to read instead of calibrating again.
    """

    samples: int = 64
    length: int = 512
    sampling: str = "contiguous"
    seed: int = 0
    bos: bool = False
    batch_size: int = 4
    statistics: str | None = None


@dataclass(frozen=True)
class EvaluationConfig:
    """The perplexity protocol (METHODS.md section 8) and the paired comparison.

    `windows` non-overlapping windows of `length` tokens (null: all there are). The interval is a bootstrap over windows
    with `resamples` draws, seeded by `seed`, at `confidence`. `chunk` is the number of tokens whose logits exist at once.
    """

    windows: int | None = 16
    length: int = 1024
    bos: bool = False
    batch_size: int = 1
    chunk: int = 128
    resamples: int = 10000
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Override:
    """Changes the scheme for the modules whose name matches the glob `modules`; a tensor set to null is left unquantized."""

    modules: str
    tensors: dict[str, QuantSpec | None]


@dataclass(frozen=True)
class SchemeConfig:
    """Which tensor of a block gets which `QuantSpec`; null leaves it unquantized. Of the overrides the last match wins.

    `exclude` holds globs of modules that are never replaced (the head and embeddings are outside the blocks and left alone).
    """

    weight: QuantSpec | None = None
    input: QuantSpec | None = None
    query: QuantSpec | None = None
    key: QuantSpec | None = None
    value: QuantSpec | None = None
    attention_probs: QuantSpec | None = None
    overrides: tuple[Override, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExecutionConfig:
    """Where the work happens. None of these change results beyond float rounding.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        weights: ``resident`` (whole model in memory) or ``offloaded`` (one block in memory, the rest on disk).
        hidden_states: ``memory`` or ``disk`` (memory-mapped).
        save: write the quantized weights (codes and scales) into the run's folder.
    """

    device: str = "auto"
    weights: str = "resident"
    hidden_states: str = "memory"
    save: bool = False


@dataclass(frozen=True)
class ExportConfig:
    """A format that another runtime loads: `format` names an exporter, `options` are its own (docs/exports.md)."""

    format: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One experiment. `steps` maps a step's name to its options, in order of execution."""

    name: str
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    scheme: SchemeConfig = field(default_factory=SchemeConfig)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    export: ExportConfig | None = None
    outputs: str = "outputs"
    store: str = "~/.cache/ptq"

    def as_dict(self) -> dict[str, Any]:
        """Returns the fully resolved recipe as plain, JSON-able containers."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def digest(self) -> str:
        """Returns 12 hex digits over everything that describes the experiment (not where its files go)."""
        content = {key: value for key, value in self.as_dict().items() if key not in {"outputs", "store"}}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def build(cls: type, value: Any, path: str = "") -> Any:
    """Builds dataclass `cls` out of the mapping `value`; unknown keys, wrong types and missing keys raise `UserError`.

    Args:
        cls: a dataclass of this module.
        value: plain containers, as read from YAML.
        path: the dotted name of `value` in the recipe, for messages.
    """
    if not isinstance(value, dict):
        raise UserError(f"{path or 'recipe'}: {value!r} is not a mapping: expected the keys {', '.join(_names(cls))}")
    hints = typing.get_type_hints(cls)
    for key in value:
        if key not in hints:
            raise UserError(f"{_join(path, str(key))}: no such key (value {value[key]!r}){nearest(str(key), hints)}")
    for f in dataclasses.fields(cls):
        if f.name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{_join(path, f.name)}: missing: give it a value")
    arguments = {key: _convert(hints[key], item, _join(path, key)) for key, item in value.items()}
    try:
        return cls(**arguments)
    except SpecError as error:
        raise _refused(path, error) from None


def _refused(path: str, error: SpecError) -> UserError:
    if isinstance(error, TensorRuleError):
        return UserError(f"{_join(path, error.field)}: {error.sentence}")
    close = nearest(str(error.value), error.choices) if error.choices else ""
    return UserError(f"{_join(path, error.field)}: {error.value!r} is not valid: expected {error.expected}{close}")


def recipe_from(value: dict[str, Any]) -> Recipe:
    """Builds and checks a `Recipe` out of plain containers. Raises `UserError` with one line for the first mistake."""
    recipe = build(Recipe, value)
    check(recipe)
    return recipe


def check(recipe: Recipe) -> None:
    """Raises `UserError` for values that no part of a recipe can use together; needs no model and no data."""
    _choice("model.dtype", recipe.model.dtype, ("auto", "float32", "float16", "bfloat16"))
    _choice("execution.weights", recipe.execution.weights, ("resident", "offloaded"))
    _choice("execution.hidden_states", recipe.execution.hidden_states, ("memory", "disk"))
    _choice("calibration.sampling", recipe.calibration.sampling, ("contiguous", "random"))
    for name, least in (("samples", 1), ("length", 2), ("batch_size", 1)):
        _at_least(f"calibration.{name}", getattr(recipe.calibration, name), least)
    for name, least in (("windows", 1), ("length", 2), ("batch_size", 1), ("chunk", 1), ("resamples", 100)):
        _at_least(f"evaluation.{name}", getattr(recipe.evaluation, name), least)
    if not 0 < recipe.evaluation.confidence < 1:
        raise UserError(f"evaluation.confidence: {recipe.evaluation.confidence} is not between 0 and 1: use 0.95")
    _check_text("data.calibration", recipe.data.calibration)
    _check_text("data.evaluation", recipe.data.evaluation)
    check_specs(recipe.scheme)


def check_specs(scheme: SchemeConfig) -> None:
    """Raises `UserError` for a spec that its tensor cannot have; needs no model."""
    for tensor in TENSORS:
        _check_tensor(f"scheme.{tensor}", tensor, getattr(scheme, tensor))
    for i, override in enumerate(scheme.overrides):
        for tensor, spec in override.tensors.items():
            _choice(f"scheme.overrides[{i}].tensors", tensor, TENSORS)
            _check_tensor(f"scheme.overrides[{i}].tensors.{tensor}", tensor, spec)


def _check_text(path: str, text: TextConfig) -> None:
    _choice(f"{path}.source", text.source, SOURCES)
    if text.source == "file" and not text.path:
        raise UserError(f"{path}.path: null, but source is file: name a .txt, .jsonl or .parquet file")
    if text.source == "mix" and not text.mix:
        raise UserError(f"{path}.mix: empty, but source is mix: list the texts to mix")
    if text.source in {"c4", "ptb"}:
        _choice(f"{path}.variant", text.variant or "null", ("old", "new"))
    elif text.variant is not None:
        raise UserError(f"{path}.variant: {text.variant!r}, but {text.source} has no variants: use null")
    _choice(f"{path}.split", text.split, ("train", "validation", "test"))
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
        raise _refused(path, error) from None


def _choice(path: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(
            f"{path}: {value!r} is not valid: expected one of {', '.join(choices)}{nearest(value, choices)}"
        )


def _at_least(path: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise UserError(f"{path}: {value} is too small: use {least} or more")


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, path)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path}: {value!r} is not a list")
        return tuple(_convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{path}: {value!r} is not a mapping")
        return {str(key): _convert(arguments[1], item, _join(path, str(key))) for key, item in value.items()}
    if hint is Any:
        return value
    return _scalar(hint, value, path)


def _scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint or (isinstance(value, float) and not math.isfinite(value)):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise UserError(f"{path}: {value!r} is not {words[hint]}")
    return value
