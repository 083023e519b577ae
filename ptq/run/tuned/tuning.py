"""Tuning of the finished network: between the pass that quantizes it and the one that carries what is evaluated."""

import pathlib
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ptq.config.schema import Recipe
from ptq.data.sampling import Tokens
from ptq.errors import UserError
from ptq.files.safetensors_file import write_tensors
from ptq.network.block_stream import Flow, Nothing
from ptq.ranks.world import led
from ptq.run.kept.block_file import write_block
from ptq.run.kept.kept_pass import RESUME
from ptq.run.session import Session
from ptq.steps._step import Context, Step, StepPlan, Tuner, Tuning

STATE = "tuning"
"""Folder inside that of an interrupted run, with what tuning goes on from."""


def tuner_of(steps: Mapping[str, Step]) -> tuple[str, Tuner] | None:
    """Returns the step that tunes, with its name, or None."""
    return next(((name, step) for name, step in steps.items() if isinstance(step, Tuner)), None)


def check_tuner(recipe: Recipe, steps: Mapping[str, Step]) -> None:
    """Raises `UserError` where a tuner cannot have the whole network to itself, or samples are drawn for one that is not there."""
    found, more = tuner_of(steps), recipe.calibration.tuning_samples
    if found is None:
        if more:
            raise UserError(
                f"calibration.tuning_samples: {more}, but no step learns on the finished network: use 0, or +steps.tune={{}}"
            )
        return
    name, _ = found
    if recipe.execution.weights != "resident":
        raise UserError(
            f"execution.weights: {recipe.execution.weights!r}, but steps.{name} learns on the whole network in memory: use "
            f"resident, or ~steps.{name}"
        )


def targets_of(session: Session) -> torch.Tensor:
    """Returns the unquantized network's final hidden states of the samples that are tuned on, (samples, length, channels).

    No pass runs when the store holds them.

    Raises:
        UserError: when the network gives NaN or inf.
    """
    tokens, store, journal = session.tuning_tokens(), session.store, session.journal
    asked, there = session.recipe.calibration.most_tuning_samples, len(tokens.ids)
    if there < asked:
        journal.say(f"tuning: on {there} windows, fewer than the {asked} asked for: {tokens.source} has no more")
    key = {**session.key(tokens), "batch_size": session.recipe.calibration.batch_size}
    with store.found_or_mine("states", key, lambda line: journal.say(f"targets: {line}")) as found:
        if found is not None:
            try:
                states = _read(found, tokens)
            except ValueError as error:
                store.made_again("states", str(error))
            else:
                journal.say("targets: computed before, read from the store")
                return states
        with journal.phase("targets"):
            flow = session.stream.open(tokens.ids, session.recipe.calibration.batch_size, shared=True)
            kept = session.kept("targets", key, [flow], Nothing())
            session.stream.run([flow], Nothing(), "targets", kept)
            if (place := flow.first_nonfinite()) is not None:
                raise UserError(f"NaN or inf in the unquantized model from {place} on: try model.dtype=float32")
            entry = {"hidden": flow.hidden}
            store.add("states", key, lambda path: write_tensors(path, entry), session.about(tokens))
            if kept is not None:
                kept.drop()
        return flow.hidden


def _read(path: pathlib.Path, tokens: Tokens) -> torch.Tensor:
    """Returns the states in a file. Raises `ValueError` unless they are of `tokens`, by their shape."""
    try:
        entry = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    states = entry.get("hidden")
    if states is None or states.ndim != 3 or states.shape[:2] != tokens.ids.shape:
        raise ValueError(f"it holds no hidden states of {len(tokens.ids)} windows of {tokens.ids.shape[1]} tokens")
    return states


def tune(
    session: Session,
    steps: Mapping[str, Step],
    context: Context,
    targets: torch.Tensor,
    tokens: Tokens,
    identity: str,
) -> Flow:
    """Lets the tuner of `steps` learn, puts what it has learned into the blocks, and carries `tokens` through them.

    Args:
        session: the run's, its weights resident.
        steps: with a tuner.
        context: what the steps see; all blocks are quantized.
        targets: of `targets_of`.
        tokens: what is evaluated.
        identity: of the run; what an interrupted one of another identity has kept is not taken up.
    """
    found, stream = tuner_of(steps), session.stream
    if found is None:
        raise ValueError("no step tunes")
    name, tuner = found
    with session.journal.phase("tune"):
        state = _State(session, identity)
        flow = stream.open(session.tuning_tokens().ids, 1)
        plan = tuner.tune(context, Tuning(flow, targets, state.read(), state.write))
        put_into_blocks(tuner, plan, context)
        context.plans[name] = plan
        evaluated = stream.open(tokens.ids, session.recipe.evaluation.batch_size, exact=True, shared=True)
        stream.run([evaluated], Nothing(), "tune", context.keep("tune", [evaluated], Nothing()))
    return evaluated


def put_into_blocks(tuner: Tuner, plan: StepPlan, context: Context) -> None:
    """Changes all blocks by what was learned."""
    for block in context.network.blocks:
        tuner.apply(block, plan, context)


def save_blocks(context: Context, folder: pathlib.Path) -> None:
    """Writes the blocks as they stand, one file each, as a pass that keeps its blocks would; rank 0 does."""
    if not context.stream.world.leads:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for block in context.network.blocks:
        write_block(block, folder / f"block-{block.index:05d}.safetensors", {})


class _State:
    """What tuning has kept last, in the run's folder, until the run has ended."""

    def __init__(self, session: Session, identity: str):
        self._session, self._identity = session, identity
        self._path = None if session.folder is None else session.folder / RESUME / STATE / "state.safetensors"

    def read(self) -> dict[str, torch.Tensor] | None:
        """Returns what `write` has written under the same identity, or None."""
        path = self._path
        if path is None or not led(self._session.world, path.is_file):
            return None
        if led(self._session.world, lambda: self._fits(path)):
            self._session.journal.say("tune: resumed")
            return load_file(path)
        self._session.journal.say("tune: what an interrupted run left cannot be taken up: done again")
        return None

    def _fits(self, path: pathlib.Path) -> bool:
        try:
            with safe_open(path, framework="pt") as file:
                return (file.metadata() or {}).get("identity") == self._identity
        except (SafetensorError, OSError):
            return False

    def write(self, state: Mapping[str, torch.Tensor]) -> None:
        """Writes the state, whole or not at all; rank 0 does."""
        if self._path is not None and self._session.world.leads:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path, state, {"identity": self._identity})
