"""The only schema: a recipe as plain dataclasses. `ptq.config.building` builds one, `ptq.config.checking` checks it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ptq.config.cache import CacheConfig
from ptq.config.options import option, seed_option
from quantize.spec.quant_spec import QuantSpec


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is read.

    Attributes:
        path: hub id, local directory, a ``.gguf`` file, or ``package:<module>/<file>``.
        revision: branch, tag or commit on the hub.
        tokenizer: hub id, folder or ``.gguf`` file of another tokenizer; null for the model's own.
        dtype: ``auto`` (fp32 arithmetic on CPU, the checkpoint's 16-bit type on CUDA), ``float32``, ``float16``, ``bfloat16``.
        trust_remote_code: run Python code that comes with the model. Off unless asked for.
    """

    path: str
    revision: str | None = None
    tokenizer: str | None = None
    dtype: str = option("auto", choices=("auto", "float32", "float16", "bfloat16"))
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

    source: str = option("docs", choices=("docs", "file", "wikitext2", "c4", "ptb", "pile", "mix"))
    variant: str | None = option(None, choices=("old", "new"), only_with={"source": ("c4", "ptb")})
    split: str = option("train", choices=("train", "validation", "test"))
    path: str | None = option(None, only_with={"source": ("file",)})
    text_column: str = option("text", only_with={"source": ("file",)})
    mix: tuple["TextConfig", ...] = option((), only_with={"source": ("mix",)})


@dataclass(frozen=True)
class DataConfig:
    """The texts of a recipe: one to calibrate on, one to evaluate on.

    Attributes:
        calibration: the text to calibrate on.
        evaluation: the text to evaluate on.
        allow_overlap: let evaluation windows hold what is calibrated on, which is refused otherwise; the result counts them.
    """

    calibration: TextConfig = field(default_factory=TextConfig)
    evaluation: TextConfig = field(default_factory=lambda: TextConfig(split="test"))
    allow_overlap: bool = False


AT_MOST = "at-most-"
"""Before a number of windows: as many as the text has will do."""


@dataclass(frozen=True)
class CalibrationConfig:
    """How calibration samples are drawn: `samples` windows of `length` tokens, ``contiguous`` from the start or ``random``.

    Attributes:
        samples: how many windows.
        tuning_samples: windows of the same draw after those, for a step that learns on the finished network (tune), which then does
            not learn from what its solver has seen: a number, or ``at-most-N`` where a shorter text will do; 0: it learns from the
            solver's.
        length: tokens of a window.
        sampling: ``contiguous``, one after another from the start of the text, or ``random``, from places drawn by `seed`.
        seed: of random sampling.
        bos: what begins each window, in the place of text tokens: ``auto`` for what the model's own tokenizer puts before a
            text, true for its BOS, false for nothing.
        batch_size: windows that pass together; changes time and memory, and of the results those of steps that go by batches: smooth,
            awq, clip and prefix search on the first one, autoround and omniquant learn from one a step; `ptq sensitivity` sums
            a batch's gradients before it squares them.
        statistics: a file written by gen_act_stat.py to read instead of calibrating again.
        experts: which tokens the experts of a mixture are calibrated on: ``routed``, those that the router sends them; ``all``
            of them; ``at-least-N``: where fewer than N over the samples are sent of one sample, those with the next scores too.
    """

    samples: int = option(64, least=1)
    tuning_samples: int | str = 0
    length: int = option(512, least=2)
    sampling: str = option("contiguous", choices=("contiguous", "random"))
    seed: int = seed_option()
    bos: bool | str = "auto"
    batch_size: int = option(4, least=1)
    statistics: str | None = None
    experts: str = "routed"

    @property
    def most_tuning_samples(self) -> int:
        """The number of `tuning_samples`, or the N of ``at-most-N``."""
        return int(str(self.tuning_samples).removeprefix(AT_MOST))


@dataclass(frozen=True)
class EvaluationConfig:
    """The perplexity protocol (METHODS.md section 8) and the paired comparison.

    Attributes:
        windows: how many windows, none overlapping another; null for all there are.
        length: tokens of a window.
        bos: what begins each window, as in calibration.
        batch_size: windows that pass together.
        chunk: tokens whose logits exist at once.
        resamples: draws of the bootstrap over windows that gives the interval.
        confidence: share of the draws inside the interval, between 0 and 1.
        seed: of the bootstrap, and of C4's random slices.
        tasks: task files of lm-eval's format (``.yaml``), or names of its own tasks; both models answer them.
        task_samples: samples of each task, from the first on; null for all.
    """

    windows: int | None = option(16, least=1)
    length: int = option(1024, least=2)
    bos: bool | str = "auto"
    batch_size: int = option(1, least=1)
    chunk: int = option(128, least=1)
    resamples: int = option(10000, least=100, most=1_000_000)
    confidence: float = 0.95
    seed: int = seed_option()
    tasks: tuple[str, ...] = ()
    task_samples: int | None = option(None, least=1)


@dataclass(frozen=True)
class Override:
    """Changes the scheme for some modules.

    Attributes:
        modules: a glob of full names of Linears (of attention modules for query, key, value and attention_probs).
        tensors: by kind of tensor its format there; null leaves it unquantized.
    """

    modules: str
    tensors: dict[str, QuantSpec | None]


@dataclass(frozen=True)
class SchemeConfig:
    """Which tensor of a block gets which `QuantSpec`; null leaves it unquantized. Of the overrides the last match wins.

    Attributes:
        weight: of the weights of Linears inside the blocks.
        input: of what those Linears read.
        query: of queries, after rotary embeddings.
        key: of keys.
        value: of values.
        attention_probs: of the attention's probabilities, after the softmax.
        embedding: of the weight of the token embedding, rounded to nearest; where the model ties the head to it, head too.
        head: of the weight that gives the logits, rounded to nearest.
        cache: how a cache holds keys and values, in evaluation and in ``generate``; null rounds every token's, after rotary
            embeddings, and leaves no cache to ``generate``.
        overrides: other formats for some modules, in order.
        exclude: globs of modules that are never replaced (embedding and head have formats of their own).
    """

    weight: QuantSpec | None = None
    input: QuantSpec | None = None
    query: QuantSpec | None = None
    key: QuantSpec | None = None
    value: QuantSpec | None = None
    attention_probs: QuantSpec | None = None
    embedding: QuantSpec | None = None
    head: QuantSpec | None = None
    cache: CacheConfig | None = None
    overrides: tuple[Override, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExecutionConfig:
    """Where the work happens, and who multiplies. None of these change results beyond float rounding.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        weights: ``resident`` (whole model in memory) or ``offloaded`` (one block in memory, the rest on disk).
        prefetch: read the weights of the next block in a thread while this one computes, where they are offloaded: time for memory.
        hidden_states: ``memory`` or ``disk`` (memory-mapped).
        save: write the quantized weights (codes and scales) into the run's folder.
        kernels: who multiplies in quantized Linears: ``simulated`` (floating point, the reference), ``auto`` (integer kernels where
            a Linear's formats have one, whichever is fastest here; all of them give the same bits), or a kernel by name.
        devices: several, such as ``[cuda:0,cuda:1]``: blocks are computed on them in turn, and the next block's weights are read
            into its device while this one computes. For offloaded weights; the first of them is the `device`.
    """

    device: str = "auto"
    weights: str = option("resident", choices=("resident", "offloaded"))
    prefetch: bool = option(True, only_with={"weights": ("offloaded",)})
    hidden_states: str = option("memory", choices=("memory", "disk"))
    save: bool = False
    kernels: str = "simulated"
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportConfig:
    """A format that another runtime loads (docs/exports.md).

    Attributes:
        format: the name of an exporter.
        options: its own.
    """

    format: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Attributes:
        name: of the results' folder: letters, digits, ``.``, ``_`` and ``-``, 1 to 100 of them. The recipe file's own by default.
        model: the model.
        data: its texts.
        calibration: how calibration samples are drawn.
        evaluation: how baseline and quantized model are compared.
        scheme: which tensor gets which number format.
        steps: by name the options of each step, in order of execution: transforms, then a solver.
        execution: where the work happens.
        export: a format to write the quantized model in, or null.
        outputs: the folder of results, as ``outputs/<name>/<hash>``.
        store: the folder where results of earlier work are kept.
        trackers: programs that are told of the run: ``mlflow``, ``tensorboard``, ``wandb``, ``trackio``. None unless asked for; no
            result depends on them.
    """

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
    trackers: tuple[str, ...] = option((), choices=("mlflow", "tensorboard", "wandb", "trackio"))

    def as_dict(self) -> dict[str, Any]:
        """Returns the fully resolved recipe as plain, JSON-able containers."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def digest(self, sources: Mapping[str, str] | None = None) -> str:
        """Returns 12 hex digits over everything that describes the experiment (not where its files go).

        Args:
            sources: digests of the source of steps from outside, by the step's name.
        """
        content = {key: value for key, value in self.as_dict().items() if key not in {"outputs", "store", "trackers"}}
        content |= {"sources": dict(sources)} if sources else {}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
