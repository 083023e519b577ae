"""A fast tokenizer as the runtimes' files want it: the tokens' text, scores, kinds, merges."""

import json
from dataclasses import dataclass
from typing import Any

from ptq.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, numbered as in GGUF."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens 0 .. n - 1 of a model.

    Attributes:
        byte_level: tokens are written in GPT-2's printable symbols for bytes; otherwise in SentencePiece's way, with
            U+2581 for a space and ``<0xAB>`` for a byte.
        tokens: as the tokenizer writes them; ids without a token are empty.
        scores: minus the rank of the merge that makes the token (BPE), its log probability (Unigram), or None for a token
            that nothing is merged into.
        kinds: NORMAL, CONTROL, ...
        merges: pairs by rank (BPE).
        space_prefix: whether a space is put before the text.
        state: the tokenizer's own description, as tokenizers writes it.
    """

    byte_level: bool
    tokens: list[str]
    scores: list[float | None]
    kinds: list[int]
    merges: list[tuple[str, str]]
    space_prefix: bool
    state: dict[str, Any]

    def text(self, token: int) -> bytes:
        """Returns the bytes that a token stands for; of a SentencePiece byte token and of a special one, its name."""
        piece = self.tokens[token]
        if self.byte_level and self.kinds[token] == NORMAL and all(symbol in _BYTES for symbol in piece):
            return bytes(_BYTES[symbol] for symbol in piece)
        return piece.replace("\u2581", " ").encode()


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """Returns the vocabulary of a tokenizer for a model whose embedding has `size` rows.

    Raises:
        UserError: for a tokenizer that is not a fast one, or neither BPE nor Unigram.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("export: the model has no fast tokenizer: save one beside it, or leave the tokenizer out")
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] not in {"BPE", "Unigram"}:
        raise UserError(f"export: a tokenizer of type {model['type']}: expected BPE or Unigram")
    merges: list[tuple[str, str]] = []
    scores: dict[str, float] = {}
    if model["type"] == "Unigram":
        scores = {piece: float(score) for piece, score in model["vocab"]}
    else:
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            scores.setdefault(left + right, -float(len(merges)))
            merges.append((left, right))
    by_id = {i: piece for piece, i in tokenizer.get_vocab().items()}
    added = {token["content"]: bool(token["special"]) for token in state.get("added_tokens") or []}
    special = set(tokenizer.all_special_tokens)
    tokens = [by_id.get(i, "") for i in range(size)]
    byte_level = _mentions(state, "ByteLevel")
    kinds = [_kind(piece, added, special, byte_level, model.get("unk_token")) for piece in tokens]
    return Vocabulary(byte_level, tokens, [scores.get(p) for p in tokens], kinds, merges, _space_prefix(state), state)


def _kind(piece: str, added: dict[str, bool], special: set[str], byte_level: bool, unknown: str | None) -> int:
    if not piece:
        return UNUSED
    if not byte_level and piece == unknown:
        return UNKNOWN
    if piece in special or added.get(piece):
        return CONTROL
    if piece in added:
        return USER_DEFINED
    if not byte_level and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return BYTE
    return NORMAL


def _mentions(state: dict[str, Any], name: str) -> bool:
    return f'"{name}"' in json.dumps([state.get("pre_tokenizer"), state.get("decoder")])


def _space_prefix(state: dict[str, Any]) -> bool:
    text = json.dumps([state.get("normalizer"), state.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def byte_symbols() -> dict[int, str]:
    """Returns the printable symbol that byte-level BPE (GPT-2) writes for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_BYTES = {symbol: byte for byte, symbol in byte_symbols().items()}
