"""Texts that a model makes up itself, to calibrate on where no text of its own is at hand, or beside one of another kind."""

import json
import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteria

from ptq.errors import UserError
from ptq.files.atomic import write_text

MOST_ROUNDS = 4
"""Times `samples` windows that are made up at most: text is cut into other tokens than those that it was made of."""


def generated_texts(
    model: Any,
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Returns texts drawn from the model's own distribution, enough for `samples` windows of `length` tokens.

    Data-free calibration as in LLM-QAT (Liu et al. 2023, section 3.1) and "Self-calibration for Language Model Quantization
    and Pruning" (Williams et al. 2025): a first token drawn evenly from the vocabulary, the others from what the model gives,
    at temperature 1, special tokens left out.

    Args:
        model: a transformers model with a language model's head, on any device.
        tokenizer: its tokenizer.
        samples: windows to make.
        length: tokens of a window.
        seed: of all draws.
        progress: called with (tokens of each window made, `length`); all windows are made together.

    Raises:
        UserError: when the model's texts are much shorter when they are read again, so that they do not come to the length.
    """
    special = sorted({int(i) for i in tokenizer.all_special_ids})
    vocabulary = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
    plain = torch.tensor(sorted(set(range(vocabulary)) - set(special)), dtype=torch.int64)
    if not len(plain):
        raise UserError("model: its tokenizer knows special tokens only: no text can be made up of them")
    drawn = torch.Generator().manual_seed(seed)
    texts: list[str] = []
    device = model.get_input_embeddings().weight.device
    with _seeded(device, seed), torch.no_grad():
        while len(texts) < samples or _tokens(tokenizer, texts) < samples * length:
            if len(texts) >= MOST_ROUNDS * samples:
                raise UserError(
                    f"calibration.length: {len(texts)} texts of {length} tokens come to {_tokens(tokenizer, texts)} when they are "
                    f"read again, {samples * length} were asked for: ask for fewer calibration.samples"
                )
            rows = max(samples - len(texts), 1)
            first = plain[torch.randint(len(plain), (rows, 1), generator=drawn)].to(device)
            ids = model.generate(
                first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=length - 1, max_new_tokens=length - 1, suppress_tokens=special or None, use_cache=True,
                pad_token_id=special[0] if special else 0, stopping_criteria=[_Watched(progress, length)],
            )  # fmt: skip
            texts += [tokenizer.decode(row) for row in ids.cpu()]
    return texts


def write_texts(texts: list[str], path: pathlib.Path) -> None:
    """Writes a ``.jsonl`` file that ``source: file`` reads: a document a line. Raises `UserError` where it cannot be written."""
    write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))


class _Watched(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing, and tells how far ``generate`` has come."""

    def __init__(self, progress: Callable[[int, int], None], length: int):
        self._progress, self._length = progress, length

    def __call__(self, ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        """Called after every token of all windows, (windows, tokens so far)."""
        self._progress(ids.shape[1], self._length)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _tokens(tokenizer: Any, texts: list[str]) -> int:
    return sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Inside the context torch's own generators, which ``generate`` draws from, start at `seed`; then they are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
