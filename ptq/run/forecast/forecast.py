"""The dry run's table: what each phase of a run will take on this machine."""

import pathlib
from collections.abc import Mapping

import torch
from rich.table import Table

from ptq.config.schema import Recipe
from ptq.models.locations import locate
from ptq.models.weights import shards_of
from ptq.network.network import Network
from ptq.network.skeleton import NotTraceable
from ptq.ranks.torchrun import ranks_asked_for
from ptq.run.forecast.machine_speed import MachineSpeed, measured
from ptq.run.forecast.memory_estimate import PROCESS, arithmetic_bytes, estimate
from ptq.run.forecast.work_estimate import work_of
from ptq.run.session import device_of
from ptq.steps._step import Step


def has_weights(recipe: Recipe) -> bool:
    """Returns whether the recipe's model has its weights on this machine, rather than a config.json alone."""
    place = locate(recipe.model)
    if place.kind != "directory":
        return place.kind != "hub"
    folder = pathlib.Path(place.base)
    return any(folder.glob("*.safetensors*")) or any(folder.glob("*.bin")) or any(folder.glob("*.pt"))


def forecast(
    recipe: Recipe, network: Network, steps: Mapping[str, Step], speed: MachineSpeed | None = None
) -> list[Table | str]:
    """Returns a table of seconds, bytes and memory by phase, and what it leaves out, in lines.

    Args:
        recipe: with its defaults.
        network: the model on the meta device.
        steps: built from the recipe.
        speed: of the machine; None measures it.
    """
    value, ranks = arithmetic_bytes(recipe), ranks_asked_for()
    try:
        work = work_of(recipe, network, steps, checkpoint_bytes(recipe, network), value)
    except NotTraceable as error:
        return [f"seconds and bytes: not known, since the model's forward pass needs values ({error})"]
    if speed is None:
        dtype = torch.float32 if value == 4 else torch.bfloat16
        speed = measured(device_of(recipe), dtype, pathlib.Path(recipe.store).expanduser())
    held = estimate(recipe, network, steps).phases
    table = Table("phase", "seconds", "GB read", "GB written", "GiB of memory", title="what a run will take")
    for column in table.columns[1:]:
        column.justify = "right"
    total = [0.0, 0.0, 0.0]
    for phase, part in work.items():
        row = [part.seconds(speed, ranks), part.read / 1e9, part.written / 1e9]
        total = [a + b for a, b in zip(total, row, strict=True)]
        memory = f"{(held[phase] + PROCESS) / 2**30:.1f}" if phase in held else ""
        table.add_row(phase, *_cells(row), memory)
    peak = (max(held.values()) + PROCESS) / 2**30
    table.add_row("in all", *_cells(total), f"{peak:.1f}")
    words = (
        f"this machine, {torch.get_num_threads()} threads: {speed.products / 1e9:.0f} GFLOP/s, {speed.columns:.0f} columns/s, "
        f"disk {speed.read / 1e6:.0f} MB/s read, {speed.written / 1e6:.0f} MB/s written; {ranks} rank{'s' if ranks > 1 else ''}"
    )
    beyond = "seconds and bytes leave out what transforms search, what learned solvers repeat, and what the store has already"
    return [table, words, beyond]


def checkpoint_bytes(recipe: Recipe, network: Network) -> int:
    """Returns the bytes of the model's files; where they are not there, those of its parameters in the config's type."""
    place = locate(recipe.model)
    base = pathlib.Path(place.base)
    if place.gguf:
        return (base / place.gguf).stat().st_size
    if place.kind == "directory" and has_weights(recipe):
        return sum(path.stat().st_size for path in shards_of(base))
    dtype = getattr(network.model.config, "dtype", None)
    return network.parameters * (dtype.itemsize if isinstance(dtype, torch.dtype) else 2)


def _cells(row: list[float]) -> list[str]:
    return [f"{row[0]:,.0f}" if row[0] >= 10 else f"{row[0]:.1f}", *(f"{value:,.2f}" for value in row[1:])]
