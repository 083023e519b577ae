"""llama.cpp's own losses on given windows of tokens, and its own tokens of a text: JSON in, JSON out.

    python experiments/bench/llama_cpp.py --fetch FOLDER
    echo '{"model": "m.gguf", "windows": [[1, 2, 3]], "text": "hello"}' | python experiments/bench/llama_cpp.py FOLDER

FOLDER holds llama.cpp's shared libraries. `--fetch` takes them from the npm registry (its address: `NPM_CONFIG_REGISTRY`):
they need nothing newer than glibc 2.34, while the wheels on PyPI need 2.38. Needs numpy, and nothing else of this project.
"""

import argparse
import base64
import ctypes
import hashlib
import io
import json
import os
import pathlib
import platform
import sys
import tarfile
import urllib.request
from ctypes import POINTER, c_char_p, c_float, c_int8, c_int32, c_uint8, c_uint32, c_void_p
from typing import Any

import numpy as np

VERSION = "3.22.1"
PACKAGES = {
    ("Linux", "x86_64"): (
        "linux-x64",
        "5uCCDNqWCNfaAm8aR/Uzxbo4HBpKgNF91kCHPepKhgMgV2OAmatoefbOlMihsqCiH2Od35E/eUHQCFbfRBJuOg==",
    )
}
"""npm's package of each platform that was tried, and the SHA-512 of its archive as the registry states it."""
DEFAULTS = (512, 2048, 512)
"""n_ctx, n_batch and n_ubatch of llama.cpp's default parameters: other figures in these places mean another layout."""


class Parameters(ctypes.Structure):
    """The first fields of ``llama_context_params``; of ``llama_model_params`` none is used.

    Both are longer than what is named here and shorter than this. The calling conventions of x86-64 and AArch64 pass
    structures of this size by address or on the stack, last, so that what a library does not know of is never read.
    """

    _fields_ = (("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("rest", c_uint8 * 1012))


class Batch(ctypes.Structure):
    """``llama_batch``."""

    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    )  # fmt: skip


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "llama_backend_init": (None,),
    "llama_model_default_params": (Parameters,),
    "llama_context_default_params": (Parameters,),
    "llama_model_load_from_file": (c_void_p, c_char_p, Parameters),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_tokenize": (
        c_int32, c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, ctypes.c_bool, ctypes.c_bool,
    ),
    "llama_init_from_model": (c_void_p, c_void_p, Parameters),
    "llama_batch_init": (Batch, c_int32, c_int32, c_int32),
    "llama_decode": (c_int32, c_void_p, Batch),
    "llama_get_logits_ith": (POINTER(c_float), c_void_p, c_int32),
    "llama_batch_free": (None, Batch),
    "llama_free": (None, c_void_p),
}  # fmt: skip
"""What is called: type of the result, then of the arguments."""


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
    llama = _library(arguments.folder)
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


def fetch(folder: pathlib.Path) -> None:
    """Puts the shared libraries of llama.cpp into `folder`; ends the program where there are none for this platform."""
    place = (platform.system(), platform.machine())
    if place not in PACKAGES:
        raise SystemExit(
            f"no llama.cpp known for {' '.join(place)}: build it, and name the folder of its shared libraries"
        )
    name, integrity = PACKAGES[place]
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
    url = f"{registry}/@node-llama-cpp/{name}/-/{name}-{VERSION}.tgz"
    with urllib.request.urlopen(url, timeout=120) as answer:
        archive = answer.read()
    if base64.b64encode(hashlib.sha512(archive).digest()).decode() != integrity:
        raise SystemExit(f"{url}: not the archive that was tried (its SHA-512 differs)")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            path = pathlib.PurePosixPath(member.name)
            content = files.extractfile(member) if ".so" in path.suffixes or path.name == "LICENSE" else None
            if content is not None:
                (folder / path.name).write_bytes(content.read())


def _library(folder: pathlib.Path) -> Any:
    """Returns llama.cpp with its signatures declared."""

    def named(stem: str) -> Any:
        found = sorted(p for p in folder.glob(f"{stem}.*") if ".so" in p.suffixes or p.suffix == ".dylib")
        if not found:
            raise SystemExit(f"{folder} holds no {stem}: python experiments/bench/llama_cpp.py --fetch {folder}")
        return ctypes.CDLL(str(found[0].resolve()))

    named("libggml").ggml_backend_load_all_from_path(str(folder.resolve()).encode())
    llama = named("libllama")
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    llama.llama_backend_init()
    options = llama.llama_context_default_params()
    if (options.n_ctx, options.n_batch, options.n_ubatch) != DEFAULTS:
        raise SystemExit(f"{folder}: a llama.cpp whose llama_context_params begins otherwise than this script knows")
    return llama


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
    main()
