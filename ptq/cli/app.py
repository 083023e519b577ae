"""The command line `ptq`: subcommands, options, exit statuses. Heavy imports wait until a command needs them."""

import argparse
import difflib
import errno
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import ptq
from ptq.cli import catalog, completion, files, kernels, reference, store_commands
from ptq.cli.bits import allocate_command, sensitivity_command
from ptq.cli.output import unbroken
from ptq.cli.parser import Parser
from ptq.cli.signals import Stopped, stopping
from ptq.cli.sweeps import compare_commands, search_commands, sweep_commands
from ptq.cli.threads import limit_threads
from ptq.config.schema import Recipe
from ptq.errors import UserError
from ptq.ranks.torchrun import name_of_rank, ranks_asked_for

COMMANDS = {
    "run": "one experiment: calibrate, quantize, evaluate against the baseline, report",
    "stats": "calibration statistics only: a file, a table of outliers, a picture",
    "text": "a text that the model makes up itself, to calibrate on: as many windows as calibration says",
    "footprint": "what a model takes, from its config alone: parameters, bytes, FLOPs, KV cache",
}
TOOLS = (
    files.COMMANDS | store_commands.COMMANDS | sweep_commands.COMMANDS | compare_commands.COMMANDS
    | sensitivity_command.COMMANDS | allocate_command.COMMANDS | kernels.COMMANDS | reference.COMMANDS
)  # fmt: skip
"""The commands that have a parser of their own."""
OUTPUTS = {
    "stats": "the statistics file (default: in the run's folder)",
    "text": "the text, a .jsonl file (default: generated-text.jsonl)",
}
"""Commands that write one file, and which."""
EXTRAS = {"run": "[--dry-run]", "stats": "[--dry-run]", "text": "[--output FILE]", "footprint": "[--context N]"}
"""What the usage names of the options of each command."""
EXIT_MISTAKE = 2
EXIT_STOPPED = 130
_KEPT = "what was finished is kept, and the same command takes it up"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def main(arguments: list[str] | None = None, program: str | None = None) -> int:
    """Runs a command. Returns the exit status: 0, 2 for what the user can mend (one line on stderr), 130 when stopped.

    Args:
        arguments: the command line without the program's name; None takes it from `sys.argv`.
        program: how the user calls this, for the usage, where that is not ``ptq <command>``.
    """
    with unbroken():
        try:
            with stopping():
                return _dispatch(sys.argv[1:] if arguments is None else arguments, program)
        except UserError as error:
            # Of several ranks the first says what all of them have found.
            return EXIT_MISTAKE if error.said_elsewhere else _fail("error", str(error), EXIT_MISTAKE)
        except Stopped as error:
            return _fail("stopped", f"{error.name}; {_KEPT}", 128 + error.number)
        except KeyboardInterrupt:
            return _fail("stopped", f"interrupted; {_KEPT}", EXIT_STOPPED)
        except Exception as error:
            if (line := _of_the_system(error)) is None:
                raise
            return _fail("error", line, EXIT_MISTAKE)


def run_command(arguments: list[str]) -> int:
    """The door of ``main.py``: `main` with the command ``run``."""
    return main(["run", *arguments], "python main.py")


def stats_command(arguments: list[str]) -> int:
    """The door of ``gen_act_stat.py``: `main` with the command ``stats``."""
    return main(["stats", *arguments], "python gen_act_stat.py")


def rewrite(arguments: list[str]) -> list[str]:
    """Returns `arguments` with ``--config X`` and ``--config=X`` as ``--config-dir`` and ``--config-name``.

    Hydra knows the latter two only, and takes ``--config`` for an ambiguous beginning of them.

    Raises:
        UserError: when X is missing, or neither a shipped recipe nor a file.
    """
    done: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            argument = f"--config={next(rest, '')}"
        if argument.startswith("--config="):
            path = catalog.locate(argument.removeprefix("--config="))
            done += [f"--config-dir={path.parent}", f"--config-name={path.stem}"]
        else:
            done.append(argument)
    return done


def _dispatch(arguments: list[str], program: str | None) -> int:
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(_overview())
        return 0
    if arguments[0] == "--complete":
        print("\n".join(completion.candidates(arguments[1:], _options())))
        return 0
    if "--version" in arguments:
        print(f"ptq {ptq.__version__}")
        return 0
    if arguments[0].partition("=")[0] == "--completion":
        shell = arguments[0].partition("=")[2] or "".join(arguments[1:2])
        print(completion.script(shell), end="")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command in TOOLS:
        return TOOLS[command][1](rest, program or f"ptq {command}")
    if command not in COMMANDS:
        known = [*COMMANDS, *TOOLS]
        close = difflib.get_close_matches(command, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"
        raise UserError(f"{command!r} is not a command; {hint}")
    return _command(command, rest, program or f"ptq {command}")


def _command(command: str, arguments: list[str], program: str) -> int:
    parser = _parser(command, program)
    # Help comes first, so that a mistake elsewhere on the line does not hide it.
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        return 0
    options, unknown = parser.parse_known_intermixed_args(rewrite(arguments))
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        close = difflib.get_close_matches(unknown[0], [*known, "--config"], n=1)
        raise UserError(f"{unknown[0]}: no such option; {f'did you mean {close[0]!r}?' if close else 'see --help'}")
    if command == "run":
        sweep_commands.with_ablation(options)
        search_commands.with_search(options)
    path = _config_path(options)
    if (options.multirun or (command == "run" and options.search)) and (ranks := ranks_asked_for()) > 1:
        word = "-m" if options.multirun else "--search"
        raise UserError(f"{word}: {ranks} ranks share one run, not the points of a sweep: start it without torchrun")
    if command == "run" and options.search is not None:
        if options.cfg:
            raise UserError("--cfg: a search has no one config: leave out --search, or --cfg")
        limit_threads()
        return search_commands.search(path, options, (*program.split(), *arguments))
    if command == "run" and options.multirun and not options.cfg:
        limit_threads()
        return sweep_commands.sweep(path, options, (*program.split(), *arguments))
    if command == "run":
        sweep_commands.refuse_without_multirun(options)

    from ptq.cli.compose.hydra_edge import compose_jobs

    jobs = compose_jobs(path, options.overrides, options.multirun, options.trust)
    if options.cfg:
        for job in jobs:
            print(
                _yaml(job.config if options.cfg == "job" else _full(job.recipe)), end="" if len(jobs) == 1 else "---\n"
            )
        return 0
    for job in jobs:
        job.check_paths()
    work = _work(command, options)
    for number, job in enumerate(jobs, 1):
        if len(jobs) > 1:
            print(f"job {number} of {len(jobs)}: {' '.join(job.overrides)}", flush=True)
        work(job.recipe)
    return 0


def _config_path(options: argparse.Namespace) -> pathlib.Path:
    if options.config_dir is None:
        return catalog.locate(options.config_name or catalog.DEMO)
    if options.config_name is None:
        raise UserError("--config-dir: no --config-name beside it: give both, or --config with a path")
    return catalog.locate(str(pathlib.Path(options.config_dir) / f"{options.config_name.removesuffix('.yaml')}.yaml"))


def _work(command: str, options: argparse.Namespace) -> Callable[[Recipe], Any]:
    """Returns what a job's recipe is given to; torch and transformers come in here."""
    if command == "footprint":
        from ptq.footprint.tables import show_footprint

        return lambda recipe: show_footprint(recipe, options.context)
    from ptq.ranks.torch_world import open_world
    from ptq.run.experiment import collect_statistics, dry_run, run
    from ptq.run.exports import check_imatrix, export_imatrix

    limit_threads()
    if command != "text" and options.dry_run:
        return (lambda recipe: None) if name_of_rank() else dry_run
    if command == "run":

        def run_it(recipe: Recipe) -> None:
            with open_world(recipe.execution.device) as world:
                run(recipe, options.force, world)

        return run_it
    output = pathlib.Path(options.output).expanduser() if options.output else None
    if output is not None and options.multirun:
        raise UserError("--output: one file for several jobs of -m: leave it out, each job has its own folder")
    if command == "text":
        return lambda recipe: _write_text(recipe, output or pathlib.Path("generated-text.jsonl"))
    imatrix = None if options.imatrix is None else pathlib.Path(options.imatrix).expanduser()

    def take(recipe: Recipe) -> None:
        config = None if imatrix is None else check_imatrix(recipe)
        with open_world(recipe.execution.device) as world:
            path = collect_statistics(recipe, output, world)
            if imatrix is not None and world.leads:
                export_imatrix(recipe, config, path, imatrix)

    return take


def _write_text(recipe: Recipe, path: pathlib.Path) -> None:
    """Writes what the recipe's model makes up: as many windows, as long, and from the seed that ``calibration`` says."""
    from ptq.data.generated import generated_texts, write_texts
    from ptq.files.store import store_of
    from ptq.models.loading import load
    from ptq.run.record.journal import Journal
    from ptq.run.session import device_of

    if path.suffix != ".jsonl":
        raise UserError(f"--output: {path.name!r} is no .jsonl file: name it {path.stem}.jsonl")
    if recipe.execution.weights != "resident":
        raise UserError(
            f"execution.weights: {recipe.execution.weights!r}, but every token that is made up takes the whole model: use resident"
        )
    journal, asked = Journal(), recipe.calibration
    with journal.phase("load"):
        loaded = load(recipe.model, recipe.execution, store_of(recipe, journal.say))
    with journal.phase("text"):
        model = loaded.model.to(device_of(recipe))
        texts = generated_texts(
            model, loaded.tokenizer, asked.samples, asked.length, asked.seed,
            lambda done, total: journal.progress("text", done, total),
        )  # fmt: skip
    write_texts(texts, path)
    journal.say(f"text: {path}; calibrate on it by 'data.calibration={{source: file, path: {path}}}'")


def _parser(command: str, program: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=program, allow_abbrev=False, add_help=False, description=f"{COMMANDS[command].capitalize()}.",
        usage=f"{program} [--config RECIPE] [key=value ...] [-m] {EXTRAS[command]} [--cfg job|full] [--help]",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_epilog(program),
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="Hydra overrides: key=value, group=choice, ~key"
    )
    # --config itself is rewritten before this parser sees it; it is named here for the help.
    named = parser.add_argument_group("which recipe")
    named.add_argument("--config-name", help=argparse.SUPPRESS)
    named.add_argument("--config-dir", help=argparse.SUPPRESS)
    named.add_argument(
        "--config", metavar="RECIPE", help=f"a recipe's name, or a path to a .yaml file ({catalog.DEMO})"
    )
    parser.add_argument("-m", "--multirun", action="store_true", help="one run for each of the values key=a,b,c")
    if command == "footprint":
        parser.add_argument("--context", type=int, metavar="N", help="tokens of the prefill and in the KV cache (2048)")
    elif command != "text":
        parser.add_argument("--dry-run", action="store_true", help="check all that can be checked without running")
    if command == "run":
        parser.add_argument("--force", action="store_true", help="run again what is finished")
        sweep_commands.add_options(parser)
    parser.add_argument(
        "--trust", action="store_true", help="a recipe file may name code to run and environment variables to read"
    )
    parser.add_argument(
        "--cfg", choices=["job", "full"], help="print the composed config and stop; full: with every default"
    )
    if command in OUTPUTS:
        parser.add_argument("--output", metavar="FILE", help=OUTPUTS[command])
    if command == "stats":
        parser.add_argument("--imatrix", metavar="FILE", help="llama.cpp's importance matrix too, in GGUF")
    parser.add_argument("-h", "--help", action="help", help="show this and stop")
    return parser


def _overview() -> str:
    commands = COMMANDS | {name: what for name, (what, _) in TOOLS.items()}
    rows = "\n".join(f"  {name:11} {what}" for name, what in commands.items())
    return f"usage: ptq <command> [options]\n\ncommands:\n{rows}\n\nptq <command> --help says more; ptq list what there is; ptq show NAME what it means;\nptq --version the version; ptq --completion bash|zsh|fish completes in a shell.\n"


def _epilog(program: str) -> str:
    recipes = catalog.recipes()
    width = max(map(len, recipes))
    named = "\n".join(f"  {name:{width}}  {what}" for name, what in recipes.items())
    chosen = "\n".join(f"  {group}=  {', '.join(names)}" for group, names in catalog.groups().items())
    return f"""examples:
  {program}
  {program} --config smollm2-135m_w4a16 scheme.weight.bits=3
  {program} --config my/recipe.yaml scheme=w8a8_static '~steps.rtn' --dry-run
  {program} -m scheme=w8a8,w4a16,w4a4 evaluation.windows=4

recipes:
{named}

groups:
{chosen}
"""


def _full(recipe: Recipe) -> dict[str, Any]:
    """Returns a recipe with every option, as a run writes it into its folder."""
    from ptq.run.experiment import resolved

    return resolved(recipe).as_dict()


def _options() -> dict[str, list[str]]:
    """Returns the options of every command, for completion."""
    takes = {name: _parser(name, "") for name in COMMANDS}
    found = {name: [word for a in parser._actions for word in a.option_strings] for name, parser in takes.items()}
    tools = {
        "bench": [
            "--config",
            "--run",
            "--against",
            "--prefill",
            "--decode",
            "--batches",
            "--rounds",
            "--no-loading",
            "--output",
        ],
        "export": ["--run", "--format", "--output", "--force", "--trust"],
        "store": ["--store", "--max-size"],
    }
    bits = ["--config", "--formats", "--samples", "--seed", "--trust", "--output"]
    tools |= {"sensitivity": [*bits, "--check"]}
    tools |= {"allocate": [*bits, "--bits", "--bytes", "--footprint", "--context", "--against", "--no-verify"]}
    return {**found, **{name: [*tools.get(name, ()), "--help"] for name in TOOLS}}


def _yaml(config: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _of_the_system(error: Exception) -> str | None:
    """Returns one line for a full disk or a forbidden file, however it was wrapped, or None for anything else."""
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    place = getattr(error, "filename", None) or "a file of this run"
    # safetensors, in Rust, wraps the system's error in its own exception and keeps the number in the text only.
    if number in _FULL or (number is None and f"os error {errno.ENOSPC}" in text):
        return f"{place}: the disk is full: free space, or choose another folder with outputs=... and store=..."
    if number in _REFUSED or (number is None and f"os error {errno.EACCES}" in text):
        return f"{place}: not permitted: choose another folder with outputs=... and store=..., or mend its permissions"
    return None


def _fail(kind: str, text: str, status: int) -> int:
    print(f"{kind}: {name_of_rank()}{' '.join(text.split())}", file=sys.stderr, flush=True)
    return status
