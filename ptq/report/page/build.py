"""From what is gathered to one HTML file: a template with autoescape, the data as JSON that no text in it can leave."""

import importlib.resources
import json
import math
from datetime import datetime
from typing import Any

import jinja2
import plotly
from markupsafe import Markup

from ptq.report.page.content import PageInput, facts_of, gather

STATUSES = ("done", "running", "waiting", "pruned", "failed", "interrupted", "refused")
UNDONE = {"failed", "refused", "interrupted", "pruned"}


def build_page(page: PageInput) -> str:
    """Returns the page of a sweep: one file with its style, its script and the plotting library in it."""
    data = gather(page)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_own("page.html.j2"))
    counts = {kind: sum(point.values["status"] == kind for point in page.points) for kind in STATUSES}
    return template.render(
        page=page,
        facts=facts_of(data["points"]),
        counts={kind: count for kind, count in counts.items() if count},
        failed=[point for point in page.points if point.values["status"] in UNDONE],
        best=_best(page),
        made=datetime.now().isoformat(sep=" ", timespec="minutes"),
        style=Markup(_own("page.css")),
        script=Markup(_own("page.js")),
        plotly=Markup(_plotly()),
        data=Markup(_json(data)),
    )


def _own(name: str) -> str:
    return importlib.resources.files("ptq.report.page").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    return importlib.resources.files(plotly).joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")


def _json(data: Any) -> str:
    """Returns JSON for a script element: whatever stands in its texts, none of it can end the element or begin a comment."""
    text = json.dumps(_finite(data), ensure_ascii=True, allow_nan=False, default=str, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """Returns plain containers with null for NaN and inf, which JSON has no words for and figures no place."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _best(page: PageInput) -> Any:
    done = [p for p in page.points if p.values["status"] == "done" and p.values.get("quantized_perplexity") is not None]
    return min(done, key=lambda p: (p.values["quantized_perplexity"], p.values["point"]), default=None)
