"""A budget for weights: average bits, bytes of the whole model, or its footprint with a KV cache."""

import re
from dataclasses import dataclass

from ptq.allocation.sensitivity import Sensitivity
from ptq.config.schema import Recipe
from ptq.errors import UserError
from ptq.footprint.footprint import footprint
from ptq.network.network import Network

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(B|kB|MB|GB|KiB|MiB|GiB)?")
_UNITS = {None: 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Budget:
    """What an allocation may take; one of the first three is given.

    Attributes:
        bits: average bits of a quantized weight, scales and zero points included.
        bytes: of all weights of the model, what stays in 16 bits included.
        footprint: bytes of all weights and of a KV cache.
        context: tokens in that cache; None for 2048 or the model's positions, the lesser.
    """

    bits: float | None = None
    bytes: int | None = None
    footprint: int | None = None
    context: int | None = None

    @property
    def words(self) -> str:
        """The option that gave it."""
        if self.bits is not None:
            return f"--bits: {self.bits:g}"
        return f"--bytes: {self.bytes}" if self.bytes is not None else f"--footprint: {self.footprint}"

    @property
    def name(self) -> str:
        """What a recipe's name says of it."""
        if self.bits is not None:
            return f"{self.bits:g}bits"
        return f"{self.bytes}bytes" if self.bytes is not None else f"{self.footprint}footprint"

    def weight_bytes(self, found: Sensitivity, recipe: Recipe, network: Network, baseline_bytes: int) -> int:
        """Returns how many bytes the quantized weights may take. Raises `UserError` as `room` does."""
        return self.room(sum(out * columns for out, columns in found.shapes.values()), recipe, network, baseline_bytes)

    def room(self, count: int, recipe: Recipe, network: Network, baseline_bytes: int) -> int:
        """Returns how many bytes `count` quantized weights may take.

        Args:
            count: how many there are.
            recipe: whose cache a footprint has.
            network: the model.
            baseline_bytes: of each of the other weights.

        Raises:
            UserError: for a footprint of a model whose cache is not known.
        """
        if self.bits is not None:
            return int(self.bits * count / 8 + 1e-6)
        rest = (network.parameters - count) * baseline_bytes
        if self.bytes is not None:
            return self.bytes - rest
        caches = footprint(recipe, self.context).caches
        if not caches:
            raise UserError("--footprint: what this model's KV cache takes is not known: use --bytes")
        return (self.footprint or 0) - rest - caches[-1].context


def bytes_from(option: str, text: str) -> int:
    """Returns the bytes that a text such as ``85MB`` or ``1.5GiB`` means. Raises `UserError` for any other."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UserError(
            f"{option}: {text!r} is no size: use a number of bytes, or one with kB, MB, GB, KiB, MiB or GiB"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def budget_from(bits: float | None, size: str | None, whole: str | None, context: int | None) -> Budget:
    """Returns the budget that a command line gives. Raises `UserError` unless it gives exactly one that is a number above 0."""
    given = [name for name, value in (("--bits", bits), ("--bytes", size), ("--footprint", whole)) if value is not None]
    if len(given) != 1:
        both = f"{given[0]} beside {given[1]}" if given else "none given"
        raise UserError(f"--bits: a budget is one of --bits, --bytes and --footprint ({both}): use --bits 4.5")
    if bits is not None and not 0 < bits < 64:
        raise UserError(f"--bits: {bits} is no average of bits: use a number such as 4.5")
    if context is not None and whole is None:
        raise UserError(f"--context: {context} changes nothing without --footprint: leave it out")
    return Budget(
        bits,
        None if size is None else bytes_from("--bytes", size),
        None if whole is None else bytes_from("--footprint", whole),
        context,
    )
