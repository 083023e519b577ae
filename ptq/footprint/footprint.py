"""What a model takes: parameters by part, bytes by kind and dtype before and after a scheme, FLOPs, KV cache.

From the config alone: the model stands on the meta device, and no weight is read.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ptq.config.cache import CacheConfig
from ptq.config.schema import Recipe, SchemeConfig
from ptq.config.scheme import attention_specs, attention_tensors, check_attention, check_scheme, linear_specs
from ptq.errors import UserError
from ptq.files.store import store_of
from ptq.footprint.passes import CacheLayer, Pass, attentions_by_structure, head_name, trace_shapes
from ptq.network.attention import cache_format
from ptq.network.network import Network, is_linear
from ptq.network.outside import outside_weights
from ptq.network.skeleton import NotTraceable, skeleton
from quantize.codecs.base import Layout
from quantize.codecs.registry import codec_of
from quantize.grid.storage import weight_storage
from quantize.spec.quant_spec import QuantSpec

PARTS = ("attention", "mlp", "norms", "embedding", "head", "other")
LINEAR, SCALE, BIAS, NORM, EMBEDDING, HEAD, OTHER, BUFFER = KINDS = (
    "Linear weight", "scale, zero point", "bias", "norm", "embedding", "head", "other weight", "buffer",
)  # fmt: skip
CONTEXT = 2048
"""Tokens of the prefill unless asked otherwise, or as many as the model has positions for."""
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Held:
    """One tensor of a model, tied ones once.

    Attributes:
        name: full name.
        part: of `PARTS`: ``mlp`` is what the blocks hold beside attention and norms, ``other`` what lies outside.
        kind: of `KINDS`.
        values: how many.
        dtype: its type where that does not follow the checkpoint's (buffers), else None.
        linear: (out, in) for a weight that a scheme can quantize, the embedding's and the head's among them, else None; the module is `name` without its last part.
    """

    name: str
    part: str
    kind: str
    values: int
    dtype: torch.dtype | None = None
    linear: tuple[int, int] | None = None


@dataclass(frozen=True)
class HeldBytes:
    """A run of bytes in memory: `kind` of `KINDS`; `dtype` a name such as ``fp16`` or ``int4``."""

    kind: str
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Column:
    """The whole model in one form."""

    title: str
    stored: tuple[HeldBytes, ...]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(s.bytes for s in self.stored)

    def by(self, field: str) -> dict[str, int]:
        """Returns bytes by ``kind`` or ``dtype``."""
        sums: Counter[str] = Counter()
        for s in self.stored:
            sums[getattr(s, field)] += s.bytes
        return dict(sums)


@dataclass(frozen=True)
class Peak:
    """The most bytes of tensors at once while loading, with what that assumes."""

    title: str
    bytes: int
    assumes: str


@dataclass(frozen=True)
class Cache:
    """Bytes of the KV cache: of one token in every layer, and of the whole context (less than the product with windows)."""

    title: str
    token: int
    context: int


@dataclass(frozen=True)
class Footprint:
    """What a recipe's model takes. `passed` is None where nothing could be counted, for the reason `untraced`."""

    name: str
    path: str
    blocks: int
    parameters: dict[str, int]
    columns: tuple[Column, ...]
    peaks: tuple[Peak, ...]
    caches: tuple[Cache, ...]
    passed: Pass | None
    untraced: str = ""


def footprint(recipe: Recipe, context: int | None = None) -> Footprint:
    """Returns what the recipe's model takes, before and after its scheme.

    Args:
        recipe: of it, model and scheme are used; the model's folder needs a config.json only.
        context: tokens of the prefill and in the KV cache; None for `CONTEXT` or the model's positions, the lesser.

    Raises:
        UserError: for a model without a config, a context that it has no positions for, or a scheme that does not fit.
    """
    network = skeleton(recipe.model, store_of(recipe), weights=False)
    check_scheme(recipe.scheme, network.shapes, network.head_dim)
    most = network.max_positions
    if context is None:
        context = min(CONTEXT, most or CONTEXT)
    if context < 1 or (most is not None and context > most):
        raise UserError(f"--context: {context}: expected 1 to {most or 'any'} tokens, the positions that the model has")
    passed, untraced = None, ""
    try:
        passed = trace_shapes(network, context)
    except NotTraceable as error:
        untraced = str(error)
    if passed is not None and attention_tensors(recipe.scheme):
        check_attention(recipe.scheme, passed.interfaced)
        _check_cache(recipe.scheme, passed.cache, network.head_dim)
    held = inventory(network, passed.attentions if passed else attentions_by_structure(network))
    dtype = torch.float16 if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)
    return Footprint(
        name=recipe.name,
        path=recipe.model.path,
        blocks=len(network.blocks),
        parameters=_by_part(held),
        columns=_columns(held, recipe.scheme, dtype),
        peaks=_peaks(held, recipe.scheme, dtype),
        caches=() if passed is None else _caches(passed.cache, recipe.scheme, dtype),
        passed=passed,
        untraced=untraced,
    )


def inventory(network: Network, attentions: Collection[str]) -> list[Held]:
    """Returns every parameter and buffer of a network with its part and kind; `attentions` by full name."""
    model, head = network.model, head_name(network)
    inside = tuple(f"{name}." for name in attentions)
    blocks = tuple(f"{block.name}." for block in network.blocks)
    shapes = network.shapes | {w.name: w.shape for w in outside_weights(SchemeConfig(), network)}
    embedding = model.get_input_embeddings()
    # A tied tensor counts where it is met first: as the embedding.
    modules = sorted(model.named_modules(), key=lambda item: item[1] is not embedding)
    held: list[Held] = []
    met: set[int] = set()

    def place(name: str) -> str:
        return "attention" if f"{name}.".startswith(inside) else "mlp" if name.startswith(blocks) else "other"

    for owner, module in modules:
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in met:
                continue
            met.add(id(parameter))
            name = f"{owner}.{own}" if owner else own
            part, kind = _sort(module, own, owner == head, module is embedding)
            linear = shapes.get(owner) if kind in {LINEAR, EMBEDDING, HEAD} and own == "weight" else None
            held.append(Held(name, part or place(owner), kind, parameter.numel(), linear=linear))
    for name, buffer in model.named_buffers():
        held.append(Held(name, place(name), BUFFER, buffer.numel(), dtype=buffer.dtype))
    return held


def _sort(module: nn.Module, own: str, is_head: bool, is_embedding: bool) -> tuple[str, str]:
    """Returns part ("" where its place decides) and kind of the parameter `own` of `module`."""
    if is_embedding or isinstance(module, nn.Embedding):
        return "embedding", EMBEDDING
    if is_head:
        return "head", HEAD if own == "weight" else BIAS
    if is_linear(module):
        return "", LINEAR if own == "weight" else BIAS
    parameters = list(module.parameters())
    if not list(module.children()) and all(p.dim() <= 1 for p in parameters):
        return "norms", NORM
    return "", OTHER


def bytes_of(
    held: Sequence[Held], spec_of: Callable[[str], QuantSpec | None], dtype: torch.dtype
) -> tuple[HeldBytes, ...]:
    """Returns what the tensors take in memory.

    Args:
        held: the tensors.
        spec_of: the weight's spec of the Linear of that full name, or None to leave it as it is.
        dtype: of everything that is not quantized and has no type of its own.

    Raises:
        UserError: for a spec whose stored size does not follow from shapes.
    """
    # Experts are alike, and a mixture may have ten thousands: what is stored of one is what is stored of all.
    known: dict[tuple[object, ...], tuple[HeldBytes, ...]] = {}
    found: list[HeldBytes] = []
    for h in held:
        spec = None if h.linear is None else spec_of(h.name.rpartition(".")[0])
        key = (h.kind, h.values, h.dtype, h.linear, spec)
        if key not in known:
            known[key] = tuple(_stored(h, spec_of, dtype))
        found += known[key]
    return tuple(found)


def _stored(held: Held, spec_of: Callable[[str], QuantSpec | None], dtype: torch.dtype) -> Iterator[HeldBytes]:
    spec = None if held.linear is None else spec_of(held.name.rpartition(".")[0])
    if held.linear is None or spec is None:
        type_ = held.dtype or dtype
        yield HeldBytes(held.kind, _NAMES.get(type_, str(type_).removeprefix("torch.")), held.values * type_.itemsize)
        return
    try:
        if not spec.affine:
            yield from _encoded(held, codec_of(spec).layout(held.linear, spec), spec)
            return
        storage = weight_storage(*held.linear, spec)
    except ValueError as error:
        raise UserError(f"scheme.weight.{error}") from None
    yield HeldBytes(held.kind, f"{spec.format}{spec.bits}", -(-storage.codes * storage.code_bits // 8))
    yield HeldBytes(SCALE, f"fp{storage.scale_bits}", storage.scales * storage.scale_bits // 8)
    if storage.zero_points:
        yield HeldBytes(SCALE, f"{spec.format}{spec.bits}", -(-storage.zero_points * storage.code_bits // 8))


def _encoded(held: Held, layout: Layout, spec: QuantSpec) -> Iterator[HeldBytes]:
    """Gives what a format other than integers stores: its codes under its own name, each other tensor as a scale."""
    for name, (shape, dtype) in layout.items():
        type_ = _NAMES.get(dtype, str(dtype).removeprefix("torch."))
        kind, label = (held.kind, spec.format) if name == "codes" else (SCALE, type_)
        yield HeldBytes(kind, label, math.prod(shape) * dtype.itemsize)


def _columns(held: Sequence[Held], scheme: SchemeConfig, dtype: torch.dtype) -> tuple[Column, ...]:
    """Returns the model in fp32 and fp16, its Linears in int8 and int4 (one scale a row, the rest in fp16), and by the scheme."""
    inside = {h.name.rpartition(".")[0] for h in held if h.kind == LINEAR}
    plain: dict[str, tuple[Callable[[str], QuantSpec | None], torch.dtype]] = {
        "fp32": (lambda name: None, torch.float32),
        "fp16": (lambda name: None, torch.float16),
        "int8": (lambda name: QuantSpec(bits=8) if name in inside else None, torch.float16),
        "int4": (lambda name: QuantSpec(bits=4) if name in inside else None, torch.float16),
        "scheme": (_of_scheme(held, scheme), dtype),
    }
    return tuple(Column(title, bytes_of(held, *how)) for title, how in plain.items())


def _of_scheme(held: Sequence[Held], scheme: SchemeConfig) -> Callable[[str], QuantSpec | None]:
    """Returns the function from a module's name to the format of its weight: a Linear's, the embedding's, the head's."""
    kinds = {h.name.rpartition(".")[0]: h.kind for h in held if h.linear is not None}
    outside = {EMBEDDING: scheme.embedding, HEAD: scheme.head}
    return lambda name: outside[kinds[name]] if kinds.get(name) in outside else linear_specs(scheme, name).weight


def _peaks(held: Sequence[Held], scheme: SchemeConfig, dtype: torch.dtype) -> tuple[Peak, ...]:
    spec_of = _of_scheme(held, scheme)
    name = _NAMES[dtype]
    whole = sum(s.bytes for s in bytes_of(held, lambda _: None, dtype))
    after = sum(s.bytes for s in bytes_of(held, spec_of, dtype))
    raw = {h: h.values * dtype.itemsize for h in held}
    chosen = [h for h in held if h.linear is not None and spec_of(h.name.rpartition(".")[0]) is not None]
    loaded = Peak(
        f"{name}, one tensor after another",
        whole + max(raw.values()),
        "one tensor at a time is read beside the model and then put in its place",
    )
    if not chosen:
        return (loaded,)
    copies = {h: 4 * h.values for h in chosen}
    codes = {h: sum(s.bytes for s in _stored(h, spec_of, dtype)) for h in chosen}
    return (
        loaded,
        Peak(
            f"{name} whole, then the scheme",
            max(loaded.bytes, whole + max(copies[h] + codes[h] for h in chosen)),
            "loaded like that, then each Linear is replaced by itself, through one fp32 copy, its old weight freed at once",
        ),
        Peak(
            "scheme, one tensor after another",
            after + max(raw[h] + copies.get(h, 0) for h in held),
            "each tensor is quantized as it is read, through one fp32 copy: the whole model never stands in memory",
        ),
    )


def _check_cache(scheme: SchemeConfig, layers: Sequence[CacheLayer], head_dim: int) -> None:
    """Raises `UserError` where keys or values are quantized and the cache holds something else, such as a latent of both."""
    for layer in layers:
        specs = attention_specs(scheme, layer.attention)
        for tensor, (_, _, channels) in (("key", layer.keys), ("value", layer.values)):
            if tensor in specs and channels != head_dim:
                raise UserError(
                    f"scheme.{tensor}: {layer.attention} caches {channels} channels, not a head's {head_dim}: "
                    "its size in this format is not known: use null"
                )


def _caches(layers: Sequence[CacheLayer], scheme: SchemeConfig, dtype: torch.dtype) -> tuple[Cache, ...]:
    caches = [_cache(_NAMES[dtype], layers, lambda name: {}, dtype)]
    if {"key", "value"} & attention_tensors(scheme):
        caches.append(_cache("scheme", layers, lambda name: attention_specs(scheme, name), dtype, scheme.cache))
    return tuple(caches)


def _cache(
    title: str,
    layers: Sequence[CacheLayer],
    specs_of: Callable[[str], dict[str, QuantSpec]],
    dtype: torch.dtype,
    held: CacheConfig | None = None,
) -> Cache:
    token = context = 0
    for layer in layers:
        specs = specs_of(layer.attention)
        for tensor, (heads, tokens, channels) in (("key", layer.keys), ("value", layer.values)):
            if held is not None and tensor in specs:
                form = cache_format(held, specs[tensor], channels)
                token += math.ceil(heads * form.token_bytes(channels))
                context += heads * form.nbytes(tokens, channels, dtype.itemsize)
                continue
            bits = cache_bits(heads, channels, specs.get(tensor), dtype)
            token += -(-bits // 8)
            context += -(-bits * tokens // 8)
    return Cache(title, token, context)


def cache_bits(heads: int, channels: int, spec: QuantSpec | None, dtype: torch.dtype) -> int:
    """Returns the bits of one token's keys (or values) in one layer.

    A dynamic range is kept beside the codes: a float32 scale, and a zero point of a code's bits unless symmetric, for each
    head (granularity token), each group in it, or the token (granularity tensor: a token is a call of its own while
    decoding). A static range is stored once, and costs a token nothing.
    """
    values = heads * channels
    if spec is None:
        return 8 * dtype.itemsize * values
    scales = 0
    if spec.dynamic:
        scales = {"token": heads, "tensor": 1}.get(spec.granularity, values // (spec.group_size or values))
    return spec.bits * (values + (0 if spec.symmetric else scales)) + 32 * scales


def _by_part(held: Sequence[Held]) -> dict[str, int]:
    """Returns parameters by part; buffers are none."""
    sums = dict.fromkeys(PARTS, 0)
    for h in held:
        if h.kind != BUFFER:
            sums[h.part] += h.values
    return sums
