"""``tokenizer.bin`` of llama2.c: i32 longest token in bytes, then for each token f32 score, i32 length, its bytes."""

import pathlib
import struct
from typing import Any

from ptq.export.vocabulary import vocabulary_of
from ptq.files.atomic import write_atomic

NEVER = -1e11
"""A score below the -1e10 from which llama2.c's search for the best merge starts: such a token is never merged into."""


def write_tokenizer(tokenizer: Any, vocabulary: int, path: pathlib.Path) -> list[str]:
    """Writes the tokens 0 .. vocabulary - 1. Returns sentences on what llama2.c, made for SentencePiece, does otherwise.

    Raises:
        UserError: for a tokenizer that is not a fast one.
    """
    found = vocabulary_of(tokenizer, vocabulary)
    pieces = [found.text(i) for i in range(vocabulary)]

    def fill(temporary: pathlib.Path) -> None:
        with temporary.open("wb") as file:
            file.write(struct.pack("<i", max(map(len, pieces))))
            for piece, score in zip(pieces, found.scores, strict=True):
                file.write(struct.pack("<fi", NEVER if score is None else score, len(piece)) + piece)

    write_atomic(path, fill)
    if found.tokens[3:4] == ["<0x00>"] and (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2):
        return []
    return [
        "llama2.c encodes as SentencePiece does, with begin 1, end 2 and bytes from 3: this tokenizer differs, "
        "so prompts may be split otherwise; decoding is right"
    ]
