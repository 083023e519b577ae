"""Models by path: checked, with their tokenizer, their weights rounded to the baseline's type."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import huggingface_hub
import torch

from ptq.config.schema import ExecutionConfig, ModelConfig
from ptq.errors import UserError
from ptq.files.gguf_header import check_gguf
from ptq.files.safetensors_file import TensorDigests
from ptq.files.source_digest import package_digest
from ptq.files.store import Store
from ptq.files.versions import version_of
from ptq.models.gguf_tokenizer import as_llama_cpp
from ptq.models.locations import Location, ModelSource, locate, quiet, source_of
from ptq.models.memory.resident_memory import return_freed_memory
from ptq.models.stored.mxfp4 import published_in_mxfp4
from ptq.models.weights import Weights, check_config, check_directory, shards_of
from ptq.models.weights_digest import ModelDigest, digest_files

_CONVERTERS = ("ptq.models", "ptq.files")
"""The code that makes folders out of GGUF files: of other code they are made again, not of any change in the framework."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
"""What files of weights end in; of all others beside a model, a tokenizer may read any."""
MOST_BLOCKS = 1000
"""More blocks than any model has: a config that asks for more would keep the machine busy for nothing."""
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass
class LoadedModel:
    """A model ready to be streamed.

    Attributes:
        model: the causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        weights: how its parameters come into memory.
        baseline_dtype: what the weights were rounded to: fp32, fp16 or bf16.
        arithmetic_dtype: what is computed in.
        digest: gives the `fingerprint`; of offloaded weights it is not known before they have been read once.
        location: where it was found.
        revision: the hub's commit, or None.
        notes: what a run has to say of the tokenizer.
    """

    model: Any
    tokenizer: Any
    weights: Weights
    baseline_dtype: str
    arithmetic_dtype: str
    digest: ModelDigest
    location: Location
    revision: str | None
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the weights' files and the config; what of them has not been read yet is read for it."""
        return self.digest.value()


def check(config: ModelConfig, store: Store | None = None, weights: bool = True) -> Any:
    """Checks a model's files without reading its weights and returns its transformers config.

    Args:
        config: which model.
        store: where what has been read out of a GGUF file is kept; transformers parses it for seconds each time.
        weights: whether weights have to be there; without, a config.json is enough, on the hub as well.

    Raises:
        UserError: for anything missing, cut short, out of reach, or no decoder with a language model head.
    """
    return _checked(source_of(config, weights), store, weights)


def _checked(source: ModelSource, store: Store | None, weights: bool = True) -> Any:
    import transformers  # here and below: a second, which fingerprints do without

    config = source.config
    found = _config(source, store, weights)
    if source.location.kind != "gguf" and published_in_mxfp4(found):
        del found.quantization_config  # dequantized while it is read
    elif source.location.kind != "gguf" and getattr(found, "quantization_config", None) is not None:
        raise UserError(
            f"model.path: {config.path} is already quantized: expected the original 16 or 32-bit weights, or experts in MXFP4"
        )
    _check_sizes(config, found)
    # Encoders have a "causal" class too, for use as a decoder: it is what they were made for that counts.
    encoder = type(found) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(found, "is_decoder", False)
    causal = type(found) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (
        getattr(found, "auto_map", None) or {}
    )
    if encoder or getattr(found, "is_encoder_decoder", False) or not causal:
        kind = getattr(found, "model_type", type(found).__name__)
        raise UserError(
            f"model.path: {config.path} is a {kind!r}, no causal language model: expected a decoder such as LLaMA or OPT"
        )
    return found


def _check_sizes(config: ModelConfig, found: Any) -> None:
    """Refuses a config that asks for more blocks than any model has, or for code on the hub (``owner/repo`` as attention)."""
    import transformers

    blocks = getattr(found, "num_hidden_layers", None)
    if isinstance(blocks, int) and blocks > MOST_BLOCKS:
        raise UserError(
            f"model.path: the config of {config.path} asks for {blocks} blocks: more than {MOST_BLOCKS} are no model's: mend it"
        )
    parts = (found, *(value for value in vars(found).values() if isinstance(value, transformers.PretrainedConfig)))
    for part in parts:
        for name in ("_attn_implementation", "_experts_implementation"):
            asked = getattr(part, name, None)
            if isinstance(asked, str) and "/" in asked:
                raise UserError(
                    f"model.path: the config of {config.path} has {name} {asked!r:.80}, which is code on the hub: take it out"
                )


def _config(source: ModelSource, store: Store | None, weights: bool = True) -> Any:
    import transformers

    base = source.location.base
    if source.location.kind == "directory":
        (check_directory if weights else check_config)(pathlib.Path(base))

    def read() -> Any:
        return source.guarded(lambda: transformers.AutoConfig.from_pretrained(base, **source.arguments))

    if source.location.kind != "gguf":
        return read()
    key = _gguf_key(source)
    if store is None:
        return read()
    folder = store.keep("gguf-config", key, lambda temporary: read().save_pretrained(temporary), _words(source))
    return source.guarded(lambda: transformers.AutoConfig.from_pretrained(folder))


def _gguf_key(source: ModelSource) -> dict[str, object]:
    """Checks the GGUF file and returns all that its config and tokenizer depend on."""
    header = check_gguf(pathlib.Path(source.location.base) / str(source.location.gguf))
    versions = {name: version_of(name) for name in ("transformers", "tokenizers")}
    return {"source": package_digest(*_CONVERTERS), "header": header, **versions}


def _words(source: ModelSource) -> str:
    return str(pathlib.Path(source.location.base) / str(source.location.gguf))


def load_tokenizer(config: ModelConfig, store: Store | None = None) -> Any:
    """Returns the recipe's tokenizer: the model's own, or the one that it names. `store`: see `check`.

    Raises:
        UserError: when there is none or it is out of reach.
    """
    return _tokenizer(config, store)[0]


def _tokenizer(config: ModelConfig, store: Store | None) -> tuple[Any, tuple[str, ...]]:
    """Returns the tokenizer, and what has to be said of it."""
    if config.tokenizer is None:
        source = source_of(config)
        return _tokenizer_of(source, _config(source, store), store)
    with _named_tokenizer(config) as named:
        source = source_of(named, weights=False)
        found = _config(source, store) if source.location.kind == "gguf" else None
        return _tokenizer_of(source, found, store)


@contextlib.contextmanager
def _named_tokenizer(config: ModelConfig) -> Iterator[ModelConfig]:
    """Gives the place of the tokenizer that a recipe names, as that of a model; errors are told as the tokenizer's."""
    try:
        yield dataclasses.replace(config, path=config.tokenizer or config.path, revision=None, tokenizer=None)
    except UserError as error:
        raise UserError(str(error).replace("model.path:", "model.tokenizer:", 1)) from None


def tokenizer_fingerprint(config: ModelConfig, store: Store | None = None) -> str | None:
    """Returns a digest of all that the recipe's tokenizer is built from, without building it.

    None where that is not known before: on the hub, and where code of the model's own may run.

    Raises:
        UserError: when there is nothing where the tokenizer should be.
    """
    if config.trust_remote_code:
        return None
    with contextlib.nullcontext(config) if config.tokenizer is None else _named_tokenizer(config) as named:
        location = locate(named)
        if location.kind == "hub":
            return None
        if location.kind == "gguf":
            key = json.dumps(_gguf_key(ModelSource(named, location, {})), sort_keys=True)
            return hashlib.sha256(key.encode()).hexdigest()
    beside = sorted(p for p in pathlib.Path(location.base).iterdir() if p.is_file() and p.suffix not in _WEIGHTS)
    return digest_files(beside, store) if beside else None


def _tokenizer_of(source: ModelSource, found: Any, store: Store | None) -> tuple[Any, tuple[str, ...]]:
    """Returns the tokenizer beside a model, whose config is `found` (None: look for one), and what has to be said of it."""

    import transformers

    def read() -> Any:
        # The config is handed on because reading it out of a GGUF file takes seconds each time.
        base, arguments = source.location.base, source.arguments
        known = arguments if found is None else {**arguments, "config": found}
        return source.guarded(lambda: transformers.AutoTokenizer.from_pretrained(base, **known), "tokenizer")

    if source.location.kind != "gguf":
        return read(), ()
    if store is None:
        tokenizer = read()
    else:
        folder = store.keep(
            "gguf-tokenizer", _gguf_key(source), lambda temporary: read().save_pretrained(temporary), _words(source)
        )
        tokenizer = source.guarded(
            lambda: transformers.AutoTokenizer.from_pretrained(folder, config=found), "tokenizer"
        )
    note = as_llama_cpp(tokenizer, pathlib.Path(_words(source)))
    return tokenizer, () if note is None else (note,)


def load(config: ModelConfig, execution: ExecutionConfig, store: Store | None = None) -> LoadedModel:
    """Loads the model, its weights rounded to the baseline's type.

    With dtype ``auto`` the weights are rounded to fp16 (bf16 where fp16 would overflow) and computed with in fp32 on CPU,
    in the checkpoint's own 16-bit type on CUDA. An explicit dtype is used for both.

    With a `store`, a GGUF file is converted once, to safetensors in the baseline's type: the same bits, read in a tenth of
    the time. The first conversion goes tensor by tensor, except for experts, where the whole model is in memory for it, also
    when the weights are offloaded afterwards.

    Raises:
        UserError: for a model that is missing, damaged, out of reach, or cannot be offloaded.
    """
    source = source_of(config)
    if execution.weights == "offloaded" and source.location.kind == "gguf" and store is None:
        raise UserError(
            "execution.weights: 'offloaded', but a GGUF file is dequantized as a whole and there is no store to keep it in"
        )
    found = _checked(source, store)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if execution.device == "auto" else execution.device
    )
    tokenizer, notes = _tokenizer(config, store) if config.tokenizer else _tokenizer_of(source, found, store)
    rounding, arithmetic = _dtypes(config, found, device)
    # On the hub the weights are not here before they are read.
    digest = None if source.location.kind == "hub" else _digest(source.location, None, store)
    digests = TensorDigests()
    loaded = _read(source, execution, rounding, arithmetic, device, store, digests)
    if loaded is None:
        if config.dtype != "auto":
            raise UserError(
                f"model.dtype: 'float16' cannot hold the weights of {config.path}, some are over 65504: use bfloat16"
            )
        rounding, arithmetic = torch.bfloat16, torch.float32 if arithmetic == torch.float32 else torch.bfloat16
        loaded = _read(source, execution, rounding, arithmetic, device, store, digests)
    model, weights = loaded  # type: ignore[misc]  # bf16 has the range of fp32, so the second reading is never None
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    revision = getattr(model.config, "_commit_hash", None)
    digest = digest or _digest(source.location, revision or config.revision, store)
    digest.read = digests
    if weights.resident:
        digest.value()  # what was loaded counts, whatever the files become
    return LoadedModel(
        model, tokenizer, weights, NAMES[rounding], NAMES[arithmetic], digest, source.location, revision, notes
    )


def _dtypes(config: ModelConfig, found: Any, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype, dtype
    stored = getattr(found, "dtype", None)
    half = torch.bfloat16 if stored == torch.bfloat16 and device.type != "cpu" else torch.float16
    return half, torch.float32 if device.type == "cpu" else half


def _read(
    source: ModelSource,
    execution: ExecutionConfig,
    rounding: torch.dtype,
    arithmetic: torch.dtype,
    device: torch.device,
    store: Store | None,
    digests: TensorDigests,
) -> tuple[Any, Weights] | None:
    """Returns the model and its weights, or None when a weight is beyond the range of `rounding`."""
    from ptq.models.checkpoint import (
        read_offloaded,
        read_resident,
    )  # transformers' models, which take seconds to import

    if source.location.kind == "gguf" and store is not None:
        try:
            source = _unpacked(source, rounding, store)
        except OverflowError:
            return None
        return_freed_memory()
    if execution.weights == "offloaded":
        return read_offloaded(source, rounding, arithmetic, device, execution.prefetch, digests)
    return read_resident(source, rounding, arithmetic, device, digests)


def _unpacked(source: ModelSource, rounding: torch.dtype, store: Store) -> ModelSource:
    """Returns the folder in the store that holds the GGUF file's weights, rounded; fills it on first use.

    Raises:
        OverflowError: when a weight is beyond the range of `rounding`.
    """

    def fill(temporary: pathlib.Path) -> None:
        from ptq.models.checkpoint import read_resident
        from ptq.models.gguf_weights import convert_gguf

        if convert_gguf(source, _config(source, store), rounding, temporary):
            return
        loaded = read_resident(source, rounding, torch.float32, torch.device("cpu"))
        if loaded is None:
            raise OverflowError(NAMES[rounding])
        with quiet():
            loaded[0].to(rounding).save_pretrained(temporary)

    key = {
        "source": package_digest(*_CONVERTERS),
        "file": _digest(source.location, None, store).value(),
        "rounding": NAMES[rounding],
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
    }
    folder = store.keep("gguf-weights", key, fill, _words(source))
    return ModelSource(source.config, Location("directory", str(folder)), {"trust_remote_code": False})


def fingerprint_of(config: ModelConfig, store: Store | None = None) -> str:
    """Returns the fingerprint that `load` gives the model, without loading it. Raises `UserError` as `check`."""
    source = source_of(config)
    # Of a folder and of a file the bytes are enough: no config is read, for which transformers reads its models' code.
    if source.location.kind == "directory":
        check_directory(pathlib.Path(source.location.base))
    revision = getattr(_config(source, store), "_commit_hash", None) if source.location.kind == "hub" else None
    return _digest(source.location, revision or config.revision, store).value()


def _digest(location: Location, revision: str | None, store: Store | None = None) -> ModelDigest:
    """Returns the digest over the weights' bytes, config.json and code of the model's own; where they are makes no difference.

    With a `store`, files that have not changed since are not read again.
    """
    folder = pathlib.Path(location.base)
    if location.kind == "hub":
        cached = huggingface_hub.try_to_load_from_cache(location.base, "config.json", revision=revision)
        if not isinstance(cached, str):  # not in the cache, which can be switched off: the commit names the bytes
            return ModelDigest.named(hashlib.sha256(f"{location.base}@{revision}".encode()).hexdigest())
        folder = pathlib.Path(cached).parent
    if location.gguf:
        return ModelDigest([folder / location.gguf], (), store)
    config = folder / "config.json"
    code = sorted(folder.glob("*.py")) if b'"auto_map"' in config.read_bytes() else []
    return ModelDigest([config, *code], shards_of(folder), store)
