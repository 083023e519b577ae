"""What code computes a result, as a digest of its source: results of other code are other results."""

import ast
import functools
import hashlib
import importlib.resources
import importlib.util
import pathlib
import sys
import sysconfig
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from types import ModuleType

from ptq.errors import UserError

PACKAGES = ("ptq", "quantize", "group_methods")
"""The packages of this framework whose code computes results."""


@functools.cache
def package_digest(*packages: str) -> str:
    """Returns the SHA-256 over the names and bytes of every ``.py`` file of `packages`, those of the framework by default.

    Taken once a process: what counts is the code that was imported, not what an editor makes of the file later.
    """
    digest = hashlib.sha256()
    for package in packages or PACKAGES:
        for name, content in sorted(_sources(importlib.resources.files(package), package.replace(".", "/"))):
            _add(digest, name, content)
    return digest.hexdigest()


@functools.cache
def module_digest(module: ModuleType) -> str:
    """Returns the SHA-256 over the source of an outside method: its module and what of its own that one imports.

    Its own is what lies neither in the standard library nor among installed packages nor in this framework: of a package
    all ``.py`` files count, of a single file the files that it imports, and theirs. A module of this framework has its `package_digest`.

    Raises:
        UserError: when the source of the module cannot be read.
    """
    if module.__name__.partition(".")[0] in PACKAGES:
        return package_digest()
    pending: list[str] = [module.__name__]
    seen: set[str] = set()
    parts: dict[str, bytes] = {}
    while pending:
        name = pending.pop().partition(".")[0]
        if name in seen:
            continue
        seen.add(name)
        own = module if name == module.__name__ else None
        for path, content in _own_sources(name, own, outside=name == module.__name__.partition(".")[0]):
            parts[path] = content
            pending += sorted(_imported(content))
    if not parts:
        raise UserError(f"{module.__name__}: its source cannot be read: write the method into a .py file and import it")
    digest = hashlib.sha256()
    for path, content in sorted(parts.items()):
        _add(digest, path, content)
    return digest.hexdigest()


def _own_sources(name: str, module: ModuleType | None, outside: bool) -> Iterator[tuple[str, bytes]]:
    """Yields the sources of the top-level package or module `name`; those of a library only where it is the method itself."""
    if name in PACKAGES or (name in sys.stdlib_module_names and name != "__main__"):
        return
    origin, folders = _place(name, module)
    if folders:
        if outside or not _installed(folders[0]):
            for folder in folders:
                yield from _sources(pathlib.Path(folder), name)
    elif origin is not None and origin.suffix == ".py" and (outside or not _installed(str(origin))):
        try:
            yield origin.name, origin.read_bytes()
        except OSError:
            return


def _place(name: str, module: ModuleType | None) -> tuple[pathlib.Path | None, list[str]]:
    """Returns the file of a module, or the folders of a package."""
    found = module if module is not None else sys.modules.get(name)
    spec = getattr(found, "__spec__", None)
    if spec is None and found is None:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            return None, []
    if spec is not None and spec.submodule_search_locations:
        return None, list(spec.submodule_search_locations)
    file = getattr(found, "__file__", None) or (spec.origin if spec is not None else None)
    return (pathlib.Path(file) if file else None), []


def _installed(place: str) -> bool:
    paths = sysconfig.get_paths()
    return any(pathlib.Path(place).is_relative_to(paths[key]) for key in ("purelib", "platlib", "stdlib"))


def _imported(content: bytes) -> set[str]:
    """Returns the top-level names that a source imports, wherever in it."""
    try:
        nodes = list(ast.walk(ast.parse(content)))
    except (SyntaxError, ValueError, RecursionError):
        return set()
    plain = {alias.name.partition(".")[0] for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return plain | {
        n.module.partition(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level
    }


def _sources(folder: Traversable, prefix: str) -> Iterator[tuple[str, bytes]]:
    for item in folder.iterdir():
        name = f"{prefix}/{item.name}"
        if item.is_dir():
            if not item.name.startswith((".", "__pycache__")):
                yield from _sources(item, name)
        elif item.name.endswith(".py"):
            yield name, item.read_bytes()


def _add(digest: "hashlib._Hash", name: str, content: bytes) -> None:
    digest.update(f"{name}:{len(content)}:".encode(errors="surrogateescape"))
    digest.update(content)
