"""Tasks of lm-eval in a run: local files offline, both models on the same samples, nothing loaded twice; mistakes before the work."""

import importlib.util
import json
import sys

import pyarrow.parquet
import pytest
import yaml

from ptq.cli.app import main
from ptq.config.schema import TextConfig
from ptq.data.sources import read_text

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the extra tasks is not installed"
)

CLOZE = {
    "task": "cloze",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "cloze.jsonl"}},
    "test_split": "test",
    "output_type": "loglikelihood",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{word}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
CHOICE = {
    **{key: value for key, value in CLOZE.items() if key != "metric_list"},
    "task": "choice",
    "dataset_kwargs": {"data_files": {"test": "choice.jsonl"}},
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{right}}",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture
def tasks(tmp_path, tiny_llama):
    """A folder with a recipe of a tiny model and two tasks out of the documentation of CPython."""
    text = "".join(c for c in read_text(TextConfig(split="test"), "data.evaluation").joined[:9000] if c.isalpha())
    lines = []
    for i in range(24):
        piece = text[200 + 97 * i :][:41]
        lines.append({"text": piece[:40], "word": piece[40:]})
    (tmp_path / "cloze.jsonl").write_text("\n".join(map(json.dumps, lines)))
    choices = [{"text": a["text"], "choices": [a["word"], "\x7f"][:: 1 if i % 2 else -1], "right": 0 if i % 2 else 1} for i, a in enumerate(lines)]  # fmt: skip
    (tmp_path / "choice.jsonl").write_text("\n".join(map(json.dumps, choices)))
    for config in (CLOZE, CHOICE):
        (tmp_path / f"{config['task']}.yaml").write_text(yaml.safe_dump(config))
    content = {
        "model": {"path": str(tiny_llama)},
        "calibration": {"samples": 2, "length": 32},
        "evaluation": {"windows": 2, "length": 32, "resamples": 200},
        "scheme": {"weight": {"bits": 2}},
        "steps": {"rtn": {}},
        "outputs": str(tmp_path / "outputs"),
        "store": str(tmp_path / "store"),
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def run(folder, *words):
    return main(["run", "--config", str(folder / "small.yaml"), *words])


def metrics(folder):
    [path] = (folder / "outputs").rglob("metrics.json")
    return json.loads(path.read_text()), path.parent


@needs_lm_eval
def test_both_models_answer_the_same_samples_of_a_cloze_and_a_multiple_choice(tasks, monkeypatch, capsys):
    import torch
    import transformers

    from ptq.models import shared

    loads = []
    load = shared.load
    monkeypatch.setattr(shared, "load", lambda *a: (loads.append(1), load(*a))[1])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "hf"))
    words = f"evaluation.tasks=[{tasks}/cloze.yaml,{tasks}/choice.yaml]"
    assert run(tasks, words) == 0, capsys.readouterr()
    found, folder = metrics(tasks)
    assert loads == [1]
    assert [(t["task"], t["metric"], t["samples"]) for t in found["tasks"]] == [
        ("choice", "acc", 24),
        ("cloze", "acc", 24),
    ]
    assert {t["bos"] for t in found["tasks"]} == {found["bos"]["evaluation"] or "nothing"}
    table = pyarrow.parquet.read_table(folder / "tasks.parquet").to_pylist()
    assert len(table) == 48
    for task in found["tasks"]:
        rows = [row for row in table if row["task"] == task["task"]]
        assert task["baseline"] == sum(row["baseline_right"] for row in rows) / 24
        assert task["quantized"] == sum(row["quantized_right"] for row in rows) / 24
        assert task["lost"] == sum(row["baseline_right"] and not row["quantized_right"] for row in rows)
    # The baseline's greedy next token, asked of the model without lm-eval.
    model = transformers.AutoModelForCausalLM.from_pretrained(yaml.safe_load((tasks / "small.yaml").read_text())["model"]["path"])  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.config._name_or_path)
    lines = [json.loads(line) for line in (tasks / "cloze.jsonl").read_text().splitlines()]
    begin = tokenizer("a").input_ids[: -len(tokenizer("a", add_special_tokens=False).input_ids)]
    for row in (row for row in table if row["task"] == "cloze"):
        line = lines[row["sample"]]
        whole = tokenizer(line["text"] + line["word"], add_special_tokens=False).input_ids
        context = len(tokenizer(line["text"], add_special_tokens=False).input_ids)
        with torch.no_grad():
            guess = model(torch.tensor([[*begin, *whole]])).logits[0, len(begin) + context - 1 : -1].argmax(-1)
        assert row["baseline_right"] == (guess.tolist() == whole[context:])
    assert "difference and 95% interval" in capsys.readouterr().out
    # Another run of the same model and tasks: the baseline does not answer again.
    assert run(tasks, words, "scheme.weight.bits=8") == 0
    assert "answered by the baseline before" in capsys.readouterr().out
    # A changed task is another run.
    (tasks / "cloze.jsonl").write_text("\n".join(map(json.dumps, lines[:5])))
    assert run(tasks, words, "scheme.weight.bits=8") == 0
    assert "finished before" not in capsys.readouterr().out


@needs_lm_eval
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("doc_to_target"), "doc_to_target: missing: give it a value"),
        (lambda c: c.pop("task"), "task: missing"),
        (lambda c: c.pop("test_split"), "test_split: missing, and so is validation_split"),
        (lambda c: c.pop("dataset_kwargs"), "dataset_kwargs.data_files: missing"),
        (lambda c: c.update(output_type="loglikelihod"), "did you mean 'loglikelihood'?"),
        (lambda c: c.update(output_type="loglikelihood_rolling"), "is not right or wrong a sample"),
        (lambda c: c.update(output_type="multiple_choice"), "doc_to_choice: missing"),
        (lambda c: c.update(include="other.yaml"), "include: files are read alone"),
        (lambda c: c["dataset_kwargs"].update(data_files="nowhere.jsonl"), "nowhere.jsonl is neither beside the task's file"),
    ],
)  # fmt: skip
def test_a_task_file_with_a_missing_field_is_one_line_before_the_work(tasks, change, said, capsys):
    config = json.loads(json.dumps(CLOZE))
    change(config)
    (tasks / "mine.yaml").write_text(yaml.safe_dump(config))
    assert run(tasks, f"evaluation.tasks=[{tasks}/mine.yaml]") == 2
    err = capsys.readouterr().err
    assert "evaluation.tasks[0]: " in err and "mine.yaml" in err and said in err and err.count("\n") == 1
    assert not (tasks / "outputs").exists()


@needs_lm_eval
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluation.tasks=[nowhere.yaml]"], "evaluation.tasks[0]: nowhere.yaml is not there"),
        (["evaluation.tasks=[{0}/cloze.yaml,{0}/cloze.yaml]"], "evaluation.tasks[1]: a second task 'cloze'"),
        (["evaluation.tasks=[{0}/cloze.yaml]", "execution.weights=offloaded"], "but execution.weights is offloaded: use resident"),
        (["evaluation.task_samples=4"], "evaluation.task_samples: 4 changes nothing without evaluation.tasks"),
        (["evaluation.tasks=[{0}/code.yaml]"], "a task file is data and names no code"),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_answered_are_one_line_before_the_work(tasks, words, said, capsys):
    (tasks / "code.yaml").write_text("task: x\ndoc_to_text: !function os.system\n")
    assert run(tasks, *(word.format(tasks) for word in words)) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (tasks / "outputs").exists()


@needs_lm_eval
def test_a_name_that_lm_eval_does_not_know_is_one_line_before_the_work(tasks, monkeypatch, capsys):
    from ptq.evaluation.tasks import harness

    class Few:
        """lm-eval's own, of which there are thousands, would take seconds to read."""

        all_tasks = ("hellaswag", "lambada_openai")
        all_tags = ("ai2_arc",)

    monkeypatch.setattr(harness, "_manager", lambda shipped: Few())
    assert run(tasks, f"evaluation.tasks=[{tasks}/cloze.yaml,helaswag]", "--dry-run") == 2
    err = capsys.readouterr().err
    assert "evaluation.tasks: 'helaswag' is no task of lm-eval, and no .yaml file; did you mean 'hellaswag'?" in err
    assert err.count("\n") == 1
    assert run(tasks, f"evaluation.tasks=[{tasks}/cloze.yaml,hellaswag,ai2_arc]", "--dry-run") == 0


def test_without_lm_eval_the_extra_is_named_before_the_work(tasks, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    assert run(tasks, f"evaluation.tasks=[{tasks}/cloze.yaml]") == 2
    err = capsys.readouterr().err
    assert "evaluation.tasks: needs lm_eval, which is not installed: pip install 'ptq-framework[tasks]'" in err
    assert not (tasks / "outputs").exists()


def test_a_recipe_that_somebody_sent_names_no_task_without_trust(tasks, capsys):
    content = yaml.safe_load((tasks / "small.yaml").read_text())
    content["evaluation"]["tasks"] = ["cloze.yaml"]
    (tasks / "small.yaml").write_text(yaml.safe_dump(content))
    assert run(tasks, "--dry-run") == 2
    assert (
        "evaluation.tasks.0: 'cloze.yaml' in a recipe file: the templates of a task may run code"
        in capsys.readouterr().err
    )
    if importlib.util.find_spec("lm_eval") is not None:
        assert run(tasks, "--dry-run", "--trust") == 0
