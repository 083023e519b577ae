"""Token windows out of a text, with a fingerprint that goes into every result."""

import bisect
import hashlib
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ptq.config.schema import TextConfig
from ptq.data.sources import Text, read_text
from ptq.errors import UserError


@dataclass(frozen=True)
class Tokens:
    """Windows of token ids.

    Attributes:
        ids: int64 (samples, length), those of `begin` included.
        fingerprint: SHA-256 over shape and ids.
        source: name of the text, such as ``docs/test``.
        begin: the special tokens that begin each window, such as ``("<s>",)``.
        documents: which document of the text each window is of, by its middle token, numbered as windows come to them; None for a text that is one
            document, or whose tokenizer does not tell where a token stands.
    """

    ids: torch.Tensor
    fingerprint: str
    source: str
    begin: tuple[str, ...] = ()
    documents: tuple[int, ...] | None = None

    def since(self, first: int) -> "Tokens":
        """Returns the windows from number `first` on."""
        documents = None if self.documents is None else self.documents[first:]
        return Tokens(self.ids[first:], fingerprint(self.ids[first:]), self.source, self.begin, documents)

    @property
    def text_ids(self) -> torch.Tensor:
        """The tokens of the text alone, int64 (samples, length without what begins a window)."""
        return self.ids[:, len(self.begin) :]


Read = Callable[[TextConfig, str], Text]
"""Reads a text that is no mix, as `ptq.data.sources.read_text` does."""


@dataclass(frozen=True)
class Draw:
    """Which windows are drawn from which text.

    The text is tokenised once, without special tokens. ``contiguous`` windows follow each other from the start and the
    tail is dropped; ``random`` windows start at places drawn by `seed`. C4 old is random slices of single documents whatever
    `sampling` says, as its protocol has it. What begins each window by `bos` (see `beginning`) takes the place of text tokens.

    Attributes:
        text: the text.
        samples: windows; None for all that there are.
        length: tokens of a window.
        sampling: ``contiguous`` or ``random``.
        seed: of what is random.
        bos: what begins each window.
        field: the text's place in the recipe, for errors.
        least: windows that will do where the text has fewer than `samples`, one after another; None for no fewer.
    """

    text: TextConfig
    samples: int | None
    length: int
    sampling: str = "contiguous"
    seed: int = 0
    bos: bool | str = False
    field: str = "data"
    least: int | None = None

    @property
    def parts(self) -> list[tuple[TextConfig, str]]:
        """The texts that are read, and their places in the recipe: those of a mix, or the text itself."""
        return [(part.text, part.field) for part in self._of_single_texts()]

    def tokens(self, tokenizer: Any, read: Read = read_text) -> Tokens:
        """Returns the windows.

        Raises:
            UserError: when there is too little text, nothing of a window is left for it, or there is no BOS.
        """
        begin = beginning(tokenizer, self.bos, self.field)
        inner = replace(self, length=self.length - len(begin))
        if inner.length < 1:
            raise UserError(
                f"{self.field}: windows of {self.length} tokens, of which {len(begin)} begin each: make them longer"
            )
        if self.text.source == "mix" and self.samples is None:
            raise UserError(f"{self.field}.mix: needs a number of samples to share out: give one")
        parts = [_windows(tokenizer, part, read) for part in inner._of_single_texts() if part.samples != 0]
        ids = torch.cat([part.windows for part in parts])
        if begin:
            ids = torch.cat([torch.tensor(begin).expand(len(ids), -1), ids], dim=1)
        names = tuple(map(str, tokenizer.convert_ids_to_tokens(begin))) if begin else ()
        return Tokens(ids, fingerprint(ids), "+".join(part.name for part in parts), names, _numbered(parts))

    def _of_single_texts(self) -> list["Draw"]:
        """Returns what is drawn from each text of a mix, which share the samples out, or this draw itself."""
        if self.text.source != "mix":
            return [self]
        texts = self.text.mix
        share, rest = divmod(self.samples or 0, len(texts))
        least = None if self.least is None else -(-self.least // len(texts))
        return [
            replace(
                self,
                text=text,
                samples=share + (i < rest),
                seed=self.seed + i,
                field=f"{self.field}.mix[{i}]",
                least=least,
            )
            for i, text in enumerate(texts)
        ]


def check_length(length: int, max_positions: int | None, field: str) -> None:
    """Raises `UserError` for windows that are longer than the model has positions (None: it has no end of them)."""
    if max_positions is not None and length > max_positions:
        raise UserError(
            f"{field}: windows of {length} tokens are longer than the model's {max_positions} positions: use fewer"
        )


def beginning(tokenizer: Any, bos: bool | str, field: str) -> list[int]:
    """Returns the ids that begin every window: none (false), the tokenizer's BOS (true), or ``auto``.

    That is whatever the tokenizer itself puts before a text that it encodes with its special tokens: a model was trained
    with it or without. OPT's and LLaMA's put a BOS there, SmolLM2's, Qwen's and GPT-2's nothing.

    Raises:
        UserError: when there is no BOS, or the tokenizer does not say what it puts there.
    """
    if bos is True and tokenizer.bos_token_id is None:
        raise UserError(f"{field}: bos is true, but the tokenizer has no BOS token: use bos=false")
    if isinstance(bos, bool):
        return [tokenizer.bos_token_id] if bos else []
    text = "a"
    plain: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    whole: list[int] = tokenizer(text).input_ids
    for place in range(len(whole) - len(plain) + 1):
        if whole[place : place + len(plain)] == plain:
            return whole[:place]
    raise UserError(
        f"{field}: bos is auto, but this tokenizer encodes a text otherwise with special tokens: use true or false"
    )


def fingerprint(ids: torch.Tensor) -> str:
    """Returns the SHA-256 of token ids (samples, length), shape included, as 64 hex digits."""
    digest = hashlib.sha256(str(tuple(ids.shape)).encode())
    digest.update(ids.to("cpu", torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Part:
    """Windows (samples, length) of one text, its name, and the document of each window, None where that is not known."""

    windows: torch.Tensor
    name: str
    documents: list[int] | None


def _numbered(parts: list[_Part]) -> tuple[int, ...] | None:
    """Returns the document of every window, those of different texts told apart."""
    if any(part.documents is None for part in parts):
        return None
    pairs = [(i, document) for i, part in enumerate(parts) for document in part.documents or ()]
    numbers = {pair: n for n, pair in enumerate(dict.fromkeys(pairs))}
    return tuple(numbers[pair] for pair in pairs)


def _windows(tokenizer: Any, draw: Draw, read: Read) -> _Part:
    """Draws the windows of one text, which is no mix."""
    text, length = read(draw.text, draw.field), draw.length
    if text.slices:
        return _slices(tokenizer, text, draw)
    encoded = _tokenise(tokenizer, text.joined)
    ids = torch.tensor(encoded.input_ids, dtype=torch.int64)
    there = len(ids) // length
    wanted = min(there, text.windows or there) if draw.samples is None else draw.samples
    if draw.least is not None:
        wanted = min(wanted, max(there, draw.least))
    if wanted < 1 or wanted > there:
        fewer = f"ask for {there} or fewer, shorten" if there else "shorten"
        raise UserError(
            f"{draw.field}: {text.name} has {len(ids)} tokens, {there} windows of {length}; {max(wanted, 1)} were asked for: "
            f"{fewer} the windows, or name a longer text"
        )
    if draw.sampling == "contiguous":
        starts = list(range(0, wanted * length, length))
    else:
        generator = torch.Generator().manual_seed(draw.seed)
        starts = torch.randint(len(ids) - length + 1, (wanted,), generator=generator).tolist()
    documents = _documents(encoded, text, [start + length // 2 for start in starts])
    return _Part(torch.stack([ids[s : s + length] for s in starts]), text.name, documents)


def _documents(encoded: Any, text: Text, places: list[int]) -> list[int] | None:
    """Returns the document that the tokens at `places` stand in, None where that cannot be told."""
    if len(text.documents) < 2 or not getattr(encoded, "is_fast", False):
        return None
    lengths = [len(document) + len(text.joiner) for document in text.documents]
    ends = list(itertools.accumulate(lengths))
    spans = [encoded.token_to_chars(place) for place in places]
    return None if any(span is None for span in spans) else [bisect.bisect_right(ends, span.start) for span in spans]


def _slices(tokenizer: Any, text: Text, draw: Draw) -> _Part:
    """Takes each window from inside one document longer than it: a document at random, with replacement, then a place in it.

    These are the draws of GPTQ's public code (`random.seed(seed)`, `randint` for the document until one is long enough,
    `randint` for the place), so that C4 old is the C4 of the papers. Documents exactly as long as a window are passed over,
    on which that code fails.
    """
    samples, length = draw.samples or text.windows or 1, draw.length
    drawn = random.Random(draw.seed)
    tokens: dict[int, list[int]] = {}
    windows: list[torch.Tensor] = []
    documents: list[int] = []
    while len(windows) < samples:
        index = drawn.randint(0, len(text.documents) - 1)
        if index not in tokens:
            ids = _tokenise(tokenizer, text.documents[index]).input_ids
            tokens[index] = ids if len(ids) > length else []
        if ids := tokens[index]:
            start = drawn.randint(0, len(ids) - length - 1)
            windows.append(torch.tensor(ids[start : start + length], dtype=torch.int64))
            documents.append(index)
        elif not windows and len(tokens) == len(text.documents):
            raise UserError(
                f"{draw.field}: {text.name} has no document longer than {length} tokens: shorten the windows"
            )
    return _Part(torch.stack(windows), text.name, documents)


def _tokenise(tokenizer: Any, text: str) -> Any:
    import transformers  # a second: what is done and kept needs no tokenizer

    level = transformers.logging.get_verbosity()
    # A whole text is longer than any model's window: the tokenizer's warning about it says nothing here.
    transformers.logging.set_verbosity_error()
    try:
        return tokenizer(text, add_special_tokens=False)
    finally:
        transformers.logging.set_verbosity(level)
