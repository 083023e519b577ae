"""The tasks of a run: the baseline's answers before the model is quantized, the quantized model's after, sample beside sample."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator

from ptq.data.sampling import beginning
from ptq.errors import UserError
from ptq.evaluation.tasks.accuracy import TaskResult, accuracy_difference
from ptq.evaluation.tasks.harness import Sample, evaluate_tasks
from ptq.evaluation.tasks.task_files import TaskSource, read_tasks
from ptq.files.atomic import write_atomic, write_text
from ptq.files.bounded import parse_json
from ptq.run.kept.identity import machine
from ptq.run.quantize_visitor import QuantizeVisitor
from ptq.run.session import Session

SAMPLES = "tasks.parquet"


def baseline_answers(session: Session) -> list[Sample]:
    """Returns the unquantized model's answers to the recipe's tasks, out of the store where it has answered before.

    To be called while the model in memory is the unquantized one.
    """
    tasks = read_tasks(session.recipe.evaluation.tasks)
    if not tasks:
        return []
    e = session.recipe.evaluation
    key: dict[str, object] = {
        "weights": session.loaded.fingerprint, "arithmetic": session.loaded.arithmetic_dtype, "tasks": {t.name: t.digest for t in tasks},
        "samples": e.task_samples, "batch_size": e.batch_size, "bos": _begins(session), **machine(session.stream.device),
    }  # fmt: skip
    with session.store.found_or_mine("tasks", key, lambda line: session.journal.say(f"tasks: {line}")) as found:
        if found is not None:
            try:
                answers = [Sample(**each) for each in parse_json(found.read_text(encoding="utf-8"))]
                session.journal.say("tasks: answered by the baseline before, read from the store")
                return answers
            except (OSError, ValueError, TypeError) as error:
                session.store.made_again("tasks", str(error))
        answers = _answers(session, tasks)
        text = json.dumps([dataclasses.asdict(each) for each in answers])
        session.store.add("tasks", key, lambda path: write_text(path, text), session.recipe.model.path)
    return answers


def compared_answers(
    session: Session, visitor: QuantizeVisitor, baseline: list[Sample], folder: pathlib.Path
) -> list[TaskResult]:
    """Returns how the quantized model, in memory now, answers beside the baseline; every answer goes into ``tasks.parquet``.

    Raises:
        UserError: where the quantized model cannot be put together in memory, or has answered other prompts.
    """
    tasks = read_tasks(session.recipe.evaluation.tasks)
    if not tasks:
        return []
    if visitor.unbuildable:
        raise UserError(f"evaluation.tasks: the quantized model is not in memory ({visitor.unbuildable}): remove the run's folder and run again")  # fmt: skip
    quantized = _answers(session, tasks)
    if [(s.task, s.metric, s.sample, s.prompt) for s in baseline] != [(s.task, s.metric, s.sample, s.prompt) for s in quantized]:  # fmt: skip
        raise UserError("evaluation.tasks: the two models have not had the same prompts: the task's data change from run to run")  # fmt: skip
    _write(folder / SAMPLES, baseline, quantized)
    words = _begins(session) or "nothing"
    done = []
    for task, metric in dict.fromkeys((s.task, s.metric) for s in baseline):
        before = [s.right for s in baseline if (s.task, s.metric) == (task, metric)]
        after = [s.right for s in quantized if (s.task, s.metric) == (task, metric)]
        done.append(accuracy_difference(task, metric, before, after, session.recipe.evaluation.confidence, words))
    return done


def _answers(session: Session, tasks: list[TaskSource]) -> list[Sample]:
    e, model = session.recipe.evaluation, session.network.model
    with session.journal.phase("tasks"), _with_cache(model):
        return evaluate_tasks(
            model, session.loaded.tokenizer, tasks, e.batch_size, bool(_begins(session)), e.task_samples
        )


@contextlib.contextmanager
def _with_cache(model: object) -> Iterator[None]:
    """Lets the model keep keys and values while it generates, which passes through blocks do without."""
    config = model.config  # type: ignore[attr-defined]
    before, config.use_cache = config.use_cache, True
    try:
        yield
    finally:
        config.use_cache = before


def _begins(session: Session) -> str:
    """Returns what begins each prompt, as it begins each evaluation window: the BOS, or nothing."""
    tokenizer = session.loaded.tokenizer
    ids = beginning(tokenizer, session.recipe.evaluation.bos, "data.evaluation")
    return " ".join(map(str, tokenizer.convert_ids_to_tokens(ids))) if ids else ""


def _write(path: pathlib.Path, baseline: list[Sample], quantized: list[Sample]) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {name: [getattr(s, name) for s in baseline] for name in ("task", "sample", "metric", "target", "prompt")}
    for name, samples in (("baseline", baseline), ("quantized", quantized)):
        columns[f"{name}_right"] = [s.right for s in samples]
        columns[f"{name}_answer"] = [s.answer for s in samples]
    table = pyarrow.table(columns)
    write_atomic(path, lambda place: pyarrow.parquet.write_table(table, place))
