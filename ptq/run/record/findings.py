"""The end of a run: its figures put together, written into its folder, and shown."""

import pathlib
from collections.abc import Mapping

import torch

from ptq.data.overlap import overlap_of
from ptq.data.sampling import Tokens
from ptq.errors import UserError
from ptq.evaluation.comparison import compare
from ptq.evaluation.tasks.accuracy import TaskResult
from ptq.evaluation.token_comparison import TokenComparison
from ptq.network.outside import outside_weights
from ptq.report.layer_errors import save_errors
from ptq.report.results import (
    Beginnings,
    Facts,
    Kernels,
    SharedText,
    WindowLosses,
    outlier_share,
    tensor_kinds,
    write_results,
)
from ptq.report.tables import result_table, task_table, tensor_table, token_table
from ptq.run.baseline import Baseline
from ptq.run.quantize_visitor import QuantizeVisitor, size_of
from ptq.run.record.environment import environment, made
from ptq.run.session import Session
from quantize.kernels.base import SIMULATED
from quantize.kernels.choice import Choice
from quantize.kernels.matmul import by_float32, by_onednn
from quantize.spec.quant_spec import QuantSpec


def report(
    session: Session,
    visitor: QuantizeVisitor,
    tokens: Tokens,
    baseline: Baseline,
    compared: TokenComparison,
    folder: pathlib.Path,
    identity: str,
    tasks: list[TaskResult],
    tuned: Mapping[str, float] | None = None,
) -> None:
    """Writes the run's files and shows its tables.

    Args:
        session: the run's.
        visitor: what it has quantized with.
        tokens: what it has evaluated on.
        baseline: the baseline's results on them.
        compared: both models' on them.
        folder: the run's.
        identity: digest of everything that the results depend on.
        tasks: both models' answers to tasks.
        tuned: figures of the step that learned on the finished network.

    Raises:
        UserError: when the quantized model's losses are NaN or inf although its hidden states are not.
    """
    if not torch.isfinite(compared.quantized).all():
        raise UserError(
            "NaN or inf in the quantized model's logits: its hidden states are too large for the head; use more bits"
        )
    recipe, journal, e = session.recipe, session.journal, session.recipe.evaluation
    comparison = compare(baseline.losses, compared, tokens.ids.shape[1], e.resamples, e.confidence, e.seed)
    loaded, device = session.loaded, session.stream.device
    calibrated = session.seen_tokens()
    o = overlap_of(loaded.tokenizer, calibrated, tokens)
    bytes_before = 4 if loaded.baseline_dtype == "fp32" else 2
    size = size_of(session.network, visitor, bytes_before)
    save_errors(visitor.layers, recipe.name, folder / "errors.png")
    kernels = _kernels(baseline.hidden.dtype, device, visitor.kernels)
    facts = Facts(
        size=size,
        baseline=f"weights {loaded.baseline_dtype}, arithmetic {loaded.arithmetic_dtype} on {device.type}",
        simulated=kernels.words == SIMULATED,
        model=recipe.model.path,
        revision=loaded.revision,
        weight_fingerprint=loaded.fingerprint,
        calibration_source=calibrated.source,
        calibration_fingerprint=calibrated.fingerprint,
        evaluation_source=tokens.source,
        evaluation_fingerprint=tokens.fingerprint,
        bos=Beginnings(" ".join(calibrated.begin), " ".join(tokens.begin)),
        overlap=SharedText(o.run, o.windows, o.tokens, o.copied, recipe.data.allow_overlap),
        tensors=tensor_kinds(visitor.layers, size, visitor.attentions, 8 * bytes_before, _outside(session)),
        not_covered=session.network.coverage(),
        window_losses=WindowLosses(baseline.losses.tolist(), compared.losses.tolist()),
        window_documents=None if tokens.documents is None else list(tokens.documents),
        identity=identity,
        outlier_share=outlier_share(visitor.layers),
        seconds={name: round(value, 3) for name, value in journal.seconds.items()},
        memory=journal.memory.memory(),
        kernels=kernels,
        made=made(),
        tasks=tasks,
        tuned=None if tuned is None else dict(tuned),
    )
    write_results(folder, recipe, comparison, visitor.layers, facts, environment(recipe, device, session.world.size))
    journal.show(tensor_table(facts.tensors))
    journal.show(token_table(comparison.token_statistics))
    if tasks:
        journal.show(task_table(tasks, e.confidence))
    journal.show(result_table(recipe, comparison, facts))


def _outside(session: Session) -> dict[str, tuple[QuantSpec, int]]:
    """Returns the formats of embedding and head, where they have one, and the parameters that each counts."""
    found = outside_weights(session.recipe.scheme, session.network)
    return {w.tensor: (w.spec, 0 if w.tied else w.parameters) for w in found if w.spec is not None}


def _kernels(dtype: torch.dtype, device: torch.device, choice: Choice) -> Kernels:
    """Returns who multiplies large matrices of `dtype`: asked by a product that is large enough."""
    probe = torch.empty(1, 1 << 10, dtype=dtype, device=device).expand(1 << 10, -1)
    calibration = "oneDNN" if by_onednn(probe, probe) else "torch in float32" if by_float32(probe, probe) else "torch"
    return Kernels(calibration, "torch", choice.ran, {} if choice.wanted == SIMULATED else choice.refused)
