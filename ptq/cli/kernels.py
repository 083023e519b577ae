"""Speed on the command line: ``ptq show kernels`` says who multiplies here, ``ptq bench`` measures a recipe's model."""

import pathlib
from collections.abc import Callable, Iterator

from ptq.cli import catalog
from ptq.cli.parser import Parser
from ptq.cli.threads import limit_threads
from ptq.config.schema import Recipe
from ptq.errors import UserError

ABOUT = "kernels: who multiplies in quantized Linears (docs/speed.md)."


def lines(folder: str | None = None) -> Iterator[str]:
    """Yields the kernels with what they say of themselves, then the winners among the timings that the store `folder` keeps."""
    import torch

    from ptq.files.kernel_timings import KeptTimings, timings_key
    from quantize.kernels.base import registered
    from quantize.kernels.choice import AUTO
    from quantize.kernels.floating import registered_floating

    yield ABOUT
    yield f"\n{AUTO}: the fastest here of those that can, found by a short timing for each shape and number of rows"
    yield "simulated: in floating point, the reference; packed models decode each weight at each call"
    yield "\nintegers (weights and inputs are integers; equal sums, so that the fastest changes no bit):"
    for name, integer in registered().items():
        yield f"  {name}: {_about(integer)}"
    yield "\nwhole Linears of packed models (the product of the rounded operands, to rounding):"
    for name, floating in registered_floating().items():
        yield f"  {name}: {_about(floating)}"
    kept = KeptTimings(torch.device("cpu"), pathlib.Path(folder or Recipe.store).expanduser())
    timings = kept.recall()
    where = ", ".join(f"{key} {value}" for key, value in timings_key(kept.device).items() if value is not None)
    yield f"\ntimed here ({where}): {'' if timings else 'nothing yet'}"
    for what, found in sorted(timings.items()):
        order = sorted(found, key=found.__getitem__)
        yield f"  {_short(what)}: " + ", ".join(f"{name} {found[name]:.3g} ms" for name in order)


def bench_command(arguments: list[str], program: str) -> int:
    """``ptq bench --config RECIPE [key=value ...] [--against NAME] [...]``, or ``--run FOLDER``."""
    parser = Parser(
        prog=program, allow_abbrev=False,
        description="Measures a recipe's model beside its baseline: prefill, decoding, loading, memory; a table and a picture.",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides, as for ptq run")
    parser.add_argument(
        "--config", metavar="RECIPE", help=f"a recipe's name, or a path to a .yaml file ({catalog.DEMO})"
    )
    parser.add_argument(
        "--run", metavar="FOLDER", help="a finished run (execution.save=true): its recipe's model, its own codes"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="NAME",
        help="llama.cpp, onnxruntime-genai, vllm, torchao, bitsandbytes, bitsandbytes-int8, torch-qint8",
    )
    parser.add_argument(
        "--prefill", nargs="*", type=int, default=[128, 512, 2048], metavar="N", help="tokens (128 512 2048)"
    )
    parser.add_argument("--decode", type=int, default=64, metavar="N", help="tokens to decode, 0 for none (64)")
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[1, 8], metavar="N", help="sequences decoded together (1 8)"
    )
    parser.add_argument(
        "--cache", choices=["dynamic", "static"], default="dynamic", help="what transformers generates with (dynamic)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="kernels once more, all around them compiled by torch.compile (minutes)",
    )
    parser.add_argument("--head", type=int, metavar="BITS", help="embedding and head in so many bits too")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns that count (5)")
    parser.add_argument("--no-loading", action="store_true", help="leave out time to load and peak memory")
    parser.add_argument("--output", metavar="FOLDER", help="where to (outputs/bench/<recipe>)")
    parser.add_argument("--trust", action="store_true", help="a recipe file may name code to run")
    given, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(f"{unknown[0]}: no such option; see --help")
    if given.run is not None and (given.config is not None or given.overrides):
        raise UserError("--run: has its recipe already: leave out --config and overrides")
    limit_threads()
    from ptq.bench.benchmark import Tasks, bench

    tasks = Tasks(
        tuple(given.prefill),
        given.decode,
        tuple(given.batches),
        given.rounds,
        not given.no_loading,
        tuple(given.against),
        given.cache,
        given.head,
        given.compile,
    )
    output = pathlib.Path(given.output).expanduser() if given.output else None
    run = None if given.run is None else pathlib.Path(given.run).expanduser()
    folder = bench(_recipe(run, given.config, given.overrides, given.trust), tasks, output, run=run)
    print((folder / "bench.md").read_text(encoding="utf-8"), end="")
    print(f"\n{folder}: bench.json, bench.md, bench.png")
    return 0


COMMANDS: dict[str, tuple[str, Callable[[list[str], str], int]]] = {
    "bench": ("how fast a recipe's model is: beside its baseline and other runtimes", bench_command)
}


def _recipe(run: pathlib.Path | None, config: str | None, overrides: list[str], trust: bool) -> Recipe:
    """Returns the recipe of a finished run, or the composed one."""
    if run is not None:
        from ptq.run.exports import saved_run

        return saved_run(run)[0]
    from ptq.cli.compose.hydra_edge import compose_jobs

    job = compose_jobs(catalog.locate(config or catalog.DEMO), overrides, trust=trust)[0]
    job.check_paths()
    return job.recipe


def _about(kernel: object) -> str:
    """Returns the first sentence of a kernel's docstring and what its `refusal` says that it takes."""
    own = " ".join((type(kernel).__doc__ or "").split())
    takes = " ".join((getattr(type(kernel), "refusal").__doc__ or "").split())  # noqa: B009
    return f"{own} Takes: {takes}"


def _short(what: str) -> str:
    """Returns a timing's key without the fields of a format that are at their defaults."""
    import dataclasses
    import re

    from quantize.spec.quant_spec import QuantSpec

    defaults = {f"{field.name}={field.default!r}" for field in dataclasses.fields(QuantSpec) if field.name != "bits"}

    def kept(match: "re.Match[str]") -> str:
        return "".join(("(", ", ".join(part for part in match[1].split(", ") if part not in defaults), ")"))

    return re.sub(r"QuantSpec\(([^)]*)\)", kept, what)
