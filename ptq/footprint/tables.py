"""The tables of `ptq footprint`."""

from collections.abc import Callable, Iterable, Sequence

from rich.table import Table

from ptq.config.schema import Recipe
from ptq.footprint.footprint import KINDS, PARTS, Column, Footprint, footprint
from ptq.footprint.passes import Pass
from ptq.report.plain import plain_console
from ptq.report.results import describe_spec

_PIPE = 140
"""Columns of a table that goes into a pipe or a file, which have no width of their own."""


def show_footprint(recipe: Recipe, context: int | None = None) -> None:
    """Prints what the recipe's model takes. Raises `UserError` as `ptq.footprint.footprint.footprint` does."""
    found = footprint(recipe, context)
    console = plain_console()
    if not console.is_terminal:
        console = plain_console(width=_PIPE)
    for part in report(found, recipe):
        console.print(part)


def report(found: Footprint, recipe: Recipe) -> list[Table | str]:
    """Returns the tables and sentences that say what a model takes."""
    weight = describe_spec(recipe.scheme.weight, 16)
    s = recipe.scheme
    more = f", {len(s.overrides)} overrides, {len(s.exclude)} exclusions" if s.overrides or s.exclude else ""
    return [
        f"{found.name}: {found.path}, {found.blocks} blocks, {sum(found.parameters.values())} parameters",
        _parts(found.parameters, found.passed),
        f"FLOPs and KV cache: not counted, the model does not run without weights ({found.untraced})"
        if found.passed is None
        else f"prefill: {found.passed.context} tokens at once; decode: one more after them; "
        "products: query x key and probabilities x value, the full square",
        _bytes("bytes by kind", found.columns, "kind", KINDS),
        _bytes("bytes by dtype", found.columns, "dtype", _dtypes(found.columns)),
        f"int8 and int4: every Linear of the blocks, a fp32 scale for each row, the rest in fp16; scheme: {weight}{more}",
        _peaks(found),
        *_caches(found, recipe),
    ]


def _parts(parameters: dict[str, int], passed: Pass | None) -> Table:
    title = "by part" if passed is None else f"by part, FLOPs for each token at a context of {passed.context}"
    table = _table(title, ["part", "parameters", "share", "prefill FLOPs/token", "decode FLOPs/token"])
    whole = sum(parameters.values())
    for part in PARTS:
        table.add_row(part, str(parameters[part]), f"{parameters[part] / whole:.2%}", *_flops(passed, part))
        if part == "attention":
            table.add_row("  its products", "", "", *_flops(passed, "products"))
    table.add_row("all", str(whole), "100.00%", *_flops(passed, "total"))
    return table


def _flops(passed: Pass | None, part: str) -> tuple[str, str]:
    if passed is None or not hasattr(passed.prefill, part):
        return "", ""
    return f"{getattr(passed.prefill, part) / passed.context:.4g}", f"{getattr(passed.decode, part):.4g}"


def _bytes(title: str, columns: Sequence[Column], field: str, rows: Iterable[str]) -> Table:
    size = _unit(columns[0].total)
    table = _table(title, [field, *(column.title for column in columns)])
    for row in rows:
        sums = [column.by(field).get(row, 0) for column in columns]
        if any(sums):
            table.add_row(row, *(size(n) if n else "-" for n in sums))
    table.add_row("all", *(size(column.total) for column in columns))
    table.add_row("all, GiB", *(f"{column.total / 2**30:.3f}" for column in columns))
    return table


def _dtypes(columns: Sequence[Column]) -> list[str]:
    return sorted({stored.dtype for column in columns for stored in column.stored})


def _peaks(found: Footprint) -> Table:
    size = _unit(found.columns[0].total)
    table = _table("peak while loading, tensors only", ["how", "bytes", "GiB", "assumes"], left=("how", "assumes"))
    for peak in found.peaks:
        table.add_row(peak.title, size(peak.bytes), f"{peak.bytes / 2**30:.3f}", peak.assumes)
    return table


def _caches(found: Footprint, recipe: Recipe) -> list[Table | str]:
    if found.passed is None:
        return []
    size = _unit(found.columns[0].total)
    table = _table("KV cache, one text", ["form", "bytes a token", f"{found.passed.context} tokens"])
    for cache in found.caches:
        table.add_row(cache.title, str(cache.token), size(cache.context))
    if len(found.caches) == 1:
        return [table]
    key, value = (describe_spec(spec, 16) for spec in (recipe.scheme.key, recipe.scheme.value))
    return [table, f"scheme: key {key}, value {value}; a dynamic range is kept with its codes"]


def _table(title: str, heads: Sequence[str], left: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 or head in left else "right", no_wrap=head != "assumes")
    return table


def _unit(scale: int) -> Callable[[int], str]:
    """Returns how sizes of a model of `scale` bytes are written: GB, MB or kB, decimal."""
    name, factor = next((u for u in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if scale >= u[1]), ("B", 1.0))
    return lambda count: f"{count / factor:.3f} {name}" if not 0 < count < factor / 2000 else f"< 0.001 {name}"
