"""Post-training quantization of decoder-only language models.

    result = ptq.run("smollm2-135m_w8a8", ["evaluation.windows=4"])     # one experiment, against its baseline
    ptq.quantize(model, "w4a16_g64", {"gptq": {}}, ids=ids)             # a model in memory, in place
    python -m ptq <command>                                             # the command line

Folders from the edge down: cli, allocation, bench, sweep, run, integrations, footprint, export, inspect, report, steps, evaluation, calibration,
network, models, data, ranks, files, config. `quantize` and `group_methods` beside this package know tensors only.
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The Python doors, imported when they are first used: they need torch."""
    if name == "run":
        return importlib.import_module("ptq.run")
    if name == "quantize":
        return importlib.import_module("ptq.cli.door").quantize
    raise AttributeError(f"module 'ptq' has no attribute {name!r}")
