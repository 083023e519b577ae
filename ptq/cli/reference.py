"""The commands ``ptq list`` and ``ptq show``: what there is, and what every option means, out of the code itself."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ptq.cli import catalog, kernels
from ptq.cli.parser import Parser
from ptq.config.options import MISSING, default_of, in_yaml
from ptq.config.schema import Recipe
from ptq.errors import UserError, nearest
from quantize.spec import quant_spec
from quantize.spec.formats import INTEGER, Format
from quantize.spec.quant_spec import QuantSpec

SECTIONS = ("recipes", "steps", "models", "data", "schemes", "methods", "formats", "exporters", "ablations", "searches")
_GROUPS = {
    "models": "model",
    "data": "data",
    "schemes": "scheme",
    "methods": "method",
    "ablations": "ablation",
    "searches": "search",
}


@dataclass(frozen=True)
class RecipePart:
    """Something that `ptq show` knows.

    Attributes:
        name: its dotted name in a recipe.
        about: what it is, in a sentence.
        schema: the dataclass whose fields are its options; None for a single option.
        option: the one field that it is, or None.
    """

    name: str
    about: str
    schema: type | None
    option: "dataclasses.Field[Any] | None" = None


def list_command(arguments: list[str], program: str) -> int:
    """``ptq list [SECTION]``."""
    words = ", ".join(SECTIONS)
    parser = Parser(
        prog=program, allow_abbrev=False, description="Lists what there is to name in a recipe, and sweeps to run."
    )
    parser.add_argument("section", nargs="?", metavar="SECTION", help=f"one of {words} (all of them)")
    section = parser.parse_args(arguments).section
    if section is not None and section not in SECTIONS:
        raise UserError(f"{section!r} is nothing to list{nearest(section, SECTIONS)}")
    for name in SECTIONS if section is None else (section,):
        found = entries(name)
        width = max(map(len, found))
        print(f"{name}:")
        for key, about in found.items():
            print(_wrapped(f"  {key:{width}}  {about}", width + 4))
    return 0


def show_command(arguments: list[str], program: str) -> int:
    """``ptq show NAME``."""
    parser = Parser(prog=program, allow_abbrev=False, description="Says what a part of a recipe, or an option, means.")
    parser.add_argument(
        "name",
        metavar="NAME",
        help="such as steps.gptq, scheme.weight, evaluation.windows, export.gguf; kernels: who multiplies here",
    )
    name = parser.parse_args(arguments).name
    if name == "kernels":
        print("\n".join(kernels.lines()))
        return 0
    part = find(name)
    print(_wrapped(f"{part.name}: {part.about}", 0))
    if part.schema is not None:
        meanings = attributes(part.schema)
        for field in dataclasses.fields(part.schema):
            print(f"\n{_option(part.schema, field, meanings.get(field.name, ''))}")
        if not dataclasses.fields(part.schema):
            print("\n  no options")
    return 0


COMMANDS: dict[str, tuple[str, Callable[[list[str], str], int]]] = {
    "list": (f"what there is: {', '.join(SECTIONS)}", list_command),
    "show": ("what a part of a recipe means: every option, its default, its choices", show_command),
}


def entries(section: str) -> dict[str, str]:
    """Returns what a section of `ptq list` has, each with a sentence."""
    if section == "recipes":
        return catalog.recipes()
    if section in _GROUPS:
        folder = catalog.config_folder() / _GROUPS[section]
        return {path.stem: catalog.describe(path) for path in sorted(folder.glob("*.yaml"))}
    if section == "formats":
        return {
            name: f"{_numbers(form.bits)} bits; {', '.join(form.granularities)}"
            f"{'' if form.group_size is None else f'; groups of {form.group_size}'}"
            f"{'' if form.weight else '; no weights'}{'' if form.activation else '; weights only'}"
            for name, form in written_formats().items()
        }
    modules = step_files() if section == "steps" else exporter_files()
    return {
        name: _sentence(ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "") for name, path in modules.items()
    }


def step_files() -> dict[str, pathlib.Path]:
    """Returns the source file of each shipped step, by name; imports none of them."""
    return _files("steps", lambda path: not any(part.startswith("_") for part in (path.parent.name, path.stem)))


def exporter_files() -> dict[str, pathlib.Path]:
    """Returns the source file of each exporter, by name; imports none of them."""
    found = _files("export", lambda path: path.stem.startswith("to_"))
    return {name.removeprefix("to_").replace("_", "-"): path for name, path in found.items()}


def _files(package: str, wanted: Callable[[pathlib.Path], bool]) -> dict[str, pathlib.Path]:
    folder = pathlib.Path(catalog.__file__).parents[1] / package
    return {path.stem: path for path in sorted(folder.rglob("*.py"), key=lambda p: p.stem) if wanted(path)}


def written_formats() -> dict[str, Format]:
    """Returns what `quantize.spec.formats.formats` does, out of the source of the codecs: importing them takes torch."""
    folder = pathlib.Path(quant_spec.__file__).parents[1] / "codecs"
    found = dict(
        pair for path in sorted(folder.rglob("*.py")) for pair in _registered(ast.parse(path.read_text("utf-8")))
    )
    return {name: found[name] for name in sorted(found, key=lambda name: (name != INTEGER, name))}


def _registered(module: ast.Module) -> Iterator[tuple[str, Format]]:
    """Yields name and facts of every format that a codec's module registers, as they are written there."""
    known: dict[str, Any] = {"INTEGER": INTEGER}

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return known[node.id]
        if isinstance(node, ast.Call):
            return Format(*map(value, node.args), **{str(k.arg): value(k.value) for k in node.keywords})
        return ast.literal_eval(node)

    for statement in module.body:
        match statement:
            case ast.Assign([ast.Name(name)], ast.Constant() | ast.Call(ast.Name("Format")) as written):
                known[name] = value(written)
            case ast.Expr(ast.Call(ast.Name("register"), [name, facts, _])):
                yield value(name), value(facts)


def options_of(path: pathlib.Path) -> list[str]:
    """Returns the names of the options that a step's or an exporter's source file has; imports nothing."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "Options":
            return [s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
    return []


def names() -> Iterator[str]:
    """Yields every dotted name of the schema, of the steps and of the exporters; imports none of these."""
    yield from _names(Recipe, "")
    for prefix, files in (("steps", step_files()), ("export", exporter_files())):
        for name, path in files.items():
            yield f"{prefix}.{name}"
            yield from (f"{prefix}.{name}.{option}" for option in options_of(path))


def choices_of(name: str) -> tuple[str, ...]:
    """Returns what an option of the schema may be, where that is a matter of choice; nothing for steps, whose code needs torch."""
    if name.startswith(("steps.", "export.")):
        return ()
    if name.startswith("scheme.") and name.endswith(".format"):
        return tuple(written_formats())
    try:
        part = find(name)
    except UserError:
        return ()
    return () if part.option is None else tuple(part.option.metadata.get("choices", ()))


def find(name: str) -> RecipePart:
    """Returns the part of a recipe of that dotted name. Raises `UserError` for none, with the nearest name."""
    head, _, rest = name.partition(".")
    first, _, option = rest.partition(".")
    files = {"steps": step_files, "export": exporter_files}.get(head, dict)()
    if first in files:
        module = importlib.import_module(_module_name(files[first]))
        return _inside(RecipePart(f"{head}.{first}", _sentence(module.__doc__ or ""), module.Options), option, name)
    part = RecipePart("recipe", _sentence(Recipe.__doc__ or ""), Recipe)
    return part if name == "recipe" else _inside(part, name, name)


def attributes(schema: type) -> dict[str, str]:
    """Returns what a dataclass's docstring says of its fields, by name: its section ``Attributes:``."""
    _, _, section = inspect.cleandoc(schema.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if started := re.match(r" {4}(\w+): (.*)", line):
            name = started[1]
            found[name] = started[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return found


def _inside(part: RecipePart, rest: str, whole: str) -> RecipePart:
    for key in filter(None, rest.split(".")):
        fields = {} if part.schema is None else {field.name: field for field in dataclasses.fields(part.schema)}
        if key not in fields:
            known = [*names(), "recipe"]
            hint = (
                nearest(whole, known) if len(nearest(whole, known)) < 200 else f"; choose one of: {', '.join(fields)}"
            )
            raise UserError(f"{whole}: no part of a recipe is called so{hint}")
        owner, field = typing.cast(type, part.schema), fields[key]
        inner = _dataclass_in(typing.get_type_hints(owner)[key])
        prefix = "" if part.name == "recipe" else f"{part.name}."
        meaning = attributes(owner).get(key, "")
        if inner is not None:
            part = RecipePart(f"{prefix}{key}", meaning or _sentence(inner.__doc__ or ""), inner)
        else:
            part = RecipePart(
                f"{prefix}{key}", _option(owner, field, meaning).strip().removeprefix(f"{key}: "), None, field
            )
    return part


def _names(schema: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}"
        inner = _dataclass_in(hints[field.name])
        if inner is not None and inner is not schema:
            yield from _names(inner, f"{prefix}{field.name}.")


def _dataclass_in(hint: Any) -> type | None:
    """Returns the dataclass that a field holds, itself or in a tuple, a mapping or a union with None."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    if typing.get_origin(hint) in (types.UnionType, typing.Union, tuple, dict):
        return next((found for a in typing.get_args(hint) if (found := _dataclass_in(a)) is not None), None)
    return None


def _option(schema: type, field: "dataclasses.Field[Any]", meaning: str) -> str:
    default = default_of(field)
    given = "has no default" if default is MISSING else f"default {in_yaml(default)}"
    hint = typing.get_type_hints(schema)[field.name]
    inner = _dataclass_in(hint) is not None and dataclasses.is_dataclass(default)
    lines = [f"  {field.name}: {_kind(hint)}, {'a part with options of its own' if inner else given}"]
    choices = field.metadata.get("choices", ())
    if schema is QuantSpec and field.name == "format":
        choices = tuple(entries("formats"))
    least, most = field.metadata.get("least"), field.metadata.get("most")
    lines += [_wrapped(f"      {meaning}", 6)] if meaning else []
    lines += [_wrapped(f"      choices: {', '.join(choices)}", 6)] if choices else []
    if least is not None or most is not None:
        ends = [f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None)
        lines.append(f"      {', '.join(ends)}")
    for other, values in field.metadata.get("only_with", {}).items():
        lines.append(f"      only with {other}: {' or '.join(map(in_yaml, values))}")
    return "\n".join(lines)


def _kind(hint: Any) -> str:
    words = {
        int: "whole number",
        float: "number",
        bool: "true or false",
        str: "text",
        type(None): "null",
        Any: "anything",
    }
    if hint in words:
        return words[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_kind(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    return "mapping"


def _module_name(path: pathlib.Path) -> str:
    root = pathlib.Path(catalog.__file__).parents[2]
    return ".".join(path.relative_to(root).with_suffix("").parts)


def _sentence(text: str) -> str:
    return " ".join(text.strip().split("\n\n")[0].split())


def _numbers(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(values) == 1 else f"{min(values)} to {max(values)}"


def _wrapped(text: str, indent: int) -> str:
    width = max(60, min(120, shutil.get_terminal_size((120, 24)).columns))
    if "\n" in text:
        return text
    head = len(text) - len(text.lstrip())
    return textwrap.fill(
        text.strip(), width, initial_indent=" " * head, subsequent_indent=" " * indent, break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip
