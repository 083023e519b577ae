"""One benchmark of a recipe: every side in turn, the machine's limits, files in a folder."""

import pathlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ptq.bench.decode_step import step_times
from ptq.bench.energy import joules_a_token, meter_of
from ptq.bench.loading import loading
from ptq.bench.report import write
from ptq.bench.roofline import measured
from ptq.bench.side import DYNAMIC, Side
from ptq.bench.sides import BFLOAT16, FLOAT32, HALF_KERNELS, KERNELS, check_competitors, folder_of, sides_of
from ptq.bench.timing import Figure, clock_of, in_turn
from ptq.config.schema import Recipe
from ptq.errors import UserError
from ptq.files.kernel_timings import timings_key
from ptq.run.session import device_of
from quantize.modules.packed import PackedLinear
from quantize.spec.quant_spec import QuantSpec, SpecError

PROMPT = 16
"""Tokens before what is decoded."""


@dataclass(frozen=True)
class Tasks:
    """What is measured.

    Attributes:
        prefill: tokens of each prefill.
        decode: tokens that are decoded; 0 for none.
        batches: sequences that are decoded together.
        rounds: turns that count.
        loading: whether time to load and peak memory are measured.
        against: names of other runtimes.
        cache: what transformers generates with.
        head_bits: of embedding and head, rounded beside what the recipe's scheme says; None leaves that to the scheme.
        compiled: whether decoding by kernels is measured compiled, too.
    """

    prefill: tuple[int, ...] = (128, 512, 2048)
    decode: int = 64
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 5
    loading: bool = True
    against: tuple[str, ...] = field(default=())
    cache: str = DYNAMIC
    head_bits: int | None = None
    compiled: bool = False


def bench(
    recipe: Recipe,
    tasks: Tasks,
    output: pathlib.Path | None = None,
    say: Callable[[str], None] = print,
    run: pathlib.Path | None = None,
) -> pathlib.Path:
    """Measures the recipe's model and returns the folder of ``bench.json``, ``bench.md`` and ``bench.png``.

    Args:
        recipe: of the model and its formats.
        tasks: what is measured.
        output: where to; None for ``outputs/bench/<recipe>``.
        say: told what is done.
        run: the folder of a finished run of the recipe that has saved its codes; None rounds weights to nearest.

    Raises:
        UserError: for tasks that make no sense, a runtime that is not installed, and what a run would refuse.
    """
    if tasks.rounds < 1 or tasks.decode < 0 or min((*tasks.prefill, *tasks.batches), default=1) < 1:
        raise UserError("bench: --rounds, --prefill and --batches are at least 1, --decode at least 0")
    check_competitors(list(tasks.against))
    recipe = _with_head(recipe, tasks.head_bits)
    made = list(sides_of(recipe, list(tasks.against), torch.get_num_threads(), tasks.cache, run, tasks.compiled))
    sides = [side for side, _ in made]
    longest = max([PROMPT + tasks.decode, *tasks.prefill])
    limit = getattr(made[0][1].config, "max_position_embeddings", longest)
    if longest > limit:
        raise UserError(
            f"bench: {longest} tokens, and the model has {limit} positions: use --prefill and --decode below that"
        )
    device = device_of(recipe)
    ids = (torch.arange(longest)[None] % (made[0][1].config.vocab_size - 5) + 5).to(device)
    clock, meter = clock_of(device), meter_of(device)
    figures: list[Figure] = []
    joules: dict[str, dict[str, float]] = {}

    def measure(task: str, work: dict[str, Callable[[], object]], tokens: int) -> None:
        figures.extend(in_turn(task, work, tokens, tasks.rounds, clock))
        if meter is not None:
            joules[task] = {name: joules_a_token(each, tokens, meter, clock) for name, each in work.items()}

    for side in sides:
        say(f"{side.name}: {side.note}" if side.note else side.name)
    for tokens in tasks.prefill:
        measure(f"prefill {tokens}", {s.name: _call(s.prefill, ids[:, :tokens]) for s in sides}, tokens)
        say(f"prefill of {tokens} tokens: done")
    for batch in tasks.batches if tasks.decode else ():
        able = [s for s in sides if batch == 1 or s.batches]
        prompt = ids[:, :PROMPT].expand(batch, -1).contiguous()
        if batch == 1:
            measure("first token", {s.name: _decode(s, prompt, 1) for s in able}, 1)
        work = {s.name: _decode(s, prompt, tasks.decode) for s in able}
        measure(f"decode {tasks.decode} x {batch}", work, batch * tasks.decode)
        say(f"decoding {tasks.decode} tokens of {batch} sequences: done")
    report: dict[str, Any] = {
        "recipe": recipe.name,
        "machine": timings_key(device),
        "tasks": asdict(tasks),
        "figures": [asdict(f) | {"tokens_a_second": f.tokens_a_second} for f in figures],
        "joules_a_token": joules,
        "sides": {s.name: _facts(s) for s in sides},
        "loading": _loading(made, device) if tasks.loading else {},
        "roofline": asdict(roofline := measured(device)),
        "linears": _linears(made, roofline),
        "decode_step": _steps(made, ids, tasks),
    }
    folder = folder_of(recipe.name, output)
    write(folder, report)
    return folder


def _with_head(recipe: Recipe, bits: int | None) -> Recipe:
    """Returns the recipe with embedding and head in integers of so many bits, one scale a row."""
    if bits is None:
        return recipe
    try:
        spec = QuantSpec(bits=bits)
    except SpecError as error:
        raise UserError(f"--head: {bits} is not valid: expected {error.expected}") from None
    return replace(recipe, scheme=replace(recipe.scheme, embedding=spec, head=spec))


def _steps(made: list[tuple[Side, Any]], ids: torch.Tensor, tasks: Tasks) -> dict[str, dict[str, float]]:
    """Returns milliseconds a token by part, of the baseline and of the sides with kernels."""
    names = {FLOAT32, KERNELS, HALF_KERNELS}
    wanted = [(side, model) for side, model in made if side.name in names] if tasks.decode else []
    return {side.name: step_times(side, model, ids[:, :PROMPT], tasks.decode) for side, model in wanted}


def _call(work: Callable[[torch.Tensor], object], ids: torch.Tensor) -> Callable[[], object]:
    return lambda: work(ids)


def _decode(side: Side, prompt: torch.Tensor, tokens: int) -> Callable[[], object]:
    return lambda: side.decode(prompt, tokens)


def _facts(side: Side) -> dict[str, Any]:
    read = None if side.read_bytes is None else side.read_bytes()
    share = None if read is None or not side.weight_bytes else read / side.weight_bytes
    facts = {"note": side.note, "weight_bytes": side.weight_bytes, "head_bytes": side.head_bytes}
    return {**facts, "read_bytes": read, "read_over_weights": share}


def _loading(made: list[tuple[Side, Any]], device: torch.device) -> dict[str, dict[str, float]]:
    """Returns seconds and peak bytes of the sides that can be saved and loaded by transformers, onto `device`."""
    models = {side.name: model for side, model in made if model is not None}
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        models[FLOAT32].save_pretrained(folder / "plain")
        found[FLOAT32], found[BFLOAT16] = (loading(folder / "plain", kind, device) for kind in ("float32", "bfloat16"))
        for name, kind in ((KERNELS, "float32"), (HALF_KERNELS, "bfloat16")):
            packed = [m for m in models[name].modules() if isinstance(m, PackedLinear)] if name in models else []
            if packed and getattr(models[name].config, "quantization_config", None) is not None:
                models[name].save_pretrained(folder / "packed" / kind)
                found[name] = loading(folder / "packed" / kind, kind, device)
    return found


def _linears(made: list[tuple[Side, Any]], roofline: Any) -> list[dict[str, Any]]:
    """Returns each shape of the packed Linears: what each kernel took for so many rows, and what the machine needs at least."""
    models = [model for side, model in made if side.name in {KERNELS, HALF_KERNELS}]
    packed = [m for model in models for m in model.modules() if isinstance(m, PackedLinear) and m.kernel_choice]
    timings = {what: times for m in packed if m.kernel_choice for what, times in m.kernel_choice.timings.items()}
    rows: list[dict[str, Any]] = []
    for what, times in timings.items():
        alike = [m for m in packed if f" ({m.out_features}, {m.in_features}) " in what and str(m.weight_spec) in what]
        if not alike:
            continue
        # Integer products are of any type's Linears; others are named by theirs, and another side's may read other bytes.
        module = max(alike, key=lambda m: str(m.dtype) in what)
        count = int(what.split()[-2])
        kind = "int8" if "int_mm" in times else "bfloat16" if "bfloat16" in what else "float32"
        bits = 8 * module.read_bytes() / (module.in_features * module.out_features)
        least = 1e3 * roofline.least_seconds(count, (module.out_features, module.in_features), kind, bits)
        rows.append(
            {"shape": [module.out_features, module.in_features], "rows": count, "milliseconds": times, "least": least}
        )
    return rows
