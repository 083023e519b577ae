"""From a recipe's export section to an `Exporter`: one module each, by name."""

import dataclasses
import importlib
import pkgutil
from typing import Any

import ptq.export
from ptq.config.building import build
from ptq.config.schema import ExportConfig
from ptq.errors import UserError, nearest
from ptq.export.base import Exporter


def shipped() -> list[str]:
    """Returns the names of the formats that come with this package: the modules ``ptq/export/to_<name>.py``."""
    names = [m.name for m in pkgutil.iter_modules(ptq.export.__path__) if m.name.startswith("to_")]
    return sorted(name.removeprefix("to_").replace("_", "-") for name in names)


def build_exporter(config: ExportConfig) -> Exporter:
    """Builds the exporter of a recipe.

    Raises:
        UserError: for an unknown format or wrong options.
    """
    if config.format not in shipped():
        raise UserError(f"export.format: {config.format!r} is no format{nearest(config.format, shipped())}")
    module = module_of(config.format)
    exporter: Exporter = module.Exporter(build(module.Options, config.options, "export.options"))
    return exporter


def with_default_options(config: ExportConfig) -> ExportConfig:
    """Returns `config` with all options of its format, the defaults written out. Raises `UserError` as `build_exporter`."""
    build_exporter(config)
    options = build(module_of(config.format).Options, config.options, "export.options")
    return dataclasses.replace(config, options=dataclasses.asdict(options))


def module_of(name: str) -> Any:
    """Returns the module of the format `name`, which is one of `shipped`."""
    return importlib.import_module(f"ptq.export.to_{name.replace('-', '_')}")
