"""Fixtures: tiny trained models, cached between sessions; no test reaches the network."""

import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

settings.register_profile("ptq", deadline=None, derandomize=True)
settings.load_profile("ptq")

CACHE = pathlib.Path(os.environ.get("PTQ_TEST_CACHE", pathlib.Path.home() / ".cache" / "ptq-tests"))


@pytest.fixture(scope="session", autouse=True)
def texts_are_tokenized_once() -> Iterator[None]:
    """Keeps what a tokenizer made of a text for the process: every tiny run has a store of its own, and reads the same texts."""
    from transformers import PreTrainedTokenizerBase

    from ptq.data import sampling

    plain, made = sampling._tokenise, dict[tuple[str, str], Any]()
    call = PreTrainedTokenizerBase.__call__

    def tokenise(tokenizer: Any, text: str) -> Any:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or type(tokenizer).__call__ is not call:  # A test counts calls.
            return plain(tokenizer, text)
        key = backend.to_str(), hashlib.sha256(text.encode()).hexdigest()
        if key not in made:
            made[key] = plain(tokenizer, text)
        return made[key]

    sampling._tokenise = tokenise
    yield
    sampling._tokenise = plain


@pytest.fixture(scope="session")
def cache() -> pathlib.Path:
    """Folder kept between sessions, for what takes long to make."""
    return CACHE


@pytest.fixture(scope="session")
def tiny_opt() -> pathlib.Path:
    """Folder of a trained byte-level OPT."""
    from ptq.testing import tiny_model

    return tiny_model("opt", CACHE)


@pytest.fixture(scope="session")
def tiny_llama() -> pathlib.Path:
    """Folder of a trained byte-level LLaMA."""
    from ptq.testing import tiny_model

    return tiny_model("llama", CACHE)


@pytest.fixture(scope="session")
def tiny_mixtral() -> pathlib.Path:
    """Folder of a trained byte-level mixture of experts."""
    from ptq.testing import tiny_model

    return tiny_model("mixtral", CACHE)


@pytest.fixture(scope="session")
def tiny_opt_outliers() -> pathlib.Path:
    """The same OPT with outlier channels injected: the same function, much harder to quantize per tensor."""
    from ptq.testing import tiny_model

    return tiny_model("opt", CACHE, outliers=60.0)


@pytest.fixture(scope="session")
def tiny_llama_outliers() -> pathlib.Path:
    """The same LLaMA with outlier channels injected."""
    from ptq.testing import tiny_model

    return tiny_model("llama", CACHE, outliers=60.0)
