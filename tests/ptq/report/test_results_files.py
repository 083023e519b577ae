"""Every field that a run writes is described, in the schemas beside it and in the docs; JSON is JSON whatever the figures."""

import csv
import dataclasses
import json
import math
import pathlib

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq.config.building import recipe_from
from ptq.report.json_files import as_json
from ptq.report.results import FILES, LayerResult
from ptq.run.experiment import run
from tests.tools.results_files import tables

DOCS = pathlib.Path(__file__).resolve().parents[3] / "docs" / "results-files.md"


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    """A finished run."""
    place = tmp_path_factory.mktemp("results")
    recipe = {
        "name": "described",
        "model": {"path": str(tiny_llama)},
        "calibration": {"samples": 4, "length": 64},
        "evaluation": {"windows": 3, "length": 64},
        "scheme": {"weight": {"bits": 4}},
        "steps": {"rtn": {}},
        "outputs": str(place / "outputs"),
        "store": str(place / "store"),
    }
    return run(recipe_from(recipe))


def described(schema, path=""):
    """Yields every property of a schema with its dotted name, those of objects inside it too."""
    for name, part in schema.get("properties", {}).items():
        yield f"{path}{name}", part
        yield from described(part, f"{path}{name}.")
    for inner in (schema.get("items"), *schema.get("anyOf", ())):
        if isinstance(inner, dict):
            yield from described(inner, path)


@pytest.mark.parametrize("name", FILES)
def test_what_a_run_writes_is_what_its_schema_describes(folder, name):
    schema = json.loads((folder / f"{pathlib.Path(name).stem}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert all(part["description"] for _, part in described(schema))
    if name.endswith(".json"):
        jsonschema.validate(json.loads((folder / name).read_text()), schema, jsonschema.Draft202012Validator)
        return
    rows = list(csv.DictReader((folder / name).open()))
    kinds = {field.name: field.type for field in dataclasses.fields(LayerResult)}
    for row in rows:
        typed = {k: v if kinds[k] is str else float(v) if v else None for k, v in row.items()}
        jsonschema.validate(typed, schema, jsonschema.Draft202012Validator)
    assert rows


def test_a_result_has_peak_memory_kernel_threads_command_and_date(folder):
    m = json.loads((folder / "metrics.json").read_text())
    assert m["memory"]["peak_bytes"] > 100 << 20
    assert m["memory"]["phase"] in {*m["seconds"], "between", "before"}
    assert m["kernels"]["evaluation"] == "torch"
    assert m["made"]["threads"] >= 1 and "python" in m["made"]["command"]
    assert m["made"]["date"][:2] == "20" and m["made"]["date"][-6] in "+-"


def test_a_file_that_lacks_a_field_or_has_another_is_told_by_the_schema(folder):
    schema = json.loads((folder / "metrics.schema.json").read_text())
    good = json.loads((folder / "metrics.json").read_text())
    for bad in (
        {**good, "other": 1},
        {k: v for k, v in good.items() if k != "ratio"},
        {**good, "ratio": "1"},
        {**good, "memory": {**good["memory"], "phase": None}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema, jsonschema.Draft202012Validator)


def test_the_docs_say_of_every_field_what_its_docstring_says():
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    missing = [row for table in tables().values() for row in table if row not in lines]
    assert missing == [], "run python -m tests.tools.results_files"


def strict(text):
    def refuse(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


values = st.recursive(
    st.floats() | st.integers() | st.text() | st.booleans() | st.none(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(values)
def test_json_is_valid_whatever_the_figures(value):
    found = strict(as_json(value))

    def same(a, b):
        if isinstance(a, float) and not math.isfinite(a):
            return b is None
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        return a == b

    assert same(value, found)
