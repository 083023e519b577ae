"""The Python door: ``ptq.run`` runs a recipe as the command line does, ``ptq.quantize`` a model that is in memory."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ptq.cli import catalog
from ptq.config.schema import Recipe, SchemeConfig
from ptq.errors import UserError

if TYPE_CHECKING:
    import torch

    from ptq.run.in_memory import Quantized
    from ptq.run.result import Result


def run(
    recipe: str | pathlib.Path | Recipe, overrides: Sequence[str] | str = (), force: bool = False, trust: bool = False
) -> "Result":
    """Runs one experiment and returns its `ptq.run.result.Result`.

    Args:
        recipe: a shipped recipe's name, a path to a YAML file, or a `Recipe`.
        overrides: Hydra overrides, such as ``["scheme.weight.bits=3"]`` or ``"scheme.weight.bits=3 data=docs"``.
        force: run it again, although it is finished.
        trust: a recipe file may name code to run and environment variables to read, as `overrides` may.

    Raises:
        UserError: for anything that can be mended, in one line.
    """
    from ptq.run.experiment import run_recipe

    words = overrides.split() if isinstance(overrides, str) else list(overrides)
    if isinstance(recipe, Recipe):
        if words:
            raise UserError(
                f"overrides: {words[0]!r} beside a Recipe: change it by dataclasses.replace, or give a name"
            )
        return run_recipe(recipe, force)

    from ptq.cli.compose.hydra_edge import compose_jobs

    jobs = compose_jobs(catalog.locate(str(recipe)), words, trust=trust)
    jobs[0].check_paths()
    return run_recipe(jobs[0].recipe, force)


def quantize(
    model: Any,
    scheme: str | SchemeConfig = "w8a8",
    steps: Mapping[str, Mapping[str, Any]] | None = None,
    ids: "torch.Tensor | None" = None,
    batch_size: int = 4,
) -> "Quantized":
    """Quantizes a causal language model that is in memory, in place; see `ptq.run.in_memory.quantize`."""
    from ptq.run.in_memory import quantize as work

    return work(model, scheme, {"rtn": {}} if steps is None else steps, ids, batch_size)
