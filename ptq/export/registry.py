"""From a recipe's export section to an `Exporter`: one module each, by name."""

import importlib
import pkgutil

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
    module = importlib.import_module(f"ptq.export.to_{config.format.replace('-', '_')}")
    exporter: Exporter = module.Exporter(build(module.Options, config.options, "export.options"))
    return exporter
