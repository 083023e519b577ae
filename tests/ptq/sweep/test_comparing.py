"""ptq compare: pairs of runs by their files alone, and what cannot be compared is told in a line."""

import json
import pathlib

import numpy as np
import pytest
from scipy import stats

from ptq.cli.app import main
from ptq.errors import UserError
from ptq.evaluation.paired import holm
from ptq.sweep.comparing import against, compare_runs, read_run

BASE = np.random.default_rng(0).normal(2, 0.3, 12)


def make(folder: pathlib.Path, losses, kl=0.1, errors=None, **facts) -> pathlib.Path:
    """A finished run's files, as far as a comparison reads them."""
    folder.mkdir(parents=True)
    metrics = {
        "quantized_perplexity": float(np.exp(np.mean(losses))),
        "baseline_perplexity": float(np.exp(np.mean(BASE))),
        "kl_mean": kl,
        "top1_agreement": 0.9,
        "size": {"bits_per_weight": 4.2},
        "window_losses": {"baseline": BASE.tolist(), "quantized": list(map(float, losses))},
        "evaluation_fingerprint": "aa" * 32,
        "evaluation_source": "docs/test",
        "weight_fingerprint": "bb" * 32,
        **facts,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    rows = "".join(f"{name},{error}\n" for name, error in (errors or {"a.q_proj": 0.1, "a.v_proj": 0.2}).items())
    (folder / "layers.csv").write_text(f"name,output_error\n{rows}")
    return folder


@pytest.fixture
def two(tmp_path):
    worse = BASE + np.random.default_rng(1).normal(0.02, 0.005, 12)
    return make(tmp_path / "a", BASE), make(
        tmp_path / "b", worse, 0.2, {"a.q_proj": 0.4, "a.v_proj": 0.1, "a.unreached": ""}
    )


def test_two_runs_are_paired_over_their_windows_and_their_linears_side_by_side(two, capsys):
    assert main(["compare", *map(str, two), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    losses = [json.loads((folder / "metrics.json").read_text())["window_losses"]["quantized"] for folder in two]
    assert found["log_perplexity_difference"] == pytest.approx(np.mean(losses[1]) - np.mean(losses[0]))
    assert found["low"] > 0 and found["p"] == pytest.approx(2 / 2**12)
    assert found["kl_mean"] == [0.1, 0.2]
    assert found["linears"] == [
        {"name": "a.q_proj", "first": 0.1, "second": 0.4},
        {"name": "a.v_proj", "first": 0.2, "second": 0.1},
    ]
    assert main(["compare", *map(str, two)]) == 0
    out = capsys.readouterr().out
    assert "the first is better" in out and "1 of 2 Linears less in the second" in out
    assert "which document a window is of is not known" in out


def test_windows_of_one_document_count_once(tmp_path, two):
    first, second = (
        make(
            tmp_path / f"{folder.name}-documents", read_run(folder).losses, window_documents=[0] * 6 + [1] * 3 + [2] * 3
        )
        for folder in two
    )
    pair = compare_runs(read_run(first), read_run(second))
    assert (pair.paired.clusters, pair.paired.windows) == (3, 12)
    assert pair.paired.p == 0.25  # of 8 assignments of signs, all plus and all minus are as far out
    assert pair.notes == ()


def test_runs_on_other_tokens_are_refused_with_both_fingerprints(tmp_path, two, capsys):
    other = make(tmp_path / "other", BASE, evaluation_fingerprint="cc" * 32, evaluation_source="wikitext2/test")
    assert main(["compare", str(two[0]), str(other)]) == 2
    err = capsys.readouterr().err
    assert (
        "evaluation_fingerprint cccccccccccc (wikitext2/test, 12 windows), not aaaaaaaaaaaa (docs/test, 12 windows)"
        in err
    )
    assert err.count("\n") == 1


def test_other_weights_are_said_not_refused(tmp_path, two):
    other = make(tmp_path / "other", BASE, weight_fingerprint="dd" * 32)
    [note, _] = compare_runs(read_run(two[0]), read_run(other)).notes
    assert note.startswith("weight_fingerprint differs (bbbbbbbbbbbb and dddddddddddd)")


def test_a_sweep_is_corrected_for_its_number_of_comparisons(tmp_path):
    random = np.random.default_rng(2)
    runs = {n: read_run(make(tmp_path / str(n), BASE + random.normal(0.002 * n, 0.01, 12))) for n in range(1, 5)}
    found = against(runs, 1)
    assert sorted(number for number, *_ in found) == [2, 3, 4]
    assert [pair.paired.difference for _, pair, _ in found] == sorted(pair.paired.difference for _, pair, _ in found)
    assert [p for _, _, p in found] == holm([pair.paired.p for _, pair, _ in found])
    for number, pair, _ in found:
        test = stats.ttest_rel(runs[number].losses, runs[1].losses)
        assert pair.paired.difference == pytest.approx(np.mean(np.subtract(runs[number].losses, runs[1].losses)))
        assert (pair.paired.p < 0.05) == (test.pvalue < 0.05)


def test_a_sweep_is_compared_with_its_best_point_or_a_chosen_one(swept, capsys):
    assert main(["compare", str(swept.main), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    perplexities = {
        int(r["point"]): float(r["quantized_perplexity"]) for r in swept.table(swept.main) if r["status"] == "done"
    }
    assert found["reference"] == min(perplexities, key=perplexities.__getitem__)
    assert all(point["log_perplexity_difference"] >= 0 for point in found["points"]) and len(found["points"]) == 3
    assert main(["compare", str(swept.main), "--against", "2"]) == 0
    out = capsys.readouterr().out
    assert "against point 2: steps.smooth.alpha=0.3 scheme.weight.bits=8" in out
    assert "all windows are of one document, or there is one: too few" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{a}", "{b}", "{a}"], "a third folder"),
        (["{a}", "no/such"], "no/such: holds no finished run"),
        (["{a}"], "holds no sweep"),
        (["{a}", "{b}", "--against", "1"], "--against: is for a sweep"),
        (["{a}", "{b}", "--confidence", "1"], "--confidence: 1.0"),
        (["{a}", "{b}", "--jsn"], "--jsn: no such option"),
    ],
)
def test_a_mistake_is_one_line(two, arguments, said, capsys):
    assert main(["compare", *(text.format(a=two[0], b=two[1]) for text in arguments)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"window_losses": {"quantized": [null]}}'])
def test_a_damaged_run_is_told_in_one_line(two, content):
    (two[0] / "metrics.json").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        read_run(two[0])


@pytest.mark.parametrize(
    "change",
    [
        {"size": {}}, {"top1_agreement": None}, {"quantized_perplexity": "x"}, {"window_documents": ["a"] * 12}, {"window_documents": [0]},
        {"window_losses": {"quantized": BASE.tolist()}}, {"window_losses": {"quantized": BASE.tolist(), "baseline": [1.0]}},
    ],
    ids=lambda change: "-".join(change),
)  # fmt: skip
def test_a_run_that_lacks_a_figure_is_told_in_one_line(two, change, capsys):
    path = two[1] / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert main(["compare", *map(str, two)]) == 2
    err = capsys.readouterr().err
    assert "metrics.json or layers.csv is damaged" in err and err.count("\n") == 1


def test_against_a_point_that_is_not_done_is_refused(swept, capsys):
    assert main(["compare", str(swept.main), "--against", "3"]) == 2
    assert "--against: '3' is no point that is done: use best or one of 1, 2, 4, 5" in capsys.readouterr().err
