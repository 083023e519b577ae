"""A quantized cache in compressed-tensors' words: ``kv_cache_scheme``, and a scale of keys and of values in each attention."""

import fnmatch
from typing import Any

from ptq.config.schema import SchemeConfig
from ptq.config.scheme import attention_tensors
from ptq.errors import UserError
from ptq.export.packing.compressed.compressed_floats import arguments
from ptq.network.attention import CHILD
from ptq.network.network import Network
from quantize.spec.quant_spec import QuantSpec

HELD = {"key", "value"}
FORMAT = "fp8_e4m3"
"""The format of caches that vLLM reads from a checkpoint."""


def cache_spec(scheme: SchemeConfig, network: Network, name: str, nearest: str) -> QuantSpec | None:
    """Returns the format of keys and values, None where they are not quantized.

    Args:
        scheme: the whole scheme.
        network: the model, for its modules' names.
        name: of the exporter.
        nearest: a scheme that it holds, for the advice.

    Raises:
        UserError: for queries or probabilities, another format than FP8 with one static scale for keys and one for values, or
            one that not all attentions have.
    """
    tensors = attention_tensors(scheme)
    if not tensors:
        return None
    if others := sorted(tensors - HELD):
        raise UserError(f"scheme.{others[0]}: quantized, but {name} has no field for it: use {nearest}, or export=null")
    fits = f"{{format: {FORMAT}, granularity: tensor, dynamic: false}}"
    for tensor in sorted(HELD):
        spec: QuantSpec | None = getattr(scheme, tensor)
        if spec is None or spec.format != FORMAT or spec.dynamic or spec.granularity != "tensor":
            raise UserError(
                f"scheme.{tensor}: {name} holds caches of keys and values that have {fits}: use that for scheme.key and "
                f"scheme.value, or {nearest}, or export=null"
            )
    if any(HELD & override.tensors.keys() for override in scheme.overrides):
        raise UserError(
            f"scheme.overrides: {name} has one format for all keys and values: leave them out of the overrides"
        )
    parents = sorted({linear.rpartition(".")[0] for linear in network.linears})
    for pattern in scheme.exclude:
        if (left := next((p for p in parents if fnmatch.fnmatchcase(p, pattern)), None)) is not None:
            raise UserError(
                f"scheme.exclude: {pattern!r} leaves {left} alone, and {name} has one format for all keys and values: "
                f"exclude its Linears, such as {left}.*"
            )
    return scheme.key


def cache_arguments(spec: QuantSpec | None) -> dict[str, Any] | None:
    """Returns what ``QuantizationArgs`` of ``kv_cache_scheme`` is given."""
    return None if spec is None else arguments(spec)


def scale_name(buffer: str) -> str | None:
    """Returns the name under which runtimes read the scale of keys or of values that `buffer` is; None for any other tensor."""
    attention, found, rest = buffer.partition(f".{CHILD}.quantizers.")
    short = {"key.scale": "k_scale", "value.scale": "v_scale"}.get(rest)
    return f"{attention}.{short}" if found and short else None
