"""compressed-tensors: safetensors with ``quantization_config``, as transformers and vLLM load it; its package's own classes.

Expresses: weights int of 2 to 8 bits per tensor, channel or group, with or without zero point; inputs int, dynamic per
token, tensor or group, or static per tensor; fp8_e4m3, nvfp4, mxfp4 and mxfp8 (`ptq.export.packing.compressed.compressed_floats`); any
mixture by overrides; the head as a Linear, where it is not tied to the embedding, which has no format; keys and values in FP8 with one static scale each. A Linear with quantized inputs is ``int-quantized`` (codes as int8), one without ``pack-quantized`` (codes
packed into int32), floats have names of their own. Corrections of low rank lie beside it, as an adapter for PEFT.
"""

import pathlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ptq.config.schema import Override, SchemeConfig
from ptq.config.scheme import LinearSpecs
from ptq.errors import UserError
from ptq.export.adapters.peft_lora import FOLDER, check_adapter, write_adapter
from ptq.export.base import (
    BlockShards,
    Exported,
    advice,
    most_weight_bits,
    quantizes_inputs,
    refuse_outside,
    require,
    specs_by_linear,
)
from ptq.export.packing.compressed import compressed_floats as floating
from ptq.export.packing.compressed.compressed_cache import cache_arguments, cache_spec, scale_name
from ptq.export.packing.compressed.shared_scales import SHAREABLE, SharedScales, side_by_side
from ptq.export.packing.shards import lossless, write_shards
from ptq.export.quantized_tensors import LinearTensors, QuantizedTensors, rounded, walked
from ptq.files.atomic import write_folder_atomic
from ptq.network.experts.published_names import published_names
from ptq.network.network import Network
from ptq.network.outside import OutsideWeight, outside_weights
from ptq.network.skeleton import NotTraceable, flat_inputs
from quantize.kernels.matmul import is_plain
from quantize.spec.quant_spec import QuantSpec

NAME = "compressed-tensors"


@dataclass(frozen=True)
class Options:
    """No options: the scheme says everything."""


class Exporter:
    """Writes a folder: safetensors, config.json, the tokenizer's files."""

    filename = ""
    corrected_as = "an adapter for PEFT"

    def __init__(self, options: Options):
        self.options = options

    def adapt(self, scheme: SchemeConfig) -> SchemeConfig:
        """Returns `scheme` with symmetric inputs in the full range of codes, which is how the format rounds them, and NVFP4 weights
        whose scales of the tensor Linears can share, which vLLM wants of those that it multiplies as one.
        """
        held = {"input": _full, "weight": _shareable}
        overrides = tuple(
            Override(o.modules, {t: held[t](s) if t in held else s for t, s in o.tensors.items()})
            for o in scheme.overrides
        )
        return replace(scheme, input=_full(scheme.input), weight=_shareable(scheme.weight), overrides=overrides)

    def check(self, scheme: SchemeConfig, network: Network) -> tuple[str, ...]:
        """Refuses what no `QuantizationArgs` describes."""
        _package()
        nearest = _nearest(scheme)
        cache_spec(scheme, network, NAME, nearest)
        refuse_outside(scheme, NAME, ("embedding",))
        dynamic = {"format": ("int",), "granularity": ("token", "tensor", "group"), "clip": (1.0,)}
        specs = specs_by_linear(scheme, network)
        if not any(s.any for s in specs.values()):
            raise UserError(f"scheme: nothing is quantized, so {NAME} has nothing to hold: use {nearest}")
        published = published_names(network)
        inside = [name for block in network.blocks for names in block.experts.values() for name in names]
        unnamed = next((name for name in inside if specs[name].any and f"{name}.weight" not in published), None)
        if unnamed is not None:
            raise UserError(
                f"export: {NAME} holds experts one by one, and this model's checkpoints hold {unnamed} in one tensor with the "
                "others, which no runtime reads in pieces: use export=null"
            )
        linears = network.linears
        for name, spec in specs.items():
            if spec.any and not isinstance(linears[name], nn.Linear):
                kind = type(linears[name]).__name__
                raise UserError(f"export: {NAME} holds Linears, and {name} is a {kind}: use another model or format")
            if spec.weight is not None and spec.input is None and not is_plain(linears[name]):
                kind = type(linears[name]).__name__
                raise UserError(
                    f"scheme.input: null for {name}: packed weights load into torch's own Linear only, and it is a {kind}: "
                    "quantize its input too, or exclude it"
                )
            if spec.weight is not None:
                _check_weight(spec, name, nearest)
            if spec.input is not None and (spec.input.affine or spec.weight is None):
                if spec.weight is None:
                    raise UserError(f"scheme.weight: null for {name}, whose input is quantized: {NAME} needs {nearest}")
                allowed = dynamic if spec.input.dynamic else {"granularity": ("tensor",)}
                require(spec.input, "scheme.input", name, NAME, nearest, **allowed)
        if (head := _head(scheme, network)) is not None and head.spec is not None:
            _check_weight(LinearSpecs(head.spec, None), head.name, nearest, "scheme.head")
        return (*_flattened(specs, network), *_unread(specs, network), *_rounded_again(specs, network))

    def check_corrections(self, scheme: SchemeConfig, network: Network) -> tuple[str, ...]:
        """Refuses what an adapter for PEFT does not reach: see `check_adapter`."""
        check_adapter(scheme, network)
        return (f"{FOLDER}/ holds the corrections, for PEFT: a runtime that is not given it computes without them",)

    def write(self, source: QuantizedTensors, path: pathlib.Path) -> Exported:
        """Writes the folder, a shard in memory at a time."""
        self.check(source.scheme, source.network)
        return _written(source, _groups(source), path, ())

    def block_shards(self, source: QuantizedTensors) -> BlockShards:
        """Returns what writes the folder a finished block at a time."""
        self.check(source.scheme, source.network)
        groups = _groups(source)

        def finish(path: pathlib.Path, files: Sequence[pathlib.Path]) -> Exported:
            return _written(source, groups, path, files)

        return BlockShards(lambda block: _tensors(source, groups, [block.name]), finish)


def _written(
    source: QuantizedTensors, groups: "_Groups", path: pathlib.Path, files: Sequence[pathlib.Path]
) -> Exported:
    """Writes the folder; the tensors of the blocks lie in `files`, one a block, or are written too where there are none."""
    notes = []
    if not groups.exact:
        notes.append(
            "transformers rounds symmetric inputs to -2^(bits-1) .. 2^(bits-1) - 1, and the run did not: its logits "
            "differ slightly; a run with export=compressed-tensors rounds them so too"
        )
    if any(s.input_activations is None and not s.weights.symmetric for s in groups.schemes.values()):
        notes.append(
            "packed zero points: transformers loads them with quantization_config=CompressedTensorsConfig(dequantize=True)"
        )
    if any(s.format in floating.DECODED_TO_BFLOAT16 for s in groups.schemes.values()):
        notes.append("transformers decodes these floats to bfloat16: load the folder with dtype=torch.bfloat16")
    without = [block.name for block in source.network.blocks] if files else []

    def fill(folder: pathlib.Path) -> None:
        write_shards(folder, _tensors(source, groups, without=without), files)
        _write_config(folder, source, groups)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
        # A block's shard has no place for them: a run that makes the folder of shards has none.
        notes.extend(() if files else write_adapter(folder, source))
        notes.extend(groups.shared.notes())

    write_folder_atomic(path, fill)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Exported(path, size, tuple(notes))


def _check_weight(specs: LinearSpecs, name: str, nearest: str, path: str = "scheme.weight") -> None:
    """Refuses a weight that no format of the package holds, or whose input goes with no weight of that format."""
    spec, inputs = specs.weight, specs.input
    if spec is None:
        return
    floats = tuple(floating.FORMATS)
    allowed = {"format": ("int", *floats), "granularity": ("tensor", "channel", "group")}
    if spec.format in floats:
        allowed["granularity"] = floating.FORMATS[spec.format].granularities
    require(spec, path, name, NAME, nearest, **allowed)
    if inputs is None or (spec.affine and inputs.affine):
        return
    if spec.format == inputs.format == "nvfp4" and inputs.dynamic:
        words = "format: nvfp4, bits: 4, granularity: group, group_size: 16"
        raise UserError(
            f"scheme.input.dynamic: true of {name} cannot be exported to {NAME}: NVFP4 inputs have a static scale of the tensor "
            f"there, and dynamic ones of its blocks: use {advice('scheme.input.dynamic=false', words, f'{words}, dynamic: false')}"
        )
    why = floating.input_refusal(spec, inputs)
    if why is not None:
        fields = ("format", "bits", "granularity", *(("group_size",) if spec.group_size else ()))
        words = ", ".join(f"{field}: {getattr(spec, field)}" for field in fields)
        raise UserError(
            f"scheme.input.format: {inputs.format!r} of {name} cannot be exported to {NAME}: {why}: "
            f"use {advice('scheme.input=null', words, None)}"
        )


@dataclass(frozen=True)
class _Groups:
    """The scheme in the package's words: `schemes` by group name, `of` the group of each quantized Linear.

    `published` has the checkpoint's name of each tensor (`published_names`), `shared` the scales that Linears share.
    """

    schemes: dict[str, Any]
    of: dict[str, str]
    published: dict[str, str]
    ignore: list[str]
    exact: bool
    shared: SharedScales


def _package() -> Any:
    try:
        import compressed_tensors
        import compressed_tensors.compressors
        import compressed_tensors.quantization
    except ImportError as error:
        raise UserError(
            f"export.format: {NAME!r} needs a package that is not there ({error.name}): pip install 'ptq-framework[export]'"
        ) from None
    return compressed_tensors


def _nearest(scheme: SchemeConfig) -> str:
    """Returns the nearest shipped scheme: one with about as many bits, and inputs quantized or not."""
    weights, inputs = 4 if most_weight_bits(scheme) <= 4 else 8, quantizes_inputs(scheme)
    return advice(
        f"scheme=w{weights}a{8 if inputs else 16}",
        f"bits: {weights}, granularity: channel",
        "bits: 8, granularity: token, dynamic: true" if inputs else None,
    )


def _flattened(specs: dict[str, LinearSpecs], network: Network) -> tuple[str, ...]:
    """Returns a note where transformers will not see the tokens that a range is meant for."""
    by_token = {
        n for n, s in specs.items() if s.input is not None and s.input.dynamic and s.input.granularity == "token"
    }
    if not by_token:
        return ()
    rule = "transformers takes one range for all tokens there, and the run one a token: its logits will differ"
    try:
        found = sorted(by_token & flat_inputs(network))
    except NotTraceable as error:
        return (f"whether the model hands a Linear (tokens, channels) could not be told ({error}): {rule}",)
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in found}))
    return (f"this model hands {kinds} (tokens, channels): {rule}; vLLM takes one a token",) if found else ()


def _unread(specs: dict[str, LinearSpecs], network: Network) -> tuple[str, ...]:
    """Returns notes where transformers does not read experts that are quantized this way, and where vLLM computes otherwise."""
    for name in (name for block in network.blocks for names in block.experts.values() for name in names):
        weight, inputs = specs[name].weight, specs[name].input
        if inputs is not None or (weight is not None and not weight.symmetric):
            read = (
                f"experts ({name}, ...) with {'quantized inputs' if inputs is not None else 'zero points'}: vLLM reads them, "
                "transformers those without alone"
            )
            if inputs is None or inputs.affine or inputs.dynamic:
                return (read,)
            return (
                read,
                "vLLM gives the inputs of a layer's experts the greatest of their static scales: it computes something else",
            )
    return ()


def _rounded_again(specs: dict[str, LinearSpecs], network: Network) -> tuple[str, ...]:
    """Returns a note where vLLM gives several weights one scale of the tensor."""
    for name in side_by_side(network, specs, "fp8_e4m3"):
        weight = specs[name].weight
        if weight is not None and weight.granularity == "tensor":
            return (
                "scheme.weight.granularity: 'tensor': vLLM gives q, k and v, and gate and up, one scale of FP8 and rounds them again: "
                "it computes something else; with granularity channel it does not",
            )
    return ()


def _head(scheme: SchemeConfig, network: Network) -> OutsideWeight | None:
    """Returns the head's weight where the scheme gives it a format."""
    found = outside_weights(scheme, network)
    return next((w for w in found if w.tensor == "head" and w.spec is not None), None)


def _full(spec: QuantSpec | None) -> QuantSpec | None:
    return replace(spec, full_range=True) if spec is not None and spec.affine and spec.symmetric else spec


def _shareable(spec: QuantSpec | None) -> QuantSpec | None:
    return replace(spec, scales=SHAREABLE) if spec is not None and spec.format == "nvfp4" else spec


def _arguments(spec: QuantSpec | None, inputs: bool = False) -> Any:
    """Returns the package's `QuantizationArgs` of the spec of a weight, or of `inputs`."""
    if spec is None:
        return None
    make = _package().quantization.QuantizationArgs
    if not spec.affine:
        return make(**floating.arguments(spec, inputs))
    return make(
        num_bits=spec.bits, type="int", symmetric=spec.symmetric, strategy=spec.granularity,
        group_size=spec.group_size, dynamic=spec.dynamic,
    )  # fmt: skip


def _stored(specs: LinearSpecs) -> tuple[Any, ...]:
    """Returns what of the specs the file holds: Linears that agree in it are one group."""
    kept = ("format", "bits", "symmetric", "granularity", "group_size", "dynamic")
    return tuple(None if s is None else tuple(getattr(s, f) for f in kept) for s in (specs.weight, specs.input))


def _groups(source: QuantizedTensors) -> _Groups:
    """Returns config groups with targets: the class Linear for the only group, else the names of its Linears."""
    specs, published = specs_by_linear(source.scheme, source.network), published_names(source.network)
    if (head := _head(source.scheme, source.network)) is not None:
        specs |= {head.name: LinearSpecs(head.spec, None)}
    members: dict[tuple[Any, ...], list[str]] = {}
    for name, spec in specs.items():
        if spec.any:
            members.setdefault(_stored(spec), []).append(name)
    linears = [name for name, module in source.network.model.named_modules() if _is_linear(module)]
    of: dict[str, str] = {}
    schemes: dict[str, Any] = {}
    make = _package().quantization.QuantizationScheme
    for number, names in enumerate(members.values()):
        first = specs[names[0]]
        schemes[f"group_{number}"] = make(
            targets=["Linear"] if len(members) == 1 else [_module(name, published) for name in names],
            weights=_arguments(first.weight),
            input_activations=_arguments(first.input, inputs=True),
            format=_format(first),
        )
        of |= dict.fromkeys(names, f"group_{number}")
    plain = (s.input for s in specs.values() if s.input is not None and s.input.affine)
    exact = all(spec.full_range or not spec.symmetric for spec in plain)
    ignored = sorted(_module(name, published) for name in linears if name not in of)
    return _Groups(schemes, of, published, ignored, exact, SharedScales(source, specs))


def _format(specs: LinearSpecs) -> str:
    if specs.weight is not None and not specs.weight.affine:
        return floating.format_name(specs.weight, specs.input)
    return "pack-quantized" if specs.input is None else "int-quantized"


def _module(name: str, published: dict[str, str]) -> str:
    """Returns the checkpoint's name of a Linear."""
    return published.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "QuantLinear"


def _tensors(
    source: QuantizedTensors, groups: _Groups, within: Sequence[str] = ("",), without: Sequence[str] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor of the checkpoint as `walked` does."""
    model = source.network.model
    head = _head(source.scheme, source.network)
    for name, is_linear in walked(source, within, without):
        owner, _, last = name.rpartition(".")
        if is_linear:
            yield from _linear(source.linear(name), groups)
        elif (scale := scale_name(name)) is not None:
            # Of the module that stands in the block: no checkpoint has it.
            yield scale, model.get_buffer(name).detach().reshape(1).clone()
        elif head is None or head.spec is None or owner != head.name:
            yield groups.published.get(name, name), lossless(source.tensor(name))
        elif last == "weight":
            tensors = rounded(owner, source.tensor(name), head.spec)
            bias = getattr(model.get_submodule(owner), "bias", None)
            yield from _linear(replace(tensors, bias=None if bias is None else source.tensor(f"{owner}.bias")), groups)


def _linear(tensors: LinearTensors, groups: _Groups) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a Linear, compressed by the package where it is quantized."""
    module = _module(tensors.name, groups.published)
    if tensors.bias is not None:
        yield f"{module}.bias", lossless(tensors.bias)
    if tensors.spec is None:
        yield f"{module}.weight", lossless(torch.as_tensor(tensors.weight))
        return
    if tensors.stored is not None:
        state = floating.state(groups.shared.stored(tensors), tensors.spec)
        if tensors.input_scale is not None and tensors.input_spec is not None:
            state |= floating.input_state(tensors.input_scale, tensors.input_spec)
        for name, value in state.items():
            yield f"{module}.{name}", value.contiguous()
        return
    scheme = groups.schemes[groups.of[tensors.name]]
    scale, zero_point = tensors.row_scales(), tensors.row_zero_points()
    state = {"weight": tensors.dense(), "weight_scale": scale.reshape(-1) if _one(tensors) else scale}
    if zero_point is not None:
        shifted = _shifted(zero_point, tensors.spec)
        state["weight_zero_point"] = shifted.reshape(-1) if _one(tensors) else shifted
    if tensors.input_scale is not None and tensors.input_spec is not None:
        state |= floating.input_state(tensors.input_scale, tensors.input_spec)
        if tensors.input_zero_point is not None:
            state["input_zero_point"] = _shifted(tensors.input_zero_point, tensors.input_spec).reshape(1)
    registry = _package().compressors.BaseCompressor
    compressed = registry.get_value_from_registry(scheme.format).compress(state, scheme)
    for name, value in compressed.items():
        yield f"{module}.{name}", value.contiguous()


def _one(tensors: LinearTensors) -> bool:
    return tensors.spec is not None and tensors.spec.granularity == "tensor"


def _shifted(zero_point: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Returns zero points for signed codes -2^(bits-1) .. 2^(bits-1) - 1, as int8."""
    return (zero_point - 2 ** (spec.bits - 1)).to(torch.int8)


def _write_config(folder: pathlib.Path, source: QuantizedTensors, groups: _Groups) -> None:
    """Writes config.json with the ``quantization_config`` that the package makes of the groups."""
    package, model = _package(), source.network.model
    formats = {scheme.format for scheme in groups.schemes.values()}
    config = package.quantization.QuantizationConfig(
        config_groups=groups.schemes, ignore=groups.ignore, quantization_status="compressed",
        kv_cache_scheme=cache_arguments(source.scheme.key),
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
    )  # fmt: skip
    saved = type(model.config).from_dict(model.config.to_dict())
    saved.architectures, saved.use_cache = [type(model).__name__], True
    saved.dtype = next(iter(model.parameters())).dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved.save_pretrained(folder)
        package.compressors.ModelCompressor(quantization_config=config).update_config(str(folder))
