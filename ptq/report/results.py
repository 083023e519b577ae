"""What a run leaves: recipe.yaml, metrics.json, layers.csv, environment.json, and the table at the end."""

import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from rich.table import Table

from ptq.config.schema import Recipe
from ptq.evaluation.comparison import Comparison
from ptq.files.atomic import write_text
from quantize.spec.quant_spec import QuantSpec


@dataclass(frozen=True)
class LayerResult:
    """One Linear: what it was given, and how far its weights and its output moved.

    `weight_sqnr_db` is the signal-to-quantization-noise ratio of the weights; `output_error` is the norm of the output's
    change over the output's norm, on rows of the first evaluation batch as they reach it in the quantized model; None for a
    Linear that no token reached.
    `outlier_share` is the share of the input's columns that LLM.int8() leaves in floating point in that batch; None for
    other formats.
    """

    name: str
    role: str
    weight: str
    weight_bits: float
    input: str
    input_bits: float
    weight_sqnr_db: float
    output_error: float | None
    parameters: int
    outlier_share: float | None = None


@dataclass(frozen=True)
class Size:
    """Bytes of the weights before (baseline's dtype) and after, and bits per quantized weight with scales and zero points."""

    before_bytes: int
    after_bytes: int
    bits_per_weight: float
    quantized_parameters: int
    parameters: int


def describe_spec(spec: QuantSpec | None, bits: int) -> str:
    """Returns a spec in a few words, such as ``int8 token dynamic symmetric``; for None, the unquantized type of `bits`."""
    if spec is None:
        return f"{bits}-bit float"
    group = f" {spec.group_size}" if spec.group_size else ""
    when = " dynamic" if spec.dynamic else ""
    if not spec.affine:
        scales = " double-quantized" if spec.double_quant else ""
        kept = f" threshold {spec.threshold:g}" if spec.format == "llm_int8" else ""
        return f"{spec.format} {spec.granularity}{group}{when}{scales}{kept}"
    kept = f" clip {spec.clip:g}" if spec.clip != 1 else ""
    return f"{spec.format}{spec.bits} {spec.granularity}{group}{when} {'symmetric' if spec.symmetric else 'asymmetric'}{kept}"


def write_results(
    folder: pathlib.Path,
    recipe: Recipe,
    comparison: Comparison,
    size: Size,
    layers: list[LayerResult],
    facts: dict[str, Any],
    environment: dict[str, Any],
) -> None:
    """Writes the files of a finished run into `folder`, each whole or not at all."""
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe.as_dict(), sort_keys=False))
    metrics = {**dataclasses.asdict(comparison), "size": dataclasses.asdict(size), **facts}
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_text(folder / "layers.csv", _csv(layers))
    write_text(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def table(
    recipe: Recipe, comparison: Comparison, size: Size, facts: dict[str, Any], seconds: dict[str, float]
) -> Table:
    """Returns the table that ends a run."""
    c = comparison
    rows = [
        ("baseline perplexity", f"{c.baseline_perplexity:.4f}  ({facts['baseline']})"),
        ("quantized perplexity", f"{c.quantized_perplexity:.4f}  ({c.ratio:.4f} x, simulated)"),
        (
            "difference",
            f"{c.difference:+.4f}  [{c.difference_low:+.4f}, {c.difference_high:+.4f}] at {c.confidence:.0%}",
        ),
        ("KL(baseline || quantized)", f"mean {c.kl_mean:.5f}, 99th percentile {c.kl_p99:.5f} nats a token"),
        ("top-1 agreement", f"{c.top1_agreement:.2%}"),
        (
            "bits per weight",
            f"{size.bits_per_weight:.3f}  ({size.quantized_parameters / size.parameters:.1%} of the parameters)",
        ),
        *_outliers(facts["outlier_share"]),
        ("size", f"{size.before_bytes / 1e6:.1f} MB -> {size.after_bytes / 1e6:.1f} MB"),
        ("tokens", f"{c.windows} windows, {c.tokens} targets, {facts['evaluation_source']}"),
        ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())),
    ]
    result = Table(title=recipe.name, show_header=False, title_justify="left")
    for row in rows:
        result.add_row(*row)
    return result


def outlier_share(layers: list[LayerResult]) -> float | None:
    """Returns the mean `outlier_share` of the Linears that have one, None where none has."""
    shares = [layer.outlier_share for layer in layers if layer.outlier_share is not None]
    return sum(shares) / len(shares) if shares else None


def _outliers(share: float | None) -> list[tuple[str, str]]:
    return [] if share is None else [("outlier columns", f"{share:.2%} of an input's columns stay in floating point")]


@dataclass(frozen=True)
class TensorKind:
    """Tensors of one kind in one format: `tensor` such as ``q_proj weight``, how many modules have it, and their `share`
    of the model's parameters (0 for activations).
    """

    tensor: str
    format: str
    modules: int
    share: float


def tensor_kinds(
    layers: list[LayerResult], size: Size, attention: Mapping[str, Mapping[str, str]], weight_bits: int
) -> list[TensorKind]:
    """Returns every kind of tensor with its format: weights and inputs of Linears, tensors inside attentions, and the rest.

    Args:
        layers: the quantized Linears.
        size: for the number of parameters.
        attention: formats by tensor (query, key, value, attention_probs) by attention module.
        weight_bits: bits of a baseline weight.
    """
    groups: dict[tuple[str, str], list[LayerResult]] = {}
    for layer in layers:
        kind = layer.name.rpartition(".")[2]
        groups.setdefault((f"{kind} weight", layer.weight), []).append(layer)
        groups.setdefault((f"{kind} input", layer.input), []).append(layer)
    rows = [
        TensorKind(
            tensor, words, len(found), sum(x.parameters for x in found) / size.parameters if "weight" in tensor else 0.0
        )
        for (tensor, words), found in groups.items()
    ]
    for tensor in ("query", "key", "value", "attention_probs"):
        formats = [found[tensor] for found in attention.values() if tensor in found]
        rows += [TensorKind(tensor, words, formats.count(words), 0.0) for words in dict.fromkeys(formats)]
    covered = sum(layer.parameters for layer in layers) / size.parameters
    return [
        *rows,
        TensorKind("everything else (embedding, head, norms, ...)", f"{weight_bits}-bit float", 0, 1 - covered),
    ]


def tensor_table(kinds: list[TensorKind]) -> Table:
    """Returns the table of every kind of tensor with its format and its share of the parameters."""
    table = Table(title="tensors", title_justify="left")
    for column in ("tensor", "format"):
        table.add_column(column)
    for column in ("modules", "share of parameters"):
        table.add_column(column, justify="right")
    for kind in kinds:
        table.add_row(kind.tensor, kind.format, str(kind.modules or ""), f"{kind.share:.1%}" if kind.share else "")
    return table


def _csv(layers: list[LayerResult]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [f.name for f in dataclasses.fields(LayerResult)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(layer) for layer in layers)
    return buffer.getvalue()
