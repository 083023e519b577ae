"""Token windows out of a text, with a fingerprint that goes into every result."""

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from ptq.config.schema import TextConfig
from ptq.data.sources import Text, read_text
from ptq.errors import UserError


@dataclass(frozen=True)
class Tokens:
    """Windows of token ids.

    Attributes:
        ids: int64 (samples, length).
        fingerprint: SHA-256 over shape and ids.
        source: name of the text, such as ``docs/test``.
    """

    ids: torch.Tensor
    fingerprint: str
    source: str


def sample_tokens(
    tokenizer: Any,
    config: TextConfig,
    samples: int | None,
    length: int,
    sampling: str,
    seed: int,
    bos: bool,
    max_positions: int | None,
    field: str,
) -> Tokens:
    """Draws `samples` windows (None: all) of `length` tokens from the text that `config` names.

    The text is tokenised once, without special tokens. ``contiguous`` windows follow each other from the start and the
    tail is dropped; ``random`` windows start at places drawn by `seed`. C4 old is random slices of single documents whatever
    `sampling` says, as its protocol has it. With `bos` each window begins with the
    tokenizer's BOS and holds one text token less.

    Raises:
        UserError: when there is too little text, the window is longer than `max_positions`, or there is no BOS.
    """
    if max_positions is not None and length > max_positions:
        raise UserError(
            f"{field}: windows of {length} tokens are longer than the model's {max_positions} positions: use fewer"
        )
    if bos and tokenizer.bos_token_id is None:
        raise UserError(f"{field}: bos is true, but the tokenizer has no BOS token: use bos=false")
    text_length = length - 1 if bos else length
    if config.source == "mix":
        parts = _mixed(tokenizer, config, samples, text_length, sampling, seed, field)
    else:
        parts = [_windows(tokenizer, config, samples, text_length, sampling, seed, field)]
    ids = torch.cat([windows for windows, _ in parts])
    if bos:
        ids = torch.cat([torch.full((len(ids), 1), tokenizer.bos_token_id), ids], dim=1)
    return Tokens(ids, fingerprint(ids), "+".join(name for _, name in parts))


def fingerprint(ids: torch.Tensor) -> str:
    """Returns the SHA-256 of token ids (samples, length), shape included, as 64 hex digits."""
    digest = hashlib.sha256(str(tuple(ids.shape)).encode())
    digest.update(ids.to("cpu", torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _mixed(
    tokenizer: Any, config: TextConfig, samples: int | None, length: int, sampling: str, seed: int, field: str
) -> list[tuple[torch.Tensor, str]]:
    if samples is None:
        raise UserError(f"{field}.mix: needs a number of samples to share out: give one")
    share, rest = divmod(samples, len(config.mix))
    counts = [share + (i < rest) for i in range(len(config.mix))]
    return [
        _windows(tokenizer, part, count, length, sampling, seed + i, f"{field}.mix[{i}]")
        for i, (part, count) in enumerate(zip(config.mix, counts, strict=True))
        if count
    ]


def _windows(
    tokenizer: Any, config: TextConfig, samples: int | None, length: int, sampling: str, seed: int, field: str
) -> tuple[torch.Tensor, str]:
    text = read_text(config, field)
    if text.slices:
        return _slices(tokenizer, text, samples or text.windows or 1, length, seed, field), text.name
    ids = torch.tensor(_tokenise(tokenizer, text.joined), dtype=torch.int64)
    there = len(ids) // length
    wanted = min(there, text.windows or there) if samples is None else samples
    if wanted < 1 or wanted > there:
        fewer = f"ask for {there} or fewer, shorten" if there else "shorten"
        raise UserError(
            f"{field}: {text.name} has {len(ids)} tokens, {there} windows of {length}; {max(wanted, 1)} were asked for: "
            f"{fewer} the windows, or name a longer text"
        )
    if sampling == "contiguous":
        return ids[: wanted * length].view(wanted, length), text.name
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - length + 1, (wanted,), generator=generator)
    return torch.stack([ids[s : s + length] for s in starts.tolist()]), text.name


def _slices(tokenizer: Any, text: Text, samples: int, length: int, seed: int, field: str) -> torch.Tensor:
    """Takes each window from inside one document longer than it: a document at random, with replacement, then a place in it.

    These are the draws of GPTQ's public code (`random.seed(seed)`, `randint` for the document until one is long enough,
    `randint` for the place), so that C4 old is the C4 of the papers. Documents exactly as long as a window are passed over,
    on which that code fails.
    """
    drawn = random.Random(seed)
    tokens: dict[int, list[int]] = {}
    windows: list[torch.Tensor] = []
    while len(windows) < samples:
        index = drawn.randint(0, len(text.documents) - 1)
        if index not in tokens:
            ids = _tokenise(tokenizer, text.documents[index])
            tokens[index] = ids if len(ids) > length else []
        if ids := tokens[index]:
            start = drawn.randint(0, len(ids) - length - 1)
            windows.append(torch.tensor(ids[start : start + length], dtype=torch.int64))
        elif not windows and len(tokens) == len(text.documents):
            raise UserError(f"{field}: {text.name} has no document longer than {length} tokens: shorten the windows")
    return torch.stack(windows)


def _tokenise(tokenizer: Any, text: str) -> list[int]:
    level = transformers.logging.get_verbosity()
    # A whole text is longer than any model's window: the tokenizer's warning about it says nothing here.
    transformers.logging.set_verbosity_error()
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    finally:
        transformers.logging.set_verbosity(level)
    return ids
