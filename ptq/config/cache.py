"""How a scheme's cache holds keys and values: the options, and what of them makes no sense together."""

from collections.abc import Sequence
from dataclasses import dataclass

from ptq.config.options import check_fields, option
from ptq.errors import UserError
from quantize.spec.quant_spec import QuantSpec

CACHED = ("key", "value")
"""The tensors that a cache holds."""


@dataclass(frozen=True)
class CacheConfig:
    """How a cache holds the keys and values that the scheme quantizes, in evaluation and in ``generate`` (docs/kv-cache.md).

    Attributes:
        window: the most recent tokens, the present one among them, that stay in 16 bits.
        first: the first tokens, which stay in 16 bits.
        tokens: consecutive tokens whose values in one channel share a scale, where key or value has granularity ``channel``
            and dynamic ranges; they are rounded together when the last of them has left the window.
        before_rope: hold keys as they are before rotary embeddings.
    """

    window: int = option(0, least=0)
    first: int = option(0, least=0)
    tokens: int | None = option(None, least=2)
    before_rope: bool = False

    def rounded(self, length: int) -> bool:
        """Returns whether any of `length` tokens is rounded."""
        return length - self.first - self.window >= (self.tokens or 1)


Given = Sequence[tuple[str, str, QuantSpec]]
"""(path in the recipe, tensor, spec) of every spec of a scheme."""


def check_cache(cache: CacheConfig | None, specs: Given) -> None:
    """Raises `UserError` for a cache that has nothing to hold, or specs that it cannot hold; needs no model."""
    held = [(path, spec) for path, tensor, spec in specs if tensor in CACHED]
    by_channel = [path for path, spec in held if spec.dynamic and spec.granularity == "channel"]
    if by_channel and (cache is None or cache.tokens is None):
        raise UserError(
            f"{by_channel[0]}.granularity: 'channel' with dynamic true needs tokens to share a scale: add "
            "scheme.cache.tokens=32, or use granularity token"
        )
    if cache is None:
        return
    # Not only through a recipe: a scheme may come from Python.
    check_fields(cache, "scheme.cache")
    if not held:
        raise UserError("scheme.cache: set, but key and value are null: give them bits, or use scheme.cache=null")
    if cache.tokens is not None and not by_channel:
        raise UserError(
            f"scheme.cache.tokens: {cache.tokens}, but neither key nor value has granularity channel with dynamic true: use null"
        )
    if cache.before_rope and not any(tensor == "key" for _, tensor, _ in specs):
        raise UserError("scheme.cache.before_rope: true, but key is null: use false")
    for path, spec in held:
        _check_held(path, spec)


def check_rounded(cache: CacheConfig | None, length: int, field: str = "evaluation.length") -> None:
    """Raises `UserError` when windows of `length` tokens are too short for the cache to round anything."""
    if cache is not None and not cache.rounded(length):
        kept = f"{cache.window} recent and {cache.first} first tokens in 16 bits"
        raise UserError(
            f"scheme.cache.window: {kept}: with {field}={length} none would be rounded: use window="
            f"{max(0, length // 2 - cache.first - (cache.tokens or 1))} or less, or a longer {field}"
        )


def _check_held(path: str, spec: QuantSpec) -> None:
    for field, wanted, why in (
        ("format", "int", "a cache holds integer codes"),
        ("dynamic", True, "a cache fits its ranges to what it holds"),
        ("symmetric", False, "a cache stores the least value of every range"),
        ("full_range", False, "a cache stores the least value of every range"),
    ):
        if getattr(spec, field) != wanted:
            shown = str(wanted).lower() if isinstance(wanted, bool) else wanted
            raise UserError(
                f"{path}.{field}: {getattr(spec, field)!r}, but {why}: use {shown}, or scheme.cache=null for a simulation without a cache"
            )
    if spec.range not in {"minmax", "mse"}:
        raise UserError(f"{path}.range: {spec.range!r}, but a cache knows minmax and mse: use one of them")
