"""llama.cpp's own losses on given windows of tokens, and its own tokens of a text: JSON in, JSON out.

    echo '{"model": "m.gguf", "windows": [[1, 2, 3]], "text": "hello"}' | python experiments/bench/llama_cpp.py

Runs in any environment with numpy and a package that holds llama.cpp as a cffi module: llama-cpp-py-sync (a current
llama.cpp; glibc 2.38 or newer) or llama-cpp-cffi (of April 2025; libstdc++ of GCC 14). Needs nothing else of this project.
"""

import importlib.util
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np


def main() -> None:
    """Reads the request from stdin, writes the answer as the last line of stdout."""
    request = json.load(sys.stdin)
    lib, ffi = _library()
    lib.llama_backend_init()
    options = lib.llama_model_default_params()
    options.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(request["model"].encode(), options)
    if model == ffi.NULL:
        raise SystemExit(f"llama.cpp does not load {request['model']}")
    answer: dict[str, Any] = {"losses": [_loss(lib, ffi, model, window) for window in request["windows"]]}
    if "text" in request:
        text = request["text"].encode()
        tokens = ffi.new("llama_token[]", len(text) + 8)
        count = lib.llama_tokenize(lib.llama_model_get_vocab(model), text, len(text), tokens, len(tokens), False, False)
        answer["tokens"] = list(tokens[0:count])
    print("\n" + json.dumps(answer), flush=True)
    # The library's destructors outlive what they need when the interpreter takes things down.
    os._exit(0)


def _library() -> tuple[Any, Any]:
    """Returns (lib, ffi) of llama.cpp."""
    if importlib.util.find_spec("llama_cpp_py_sync") is not None:
        from llama_cpp_py_sync import _cffi_bindings as bindings

        return bindings.get_lib(), bindings.get_ffi()
    found = importlib.util.find_spec("llama")
    places = [pathlib.Path(p) for p in (found.submodule_search_locations or [])] if found is not None else []
    file = next((f for place in places for f in place.glob("_llama_cpp_cpu*.so")), None)
    if file is None:
        raise SystemExit("llama.cpp is not there: pip install llama-cpp-py-sync, or llama-cpp-cffi")
    # The package itself would import much more than the library.
    spec = importlib.util.spec_from_file_location("llama._llama_cpp_cpu", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.lib, module.ffi


def _loss(lib: Any, ffi: Any, model: Any, window: list[int]) -> float:
    """Returns the mean cross-entropy of a window's tokens from the second on, each given all before it."""
    options = lib.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = len(window)
    context = lib.llama_init_from_model(model, options)
    batch = lib.llama_batch_init(len(window), 0, 1)
    for i, token in enumerate(window):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    batch.n_tokens = len(window)
    if lib.llama_decode(context, batch) != 0:
        raise SystemExit("llama_decode failed")
    rows = 4 * lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    total = 0.0
    for i, target in enumerate(window[1:]):
        row = np.frombuffer(ffi.buffer(lib.llama_get_logits_ith(context, i), rows), np.float32).astype(np.float64)
        total += row.max() + np.log(np.exp(row - row.max()).sum()) - row[target]
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    return total / (len(window) - 1)


if __name__ == "__main__":
    main()
