"""What a run leaves: recipe.yaml, metrics.json, layers.csv, environment.json, and the schemas of their fields.

docs/results-files.md has every field; it is written from the docstrings here and in `ptq.evaluation`.
"""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml

from ptq.config.schema import Recipe
from ptq.evaluation.comparison import Comparison
from ptq.evaluation.tasks.accuracy import TaskResult
from ptq.files.atomic import write_text
from ptq.report.json_files import as_json, schema_of
from quantize.modules.cache import CacheFormat
from quantize.spec.quant_spec import QuantSpec
from quantize.spec.rules import OUTSIDE


@dataclass(frozen=True)
class LayerResult:
    """One Linear: what it was given, and how far its weights and its output moved. A row of layers.csv.

    Attributes:
        name: the Linear's full name in the model.
        role: ``query``, ``key`` or ``value`` where its output is that part of an attention, else empty.
        weight: format of the weight.
        weight_bits: bits a weight, with scales and zero points.
        input: format of the input.
        input_bits: bits of an input's element.
        weight_sqnr_db: signal-to-quantization-noise ratio of the weight, dB.
        output_error: norm of the output's change over the output's norm, on rows of the first evaluation batch as they reach
            the Linear in the quantized model; null for a Linear that no token reached.
        parameters: elements of the weight.
        outlier_share: share of the input's columns that LLM.int8() leaves in floating point in that batch, 0 to 1; null for
            other formats.
        tokens: calibration tokens that reached the Linear; null where none were shown to it one by one.
        routed: those of them that the router had sent to its expert; null for a Linear of no expert.
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
    tokens: int | None = None
    routed: int | None = None


@dataclass(frozen=True)
class Size:
    """What the weights take.

    Attributes:
        before_bytes: bytes of all weights in the baseline's type.
        after_bytes: bytes of all weights, the quantized ones as they are stored, with scales and zero points.
        untied_bytes: those of a head that was the embedding's weight, in the baseline's type, where a step has made it one of its own;
            after_bytes has them too, before_bytes has not.
        bits_per_weight: bits a quantized weight, with scales and zero points.
        quantized_parameters: number of quantized weights.
        parameters: number of weights in all.
    """

    before_bytes: int
    after_bytes: int
    untied_bytes: int
    bits_per_weight: float
    quantized_parameters: int
    parameters: int


@dataclass(frozen=True)
class TensorKind:
    """Tensors of one kind in one format.

    Attributes:
        tensor: which, such as ``q_proj weight``.
        format: their format.
        modules: how many modules have it; 0 for all that is not quantized.
        share: their share of the model's parameters, 0 to 1; 0 for activations.
    """

    tensor: str
    format: str
    modules: int
    share: float


@dataclass(frozen=True)
class WindowLosses:
    """Mean losses of every window, in nats a target, in the windows' order.

    Attributes:
        baseline: of the unquantized model.
        quantized: of the quantized model.
    """

    baseline: list[float]
    quantized: list[float]


@dataclass(frozen=True)
class Memory:
    """The most memory that the process has held.

    Attributes:
        peak_bytes: greatest resident memory (mapped files included) from the process's start to the run's end, bytes.
        phase: phase of the run in which it was reached: one of `seconds`, ``between`` for what lies between them, or
            ``before`` for a process that had held as much before the run.
        device_peak_bytes: greatest memory that torch has allocated on the CUDA device, bytes; null without one.
        device_phase: phase in which that was reached; null without a CUDA device.
    """

    peak_bytes: int
    phase: str
    device_peak_bytes: int | None = None
    device_phase: str | None = None


@dataclass(frozen=True)
class Made:
    """How a result was made; environment.json has the rest.

    Attributes:
        date: when the run ended, ISO 8601 with its time zone.
        command: command line of the process.
        threads: threads that torch computes with.
    """

    date: str
    command: str
    threads: int


@dataclass(frozen=True)
class Kernels:
    """Who has multiplied in Linears.

    Attributes:
        calibration: for statistics and solvers: ``oneDNN`` where its products of float32 are used on CPUs, ``torch in float32`` where
            a CPU has none of the arithmetic's 16 bits, else ``torch``.
        evaluation: for the baseline, and what is not quantized: ``torch``, whose bits other programs give too.
        quantized: how many quantized Linears had which kernel: ``simulated``, an integer kernel's name, or ``integer`` where the
            fastest of several was taken, which all give the same bits.
        refused: how many Linears were simulated although integers were asked for, by the reason.
    """

    calibration: str
    evaluation: str
    quantized: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """``simulated``, ``by integers``, or how many of both."""
        simulated, every = self.quantized.get("simulated", 0), sum(self.quantized.values())
        if simulated == every:
            return "simulated"
        return "by integers" if not simulated else f"{every - simulated} Linears by integers, {simulated} simulated"


@dataclass(frozen=True)
class Beginnings:
    """The special tokens that begin each window.

    Attributes:
        calibration: of the calibration samples; empty for none.
        evaluation: of the evaluation windows; empty for none.
    """

    calibration: str
    evaluation: str


@dataclass(frozen=True)
class SharedText:
    """What evaluation windows hold of the text that was calibrated on.

    Attributes:
        run: length in tokens of the runs that were looked for at every offset; 0 for windows that are too short for it.
        windows: number of evaluation windows with such a run.
        tokens: number of evaluation tokens in such runs.
        copied: whether they are copies, and no chance.
        allowed: whether the recipe lets copies through.
    """

    run: int
    windows: int
    tokens: int
    copied: bool
    allowed: bool


@dataclass(frozen=True)
class Facts:
    """What metrics.json holds beside the comparison.

    Attributes:
        size: what the weights take.
        baseline: types of the baseline's weights and arithmetic, and the device.
        simulated: whether every quantized Linear was simulated in floating point, and none multiplied integers.
        model: the recipe's model.
        revision: commit of the hub's model; null for other models.
        weight_fingerprint: digest of the model's weights.
        calibration_source: the text that was calibrated on, in words.
        calibration_fingerprint: digest of the calibration tokens.
        evaluation_source: the text that was evaluated, in words.
        evaluation_fingerprint: digest of the evaluated tokens.
        bos: the special tokens that begin each window.
        overlap: what evaluation windows hold of the text that was calibrated on.
        tensors: every kind of tensor with its format and its share of the parameters.
        not_covered: Linears beside the blocks' that are left alone, in words; null where there are none.
        window_losses: losses of both models, window by window.
        window_documents: the document of the text that each window is of, numbered as windows come to them; null where that is not known.
        identity: digest of everything that the results depend on; a run that has it already is not run again.
        outlier_share: mean of the Linears' `outlier_share`; null where none has one.
        seconds: wall time of each phase, by its name.
        memory: the most memory that the process has held.
        kernels: who has multiplied.
        made: when, by which command and with how many threads.
        tasks: baseline and quantized model on each task; empty without tasks.
        tuned: what the step that learned on the finished network says of that, such as the held out divergence before and after; null
            without one. `layers.csv` describes the Linears before it.
    """

    size: Size
    baseline: str
    simulated: bool
    model: str
    revision: str | None
    weight_fingerprint: str
    calibration_source: str
    calibration_fingerprint: str
    evaluation_source: str
    evaluation_fingerprint: str
    bos: Beginnings
    overlap: SharedText
    tensors: list[TensorKind]
    not_covered: str | None
    window_losses: WindowLosses
    window_documents: list[int] | None
    identity: str
    outlier_share: float | None
    seconds: dict[str, float]
    memory: Memory
    kernels: Kernels
    made: Made
    tasks: list[TaskResult]
    tuned: dict[str, float] | None = None


@dataclass(frozen=True)
class Git:
    """State of the source tree.

    Attributes:
        commit: the commit that is checked out.
        changed_files: number of files that differ from it.
    """

    commit: str
    changed_files: int


@dataclass(frozen=True)
class Environment:
    """Where a result was made, beside what metrics.json says of it in ``made``: what may explain a difference between two runs. What environment.json holds.

    Attributes:
        ptq: version of this package.
        python: version of Python.
        platform: operating system and processor family.
        packages: versions of the packages that matter, by name; null for one that is not installed.
        device: where the arithmetic happened.
        gpu: name of the CUDA device; null without one.
        cpu_capability: vector instructions that torch uses.
        cpu_flags: features of the processor; empty where the system does not tell.
        cores: processors of the machine; null where the system does not tell.
        ranks: processes that shared the samples.
        seeds: the recipe's seeds, by what they draw.
        git: state of the source tree; null outside of one.
    """

    ptq: str
    python: str
    platform: str
    packages: dict[str, str | None]
    device: str
    gpu: str | None
    cpu_capability: str
    cpu_flags: list[str]
    cores: int | None
    ranks: int
    seeds: dict[str, int]
    git: Git | None


FILES: Mapping[str, list[type]] = {
    "metrics.json": [Comparison, Facts],
    "layers.csv": [LayerResult],
    "environment.json": [Environment],
}
"""The files with fields that a run leaves, and the dataclasses that have those fields."""


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


def describe_cached(form: CacheFormat) -> str:
    """Returns how a cache holds keys or values, in a few words."""
    kept = [f"{n} {which}" for n, which in ((form.window, "recent"), (form.first, "first")) if n]
    exact = f", {' and '.join(kept)} tokens in 16 bits" if kept else ""
    ranges = f"{form.group} {form.along} a range{' of least squared error' if form.search else ''}"
    return f"int{form.bits} in a cache, {ranges}{exact}"


def write_results(
    folder: pathlib.Path,
    recipe: Recipe,
    comparison: Comparison,
    layers: list[LayerResult],
    facts: Facts,
    environment: Environment,
) -> None:
    """Writes the files of a finished run into `folder`, each whole or not at all; metrics.json, which says that it has ended, last."""
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe.as_dict(), sort_keys=False))
    for name, kinds in FILES.items():
        schema = schema_of(f"{'a row of ' if name.endswith('.csv') else ''}{name}", kinds)
        write_text(folder / f"{pathlib.Path(name).stem}.schema.json", as_json(schema))
    write_text(folder / "layers.csv", _csv(layers))
    write_text(folder / "environment.json", as_json(environment))
    write_text(folder / "metrics.json", as_json(vars(comparison) | vars(facts)))


def outlier_share(layers: list[LayerResult]) -> float | None:
    """Returns the mean `outlier_share` of the Linears that have one, None where none has."""
    shares = [layer.outlier_share for layer in layers if layer.outlier_share is not None]
    return sum(shares) / len(shares) if shares else None


def tensor_kinds(
    layers: list[LayerResult],
    size: Size,
    attention: Mapping[str, Mapping[str, str]],
    weight_bits: int,
    outside: Mapping[str, tuple[QuantSpec, int]] | None = None,
) -> list[TensorKind]:
    """Returns every kind of tensor with its format: weights and inputs of Linears, tensors inside attentions, and the rest.

    Args:
        layers: the quantized Linears.
        size: for the number of parameters.
        attention: formats by tensor (query, key, value, attention_probs) by attention module.
        weight_bits: bits of a baseline weight.
        outside: format of the embedding's and of the head's weight, where they have one, and parameters that count there.
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
    for tensor, (spec, parameters) in (outside or {}).items():
        rows.append(TensorKind(f"{tensor} weight", describe_spec(spec, weight_bits), 1, parameters / size.parameters))
    covered = sum(row.share for row in rows)
    left = ", ".join([*(tensor for tensor in OUTSIDE if tensor not in (outside or {})), "norms", "..."])
    return [*rows, TensorKind(f"everything else ({left})", f"{weight_bits}-bit float", 0, 1 - covered)]


def _csv(layers: list[LayerResult]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [f.name for f in dataclasses.fields(LayerResult)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(layer) for layer in layers)
    return buffer.getvalue()
