"""Fixtures: tiny trained models, cached between sessions; no test reaches the network."""

import base64
import contextlib
import fcntl
import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # Bits are compared, and a pool of threads does not outlive a fork.

import pytest
import torch
from hypothesis import register_random, settings


class _TorchRandom:
    """Torch's generator, as hypothesis wants it: an example that failed fails again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = _TorchRandom()
"""Hypothesis does not keep what it seeds alive."""
register_random(TORCH_RANDOM)
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


PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
"""A PNG of one pixel."""


@pytest.fixture
def drawn() -> None:
    """Lets pictures be drawn, for a test that looks at them."""


@pytest.fixture(autouse=True)
def pictures_are_drawn_where_they_are_looked_at(request: pytest.FixtureRequest, monkeypatch: Any) -> None:
    """Writes a pixel for every other picture: drawing took an eighth of a tiny run's time."""
    if "drawn" in request.fixturenames:
        return
    from matplotlib.figure import Figure

    def saved(figure: Figure, path: Any, **options: Any) -> None:
        pathlib.Path(path).write_bytes(PIXEL)

    monkeypatch.setattr(Figure, "savefig", saved)


@pytest.fixture(scope="session")
def cache() -> pathlib.Path:
    """Folder kept between sessions, for what takes long to make."""
    return CACHE


def _trained(kind: str, outliers: float | None = None) -> pathlib.Path:
    """Returns the folder of a tiny model, trained by one process of those that want it.

    While another trains this one, a kind that nobody trains yet is: in a cache that is empty all of them will be wanted.
    """
    from ptq.testing import TRAINING, tiny_model

    CACHE.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        files = {k: stack.enter_context((CACHE / f".{k}.lock").open("w")) for k in dict.fromkeys((kind, *TRAINING))}
        for other, file in files.items():
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                tiny_model(other, CACHE)
                fcntl.flock(file, fcntl.LOCK_UN)
                if other == kind:
                    break
        else:
            fcntl.flock(files[kind], fcntl.LOCK_EX)
        return tiny_model(kind, CACHE, outliers=outliers)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As torchrun starts ranks: the number of threads is part of an identity, and may change a product's last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps every block, although a tiny one takes less time than its writing."""
    monkeypatch.setattr("ptq.run.kept.kept_pass.WORST_SHARE", 1e9)


@pytest.fixture(scope="session")
def tiny_opt() -> pathlib.Path:
    """Folder of a trained byte-level OPT."""
    return _trained("opt")


@pytest.fixture(scope="session")
def tiny_llama() -> pathlib.Path:
    """Folder of a trained byte-level LLaMA."""
    return _trained("llama")


@pytest.fixture(scope="session")
def tiny_mixtral() -> pathlib.Path:
    """Folder of a trained byte-level mixture of experts."""
    return _trained("mixtral")


@pytest.fixture(scope="session")
def tiny_opt_outliers() -> pathlib.Path:
    """The same OPT with outlier channels injected: the same function, much harder to quantize per tensor."""
    return _trained("opt", outliers=60.0)


@pytest.fixture(scope="session")
def tiny_llama_outliers() -> pathlib.Path:
    """The same LLaMA with outlier channels injected."""
    return _trained("llama", outliers=60.0)
