"""Texts that a model makes up itself: enough of them, by the seed, and likelier to the model than chance."""

import json
import pathlib
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptq.cli.app import main
from ptq.data.generated import generated_texts


@pytest.fixture(scope="module")
def llama(tiny_llama: pathlib.Path) -> tuple[Any, Any]:
    """The trained tiny model and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)


def test_a_made_up_text_comes_to_the_windows_asked_for_and_its_seed_decides_it(llama: tuple[Any, Any]) -> None:
    seen: list[tuple[int, int]] = []
    texts = generated_texts(*llama, 3, 24, 1, lambda done, total: seen.append((done, total)))
    assert sum(len(llama[1](text, add_special_tokens=False).input_ids) for text in texts) >= 3 * 24
    assert (24, 24) in seen
    assert generated_texts(*llama, 3, 24, 1) == texts
    assert generated_texts(*llama, 3, 24, 2) != texts


def test_making_up_a_text_leaves_the_generators_of_others_alone(llama: tuple[Any, Any]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generated_texts(*llama, 1, 8, 1)
    assert torch.rand(3).equal(expected)


def test_a_made_up_text_is_likelier_to_its_model_than_tokens_drawn_evenly(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    made = tokenizer(generated_texts(model, tokenizer, 4, 48, 3), add_special_tokens=False)
    ids = torch.tensor([row[:32] for row in made.input_ids])
    even = torch.randint(len(tokenizer), ids.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        own, other = (float(model(x, labels=x).loss) for x in (ids, even))
    assert own < other - 1


def test_the_command_writes_a_text_that_a_run_calibrates_on(
    tiny_llama: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    few = [f"model.path={tiny_llama}", "calibration.samples=4", "calibration.length=32"]
    assert main(["text", "--config", "demo", "--output", "own text.jsonl", *few]) == 0
    lines = pathlib.Path("own text.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["text"] for line in lines)
    said = capsys.readouterr().out
    assert "source: file" in said
    mixed = "data.calibration={source: mix, mix: [{source: docs}, {source: file, path: 'own text.jsonl'}]}"
    small = ["evaluation.windows=2", "evaluation.length=32", f"outputs={tmp_path}/o", f"store={tmp_path}/s"]
    assert main(["run", "--config", "demo", mixed, *few, *small]) == 0
    (metrics,) = pathlib.Path(f"{tmp_path}/o").rglob("metrics.json")
    assert "own text.jsonl" in json.loads(metrics.read_text())["calibration_source"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--output", "text.txt"], "text.jsonl"), (["execution.weights=offloaded"], "use resident")],
)
def test_what_cannot_be_made_up_is_refused_in_a_line(
    arguments: list[str], said: str, tiny_llama: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["text", "--config", "demo", f"model.path={tiny_llama}", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
