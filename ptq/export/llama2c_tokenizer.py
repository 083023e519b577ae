"""``tokenizer.bin`` of llama2.c: i32 longest token in bytes, then for each token f32 score, i32 length, its bytes."""

import json
import pathlib
import struct
from typing import Any

from ptq.errors import UserError
from ptq.files import write_atomic

NEVER = -1e11
"""A score below the -1e10 from which llama2.c's search for the best merge starts: such a token is never merged into."""


def write_tokenizer(tokenizer: Any, vocabulary: int, path: pathlib.Path) -> list[str]:
    """Writes the tokens 0 .. vocabulary - 1. Returns sentences on what llama2.c, made for SentencePiece, does otherwise.

    Raises:
        UserError: for a tokenizer that is not a fast one.
    """
    tokens, notes = tokens_of(tokenizer, vocabulary)
    longest = max(len(piece) for piece, _ in tokens)

    def fill(temporary: pathlib.Path) -> None:
        with temporary.open("wb") as file:
            file.write(struct.pack("<i", longest))
            for piece, score in tokens:
                file.write(struct.pack("<fi", score, len(piece)) + piece)

    write_atomic(path, fill)
    return notes


def tokens_of(tokenizer: Any, vocabulary: int) -> tuple[list[tuple[bytes, float]], list[str]]:
    """Returns (bytes, score) of every token, and notes. Ids without a token get empty bytes.

    A BPE token's score is minus the rank of the merge that makes it, a Unigram token's its log probability.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            "export: the model's tokenizer is no fast tokenizer: save one, or use export.options.tokenizer=false"
        )
    state = json.loads(backend.to_str())
    model = state["model"]
    scores: dict[str, float] = {}
    if model["type"] == "Unigram":
        scores = {piece: float(score) for piece, score in model["vocab"]}
    elif model["type"] == "BPE":
        for rank, merge in enumerate(model["merges"]):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            scores.setdefault(left + right, -float(rank))
    by_id = {i: piece for piece, i in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_tokens)
    byte_level = '"ByteLevel"' in json.dumps([state.get("pre_tokenizer"), state.get("decoder")])
    inverse = {symbol: byte for byte, symbol in byte_symbols().items()}
    tokens: list[tuple[bytes, float]] = []
    for i in range(vocabulary):
        piece = by_id.get(i, "")
        if byte_level and piece not in special and all(symbol in inverse for symbol in piece):
            text = bytes(inverse[symbol] for symbol in piece)
        else:
            text = piece.replace("\u2581", " ").encode()
        tokens.append((text, scores.get(piece, NEVER)))
    notes = []
    if by_id.get(3) != "<0x00>" or (tokenizer.bos_token_id, tokenizer.eos_token_id) != (1, 2):
        notes.append(
            "llama2.c encodes as SentencePiece does, with begin 1, end 2 and bytes from 3: this tokenizer differs, "
            "so prompts may be split otherwise; decoding is right"
        )
    return tokens, notes


def byte_symbols() -> dict[int, str]:
    """Returns the printable symbol that byte-level BPE (GPT-2) writes for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
