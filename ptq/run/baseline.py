"""The baseline's results on a recipe's evaluation tokens: computed once, then read from the store."""

from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file

from ptq.data.sampling import Tokens
from ptq.evaluation.comparison import window_losses
from ptq.network.block_stream import Nothing
from ptq.run.session import Session


@dataclass(frozen=True)
class Baseline:
    """Per-window losses (windows,) and final hidden states (windows, length, channels) of the unquantized model."""

    losses: torch.Tensor
    hidden: torch.Tensor


def baseline_of(session: Session, tokens: Tokens) -> Baseline:
    """Returns the baseline on `tokens`: no forward pass runs when the store holds it."""
    evaluation = session.recipe.evaluation
    key = {**session.key(tokens), "batch_size": evaluation.batch_size}
    found = session.store.find("baseline", key)
    if found is not None:
        session.journal.say("baseline: evaluated before, read from the store")
    else:
        with session.journal.phase("baseline"):
            flow = session.stream.open(tokens.ids, evaluation.batch_size, exact=True)
            session.stream.run([flow], Nothing(), "baseline")
            with session.stream.head() as head:
                losses = window_losses(head, flow.hidden, tokens.ids, evaluation.chunk)
            entry = {"losses": losses, "hidden": flow.hidden}
            found = session.store.add("baseline", key, lambda path: save_file(entry, path))
    entry = load_file(found)
    return Baseline(entry["losses"], entry["hidden"])
