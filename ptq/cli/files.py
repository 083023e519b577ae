"""The commands that work on files instead of recipes: export a finished run, inspect a model file."""

import argparse
import pathlib

import yaml

from ptq.cli.parser import Parser
from ptq.errors import UserError, nearest

EXIT_MISSING = 1
"""Exit status of ``ptq data`` where a file is missing."""


def export_command(arguments: list[str], program: str) -> int:
    """``ptq export --run FOLDER --format NAME [--output PATH] [--force] [option=value ...]``."""
    parser = Parser(prog=program, allow_abbrev=False, description="Exports a finished run, without quantizing again.")
    parser.add_argument("options", nargs="*", metavar="option=value", help="options of the format: docs/exports.md")
    parser.add_argument("--run", metavar="FOLDER", required=True, help="a run made with execution.save=true")
    parser.add_argument(
        "--format", metavar="NAME", required=True, help="compressed-tensors, gguf, gptq, awq, llama2c or kuiper"
    )
    parser.add_argument("--output", metavar="PATH", help="where to (default: export/NAME in the run's folder)")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument("--trust", action="store_true", help="the run's model may run code of its own")
    given = _parse(parser, arguments)
    from ptq.config.schema import ExportConfig
    from ptq.run.exports import export_run

    options = dict(_option(text) for text in given.options)
    output = pathlib.Path(given.output).expanduser() if given.output else None
    export_run(
        pathlib.Path(given.run).expanduser(), ExportConfig(given.format, options), output, given.force, given.trust
    )
    return 0


def inspect_command(arguments: list[str], program: str) -> int:
    """``ptq inspect FILE``."""
    parser = Parser(prog=program, allow_abbrev=False, description="Prints what a model file or folder holds.")
    parser.add_argument("file", metavar="FILE", help="llama2.c, KuiperLLama, GGUF, safetensors, or a folder of them")
    given = _parse(parser, arguments)
    from ptq.inspect.inspection import inspect, table
    from ptq.report.plain import plain_console

    path = pathlib.Path(given.file).expanduser()
    console = plain_console()
    for part in table(inspect(path), path):
        console.print(part)
    return 0


def status_command(arguments: list[str], program: str) -> int:
    """``ptq status RUN``."""
    parser = Parser(prog=program, allow_abbrev=False, description="Says where a run stands.")
    parser.add_argument("run", metavar="RUN", help="a run's folder: outputs/<recipe>/<hash>")
    given = _parse(parser, arguments)
    from ptq.run.kept.state import state_of

    for line in state_of(pathlib.Path(given.run).expanduser()).lines:
        print(line)
    return 0


def data_command(arguments: list[str], program: str) -> int:
    """``ptq data PROTOCOL [PATH ...] [--folder FOLDER]``; exit status 1 when a file is missing or another one."""
    parser = Parser(
        prog=program, allow_abbrev=False,
        description="Says which files a protocol needs and whether they are there; takes them out of the paths that are named.",
    )  # fmt: skip
    from ptq.data.protocols import PROTOCOLS, data_folder, files_of, place

    default = data_folder()
    parser.add_argument("protocol", metavar="PROTOCOL", help=f"one of {', '.join(PROTOCOLS)}")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files to take them from, or folders of such files")
    parser.add_argument("--folder", metavar="FOLDER", help=f"where recipes look for them ($PTQ_DATA; now {default})")
    given = _parse(parser, arguments)
    if given.protocol not in PROTOCOLS:
        raise UserError(f"{given.protocol!r} is no protocol with files of its own{nearest(given.protocol, PROTOCOLS)}")
    folder = pathlib.Path(given.folder).expanduser() if given.folder else default
    paths = files_of([pathlib.Path(path).expanduser() for path in given.paths])
    lines = [place(file, paths, folder) for file in PROTOCOLS[given.protocol]]
    print(f"data={given.protocol} reads {folder}")
    for line in lines:
        print(line)
    missing = any(" is not there: " in line or " is another file: " in line for line in lines)
    if missing:
        print(f"download them and run `{program} {given.protocol} PATH ...`")
    return EXIT_MISSING if missing else 0


COMMANDS = {
    "export": (
        "another format for a finished run: compressed-tensors, gguf, gptq, awq, llama2c, kuiper",
        export_command,
    ),
    "inspect": ("what a model file holds: header, tensors, sizes, greatest error", inspect_command),
    "status": ("where a run stands: running, interrupted after a block, finished", status_command),
    "data": ("the files that a measuring protocol needs: what they are, whether they are there", data_command),
}


def _parse(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    given, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(f"{unknown[0]}: no such option; see --help")
    return given


def _option(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UserError(f"{text}: not an option: expected option=value")
    try:
        return key.removeprefix("export.options."), yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{text}: {value!r} is no value: quote it") from None
