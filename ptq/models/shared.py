"""What runs of one process share: the loaded model, its tokenizer, the windows drawn with it."""

import copy
import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch

from ptq.config.schema import ExecutionConfig, ModelConfig
from ptq.data.kept_tokens import kept_tokens
from ptq.data.sampling import Draw, Tokens
from ptq.files.store import Store
from ptq.models.loading import LoadedModel, fingerprint_of, load, load_tokenizer, tokenizer_fingerprint
from ptq.models.memory.memory_limits import free_memory

SPARE = 1.25
"""A model is kept for later runs where this many times its bytes are free beside it: for the copy that a run changes."""
LEFT = 4
"""What is kept beside a model leaves at least this many times its bytes free at the time."""


class Shared:
    """Loads each model once and gives every run a copy of its own, which the run may change as it likes.

    One model is kept at a time, the last: runs of one model should follow each other. Nothing is kept of a model whose
    weights are offloaded, which is read block by block anyway, nor of one that fits only once.

    Args:
        models: whether models are kept. One run by itself changes the model that it loads, and shares the rest with its checks.
        room: bytes that may be kept of what was computed of a kept model (`of_model`).
    """

    def __init__(self, models: bool = True, room: int = 0) -> None:
        self.loads, self.room = 0, room
        self._models = models
        self._model: tuple[Hashable, LoadedModel] | None = None
        self._known: dict[Hashable, Any] = {}
        self._of_model: dict[Hashable, torch.Tensor] = {}

    def load(self, config: ModelConfig, execution: ExecutionConfig, store: Store) -> LoadedModel:
        """Returns what `ptq.models.loading.load` does: a copy of the kept model, or the model itself where none can be kept."""
        key = (config, execution.device, execution.weights)
        if self._model is None or self._model[0] != key:
            self._model = None  # the old one goes before the new one comes, with what was computed of it
            self._of_model.clear()
            loaded = load(config, execution, store)
            self.loads += 1
            if not self._models or not loaded.weights.resident or not _fits_twice(loaded.model):
                return loaded
            self._model = key, loaded
        loaded = self._model[1]
        return dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))

    def tokenizer(self, config: ModelConfig, store: Store) -> Any:
        """Returns the model's tokenizer, read once."""
        return self.once(("tokenizer", config), lambda: load_tokenizer(config, store))

    def fingerprint(self, config: ModelConfig, store: Store) -> str:
        """Returns the fingerprint of the model's files, taken once: what was loaded is what counts, whatever they become."""
        return str(self.once(("fingerprint", config), lambda: fingerprint_of(config, store)))

    def tokens(self, config: ModelConfig, draw: Draw, store: Store) -> Tokens:
        """Returns the windows of `draw` for a model's tokenizer, drawn once: here, or by whoever kept them in the store.

        Raises:
            UserError: for a text or a tokenizer that cannot be had.
        """

        def drawn() -> Tokens:
            known = self.once(("tokenizer fingerprint", config), lambda: tokenizer_fingerprint(config, store))
            return kept_tokens(draw, lambda: self.tokenizer(config, store), known, store)

        found: Tokens = self.once(("tokens", config, draw), drawn)
        return found

    def of_model(self, key: Hashable, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Returns what `compute` gives of the unchanged model that was loaded last, computed once while that is kept.

        Where there is no room for it, and on other devices than the CPU, it is computed each time. Nobody may change it.
        """
        if (found := self._of_model.get(key)) is None:
            found = compute()
            if self._model is not None and found.device.type == "cpu" and self._fits(found.nbytes):
                self._of_model[key] = found
        return found

    def _fits(self, size: int) -> bool:
        held = sum(tensor.nbytes for tensor in self._of_model.values())
        return held + size <= self.room and free_memory(torch.device("cpu")) >= LEFT * size

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Returns what `make` made when it was first asked for under this key."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


def _fits_twice(model: torch.nn.Module) -> bool:
    held = sum(p.nbytes for p in model.parameters())
    return free_memory(next(model.parameters()).device) > SPARE * held
