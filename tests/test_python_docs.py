"""The code of docs/python.md, run as a notebook runs it: cell by cell, inside a running event loop."""

import ast
import asyncio
import inspect
import pathlib
import re

import pandas
import torch
import transformers

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "python.md"


def cells():
    """The page's code, in order."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


async def notebook(codes, names):
    """Runs every cell and returns what each one's last line gives."""
    values = []
    for code in codes:
        tree = ast.parse(code)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        for part, mode in ((tree, "exec"), (None if last is None else ast.Expression(last.value), "eval")):
            if part is not None:
                value = eval(compile(part, str(PAGE), mode, flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
                value = await value if inspect.iscoroutine(value) else value
        values.append(value)
    return values


def test_the_page_runs_as_it_stands_in_a_notebook(tmp_path, tiny_llama):
    # The page's model has 135 million parameters: a tiny one stands in, and the files go to the test's folder.
    places = f"model.path={tiny_llama} outputs={tmp_path / 'outputs'} store={tmp_path / 'store'} "
    codes = [code.replace('"data=docs', f'"{places}data=docs') for code in cells()]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    names = {"transformers_model": model}
    values = asyncio.run(notebook(codes, names))
    result = names["result"]
    assert 0.9 < result.metrics["ratio"] < 1.1 and isinstance(result.layers, pandas.DataFrame)
    assert len(result.windows) == 8
    picture = next(value for value in values if hasattr(value, "_repr_png_"))
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert "quantized_perplexity" in result._repr_html_()
    assert names["other"].folder != result.folder and names["other"].metrics["size"]["bits_per_weight"] < 5
    assert names["done"].model is model and 0 < names["done"].layers[0].output_error < 0.5
