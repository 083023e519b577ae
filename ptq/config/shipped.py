"""Where the shipped configs are, and the shipped schemes by name."""

import pathlib

import yaml

import ptq
from ptq.config.building import build
from ptq.config.checking import check_specs
from ptq.config.schema import SchemeConfig
from ptq.errors import UserError, nearest

DEMO = "demo"


def config_folder() -> pathlib.Path:
    """Returns the folder of the shipped configs: inside the package when installed from a wheel, else the checkout's."""
    package = pathlib.Path(ptq.__file__).resolve().parent
    for folder in (package / "_configs", package.parent / "configs"):
        if (folder / f"{DEMO}.yaml").is_file():
            return folder
    raise UserError(f"configs: none found beside {package}: install the package again")


def scheme_names() -> list[str]:
    """Returns the names of the shipped schemes."""
    return sorted(path.stem for path in (config_folder() / "scheme").glob("*.yaml"))


def scheme_named(name: str) -> SchemeConfig:
    """Returns the shipped scheme `name`, checked; case, ``.`` and ``-`` make no difference: ``llm.int8`` is ``llm_int8``.

    Raises:
        UserError: for an unknown name, with the nearest one.
    """
    key = name.strip().lower().replace(".", "_").replace("-", "_")
    names = scheme_names()
    if key not in names:
        raise UserError(f"scheme: {name!r} is no shipped scheme{nearest(key, names)}")
    text = (config_folder() / "scheme" / f"{key}.yaml").read_text(encoding="utf-8")
    scheme: SchemeConfig = build(SchemeConfig, yaml.safe_load(text), "scheme")
    check_specs(scheme)
    return scheme
