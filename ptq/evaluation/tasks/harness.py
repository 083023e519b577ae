"""lm-eval on a model that is in memory: it is wrapped, nothing is loaded."""

import contextlib
import difflib
import functools
import io
import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from ptq.errors import UserError
from ptq.evaluation.tasks.task_files import TaskSource


@dataclass(frozen=True)
class Sample:
    """One answer of a model.

    Attributes:
        task: the task's name.
        sample: its number in the data.
        metric: lm-eval's name for what makes it right.
        right: whether it is.
        target: the right answer, as lm-eval has it.
        answer: what the model gave: log likelihoods or a text, as JSON.
        prompt: digest of the prompt.
    """

    task: str
    sample: int
    metric: str
    right: bool
    target: str
    answer: str
    prompt: str


def evaluate_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[TaskSource], batch_size: int, bos: bool, most: int | None
) -> list[Sample]:
    """Returns the answers of `model` to `tasks`, one for each sample and metric that is right or wrong.

    Args:
        model: a causal language model in memory.
        tokenizer: its tokenizer.
        tasks: as `ptq.evaluation.tasks.task_files.read_tasks` gives them.
        batch_size: prompts that pass together.
        bos: whether prompts begin with the tokenizer's BOS.
        most: samples of each task, from the first on; None for all.

    Raises:
        UserError: for a task that lm-eval cannot make, or whose samples are not right or wrong.
    """
    with _quiet():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        manager = _manager(any(task.config is None for task in tasks))
        wrapped = HFLM(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, add_bos_token=bos
        )
        asked = [task.name if task.config is None else dict(task.config) for task in tasks]
        try:
            found = simple_evaluate(
                model=wrapped, tasks=asked, task_manager=manager, limit=most, log_samples=True, bootstrap_iters=0
            )
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            names = ", ".join(task.name for task in tasks)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"evaluation.tasks: lm-eval cannot evaluate {names} ({reason}): mend the task") from error
    answers: list[Sample] = []
    for name, samples in (found or {}).get("samples", {}).items():
        of_it = [each for sample in samples for each in _answers(str(name), sample)]
        if not of_it:
            raise UserError(f"evaluation.tasks: {name}: none of its metrics is right or wrong a sample: use acc or exact_match")  # fmt: skip
        answers += of_it
    return sorted(answers, key=lambda each: (each.task, each.metric, each.sample))


def check_names(tasks: Sequence[TaskSource]) -> None:
    """Raises `UserError` for a task that is no file and none of lm-eval's own; takes some seconds where there is one that is no file."""
    for name in (task.name for task in tasks if task.config is None):
        known = [*_manager(True).all_tasks, *_manager(True).all_tags]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see lm-eval ls tasks"
            raise UserError(f"evaluation.tasks: {name!r} is no task of lm-eval, and no .yaml file; {hint}")


@functools.cache
def _manager(shipped: bool) -> Any:
    """Returns what knows lm-eval's tasks, its own too where `shipped`: thousands of files are read for these."""
    with _quiet():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_defaults=shipped)


def _answers(task: str, sample: dict[str, Any]) -> Iterator[Sample]:
    for metric in sample.get("metrics", ()):
        value = sample.get(metric)
        if isinstance(value, bool | int | float | numpy.number | numpy.bool_) and float(value) in {0.0, 1.0}:
            answer = json.dumps(sample.get("filtered_resps"), default=str)
            yield Sample(
                task, int(sample["doc_id"]), str(metric), bool(value), str(sample.get("target")), answer, str(sample.get("prompt_hash", ""))
            )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps lm-eval's progress from the screen, and its seeds from the random generators of this process."""
    state, numbers = random.getstate(), numpy.random.get_state()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        random.setstate(state)
        numpy.random.set_state(numbers)
