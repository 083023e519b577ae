"""The baseline's results on a recipe's evaluation tokens: computed once, then read from the store."""

import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ptq.data.sampling import Tokens
from ptq.errors import UserError
from ptq.evaluation.token_comparison import Remembered, window_losses
from ptq.files.safetensors_file import write_tensors
from ptq.network.block_stream import Flow, Nothing
from ptq.ranks.reduction import in_shares
from ptq.run.session import Session, open_session


@dataclass(frozen=True)
class Baseline:
    """Per-window losses (windows,) and final hidden states (windows, length, channels) of the unquantized model."""

    losses: torch.Tensor
    hidden: torch.Tensor


def baseline_of(session: Session, tokens: Tokens) -> Baseline:
    """Returns the baseline on `tokens`: no forward pass runs when the store holds it.

    Raises:
        UserError: when the model itself gives NaN or inf.
    """
    return _found_or(session, tokens, lambda key: _evaluated(session, tokens, key))


def late_baseline(session: Session, tokens: Tokens) -> Baseline:
    """Returns the baseline that another run was evaluating when this one, whose blocks are quantized now, began with them.

    Where that run has not come to its end the model is loaded once more.

    Raises:
        UserError: as `baseline_of`.
    """

    def evaluate(key: dict[str, object]) -> Baseline:
        with open_session(session.recipe, session.journal, session.folder, session.shared, session.world) as plain:
            return _evaluated(plain, tokens, key)

    return _found_or(session, tokens, evaluate)


def being_evaluated(session: Session, tokens: Tokens) -> bool:
    """Returns whether another run evaluates the baseline on `tokens` at this moment."""
    return session.store.being_made("baseline", _key(session, tokens))


def _found_or(session: Session, tokens: Tokens, evaluate: Callable[[dict[str, object]], Baseline]) -> Baseline:
    """Returns the baseline in the store, or what `evaluate` makes and keeps there while others wait for it."""
    key = _key(session, tokens)
    with session.store.found_or_mine("baseline", key, lambda line: session.journal.say(f"baseline: {line}")) as found:
        if found is not None:
            try:
                baseline = _read(found, tokens)
            except ValueError as error:
                session.store.made_again("baseline", str(error))
            else:
                session.journal.say("baseline: evaluated before, read from the store")
                return baseline
        return evaluate(key)


def known_baseline(session: Session, tokens: Tokens) -> Baseline | None:
    """Returns the baseline on `tokens` where it has been evaluated before, else None."""
    found = session.store.find("baseline", _key(session, tokens))
    if found is None:
        return None
    try:
        return _read(found, tokens)
    except ValueError as error:
        session.store.made_again("baseline", str(error))
        return None


def kept_baseline(session: Session, tokens: Tokens, flow: Flow) -> Baseline:
    """Returns the baseline from the samples that have passed the unquantized blocks, and keeps it in the store.

    Raises:
        UserError: when the model itself gives NaN or inf.
    """
    check_unquantized(flow)
    chunk = session.recipe.evaluation.chunk
    with session.stream.head(changed=False) as head:

        def work(w: slice) -> tuple[torch.Tensor, ...]:
            known = log_probabilities_of(session, tokens, w)
            return (window_losses(head, flow.hidden[w], tokens.ids[w], chunk, known),)

        losses = in_shares(session.world, len(tokens.ids), work)[0]
    if not torch.isfinite(losses).all():
        raise UserError("NaN or inf in the unquantized model's logits: try model.dtype=float32")
    entry, key = {"losses": losses, "hidden": flow.hidden}, _key(session, tokens)
    found = session.store.add("baseline", key, lambda path: write_tensors(path, entry), session.about(tokens))
    # Read back: the first run and all later ones go on from the same tensors.
    return _read(found, tokens)


def log_probabilities_of(session: Session, tokens: Tokens, windows: slice) -> Remembered:
    """Returns who knows what the baseline finds likely in some windows: points of a sweep compute it once, where there is room."""
    evaluation = session.recipe.evaluation
    key = "log-probabilities", tokens.fingerprint, evaluation.batch_size, evaluation.chunk, torch.get_num_threads()

    def remembered(place: tuple[int, int], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        return session.shared.of_model((*key, windows.start, *place), compute)

    return remembered


def check_unquantized(flow: Flow) -> None:
    """Raises `UserError` where NaN or inf has come out of the unquantized blocks that the samples have passed."""
    if (place := flow.first_nonfinite()) is not None:
        raise UserError(f"NaN or inf in the unquantized model from {place} on: try model.dtype=float32")


def _key(session: Session, tokens: Tokens) -> dict[str, object]:
    evaluation = session.recipe.evaluation
    return {**session.key(tokens), "batch_size": evaluation.batch_size, "chunk": evaluation.chunk}


def _evaluated(session: Session, tokens: Tokens, key: dict[str, object]) -> Baseline:
    """Evaluates the baseline, and keeps it in the store."""
    with session.journal.phase("baseline"):
        flow = session.stream.open(tokens.ids, session.recipe.evaluation.batch_size, exact=True, shared=True)
        kept = session.kept("baseline", key, [flow], Nothing())
        session.stream.run([flow], Nothing(), "baseline", kept)
        baseline = kept_baseline(session, tokens, flow)
        if kept is not None:
            kept.drop()
    return baseline


def _read(path: pathlib.Path, tokens: Tokens) -> Baseline:
    """Returns the baseline in a file. Raises `ValueError` unless it is one of `tokens`, by its names and shapes."""
    try:
        entry = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    if entry.keys() != {"losses", "hidden"}:
        raise ValueError(f"it holds {', '.join(sorted(entry)) or 'nothing'}, no losses and hidden states")
    baseline = Baseline(entry["losses"], entry["hidden"])
    windows, length = tokens.ids.shape
    if (
        baseline.losses.shape != (windows,)
        or baseline.hidden.ndim != 3
        or baseline.hidden.shape[:2] != (windows, length)
    ):
        shapes = f"{tuple(baseline.losses.shape)} and {tuple(baseline.hidden.shape)}"
        raise ValueError(f"its losses and hidden states are {shapes}, not of {windows} windows of {length} tokens")
    return baseline
