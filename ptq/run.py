"""One experiment: load, find links, calibrate, evaluate the baseline, quantize block by block, evaluate, report."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from ptq.attention import attentions_of, use_simulated_attention
from ptq.baseline import baseline_of
from ptq.calibrate import statistics_of
from ptq.config import TENSORS, Recipe
from ptq.environment import environment
from ptq.errors import UserError
from ptq.evaluate import compare, compare_tokens
from ptq.export.running import adapted, check_export, export_session, needs_saved_weights
from ptq.files import ensure_folder, write_text
from ptq.journal import Journal
from ptq.preflight import check_before
from ptq.quantization import QuantizeVisitor, size_of
from ptq.results import describe_spec, table, write_results
from ptq.scheme import attention_tensors, check_attention
from ptq.session import Session, open_session
from ptq.statistics_report import outlier_table, save_picture
from ptq.steps.base import REFERENCE, SAMPLES, STATISTICS, TRANSFORM, Plan, Samples, Step
from ptq.steps.registry import build_steps

_BEGINNINGS = {"recipe.yaml", "run.log", "statistics.log"}
"""What a run writes before its first result."""


def run(recipe: Recipe) -> pathlib.Path:
    """Runs `recipe` from calibration to the report. Returns the folder that holds the results.

    Raises:
        UserError: for anything that the user can mend, before the work where it can be known before.
    """
    steps = build_steps(recipe.steps)
    recipe = adapted(recipe)
    wanted = _wanted(recipe, steps)
    check_before(recipe)
    with _folder_of_a_run(recipe) as folder:
        return _run(recipe, steps, wanted, folder)


def _run(recipe: Recipe, steps: dict[str, Step], wanted: frozenset[str], folder: pathlib.Path) -> pathlib.Path:
    journal = Journal(folder / "run.log")
    journal.note(f"recipe {recipe.name}, hash {recipe.digest()}")
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe.as_dict(), sort_keys=False))
    with open_session(recipe, journal) as session:
        check_export(recipe, session.network)
        with journal.phase("links"):
            traces = session.trace()
            attentions = attentions_of(session.network, session.stream) if attention_tensors(recipe.scheme) else {}
            check_attention(recipe.scheme, sum(len(names) for names in attentions.values()))
        tokens = session.evaluation_tokens()
        statistics = statistics_of(session)[0] if STATISTICS in wanted else None
        baseline = baseline_of(session, tokens)
        if attentions:
            use_simulated_attention(session.network)
        samples = _samples(session, steps, wanted)
        plan = Plan(
            session.network, session.stream, recipe.scheme, traces, statistics, samples, attentions=attentions,
            note=journal.note,
        )  # fmt: skip
        with journal.phase("plan"):
            for step in steps.values():
                step.plan(plan)
        with journal.phase("quantize"):
            flow = session.stream.open(tokens.ids, recipe.evaluation.batch_size)
            store = folder / "quantized" if needs_saved_weights(recipe) else None
            visitor = QuantizeVisitor(session, plan, steps, flow, store)
            session.stream.run([flow] if samples is None else [flow, samples.flow], visitor, "quantize")
        for name, proof in visitor.proofs.items():
            journal.say(proof.sentence(name))
        with journal.phase("evaluate"), session.stream.head() as head:
            compared = compare_tokens(head, baseline.hidden, flow.hidden, tokens.ids, recipe.evaluation.chunk)
        e = recipe.evaluation
        comparison = compare(baseline.losses, compared, tokens.ids.shape[1], e.resamples, e.confidence, e.seed)
        size = size_of(session.network, visitor, 4 if session.loaded.baseline_dtype == "fp32" else 2)
        facts = _facts(session, tokens.source, tokens.fingerprint, baseline.losses.tolist(), compared.losses.tolist())
        facts["seconds"] = {name: round(value, 3) for name, value in journal.seconds.items()}
        write_results(
            folder, recipe, comparison, size, visitor.layers, facts, environment(recipe, session.stream.device)
        )
        journal.show(table(recipe, comparison, size, facts, journal.seconds))
        export_session(session, folder)
        journal.say(f"results: {folder}")
    return folder


def _wanted(recipe: Recipe, steps: dict[str, Step]) -> frozenset[str]:
    """Returns all that the steps capture under the recipe's scheme."""
    return frozenset[str]().union(*(step.captures(recipe.scheme) for step in steps.values()))


def _samples(session: Session, steps: dict[str, Step], wanted: frozenset[str]) -> Samples | None:
    """Returns the calibration samples for steps that capture them, one batch where a transform has to be proved, or None."""
    batch = session.recipe.calibration.batch_size
    if wanted & {SAMPLES, REFERENCE}:
        ids = session.calibration_tokens().ids
    elif any(step.kind == TRANSFORM for step in steps.values()):
        ids = session.calibration_tokens().ids[:batch]
    else:
        return None
    reference = session.stream.open(ids, batch) if REFERENCE in wanted else None
    return Samples(session.stream, session.stream.open(ids, batch), reference)


def collect_statistics(recipe: Recipe, output: pathlib.Path | None = None) -> pathlib.Path:
    """Takes calibration statistics only. Returns the file: `output`, or ``statistics.safetensors`` in the run's folder."""
    check_before(recipe)
    recipe = dataclasses.replace(recipe, calibration=dataclasses.replace(recipe.calibration, statistics=None))
    with _folder_of_a_run(recipe) as folder:
        return _collect_statistics(recipe, folder, output or folder / "statistics.safetensors")


def _collect_statistics(recipe: Recipe, folder: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    ensure_folder(path.parent, "--output")
    journal = Journal(folder / "statistics.log")
    with open_session(recipe, journal) as session:
        statistics, _ = statistics_of(session)
        statistics.save(path)
        journal.show(outlier_table(statistics))
        picture = path.with_suffix(".png")
        save_picture(statistics, picture)
    journal.say(f"statistics: {path}")
    journal.say(f"picture: {picture}")
    return path


def dry_run(recipe: Recipe) -> None:
    """Checks everything that can be checked without running, and says what a run would do."""
    steps = build_steps(recipe.steps)
    recipe = adapted(recipe)
    _wanted(recipe, steps)
    for line in check_before(recipe):
        print(line)
    print(f"ok: {recipe.name} would write to {_folder(recipe)}")


def output_folder(recipe: Recipe) -> pathlib.Path:
    """Returns ``<outputs>/<recipe>/<hash of the recipe>``, created and proved writable."""
    folder = _folder(recipe)
    ensure_folder(folder, "outputs")
    return folder


@contextmanager
def _folder_of_a_run(recipe: Recipe) -> Iterator[pathlib.Path]:
    """Gives the run's folder. A refusal before there is any result leaves no trace of a folder that was not there before."""
    folder = _folder(recipe)
    above = [path for path in (folder, *folder.parents) if not path.exists()]
    ensure_folder(folder, "outputs")
    try:
        yield folder
    except UserError:
        if above and {path.name for path in folder.iterdir()} <= _BEGINNINGS:
            for path in folder.iterdir():
                path.unlink()
            with contextlib.suppress(OSError):  # another run may have put its own folder beside this one
                for path in above:
                    path.rmdir()
        raise


def _folder(recipe: Recipe) -> pathlib.Path:
    return pathlib.Path(recipe.outputs).expanduser() / recipe.name / recipe.digest()


def _facts(session: Session, source: str, fingerprint: str, before: list[float], after: list[float]) -> dict[str, Any]:
    loaded, scheme = session.loaded, session.recipe.scheme
    return {
        "baseline": f"weights {loaded.baseline_dtype}, arithmetic {loaded.arithmetic_dtype} on {session.stream.device.type}",
        "simulated": True,
        "model": session.recipe.model.path,
        "revision": loaded.revision,
        "weight_fingerprint": loaded.fingerprint,
        "evaluation_source": source,
        "evaluation_fingerprint": fingerprint,
        "tensors": {t: describe_spec(getattr(scheme, t), 16 if t == "weight" else 32) for t in TENSORS},
        "not_covered": session.network.coverage(),
        "window_losses": {"baseline": before, "quantized": after},
    }
