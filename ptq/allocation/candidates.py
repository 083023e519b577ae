"""Candidate formats of weights: their names, what they take, and which a model and an exporter can have."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ptq.config.checking import check_specs
from ptq.config.schema import ExportConfig, Recipe, SchemeConfig
from ptq.config.scheme import check_scheme
from ptq.errors import UserError, nearest
from ptq.export.registry import build_exporter
from ptq.files.store import store_of
from ptq.models.locations import locate
from ptq.network.network import Network
from ptq.network.outside import check_outside
from ptq.network.skeleton import skeleton
from ptq.run.forecast.memory_estimate import check_sensitivity_memory
from quantize.codecs.registry import codec_of
from quantize.spec.formats import formats
from quantize.spec.quant_spec import QuantSpec, SpecError, spec_of

_INTEGER = re.compile(r"int([2-8])(?:_g([1-9][0-9]{0,5})|_(tensor))?(?:_(sym|asym))?")
_OTHER = re.compile(r"([a-z0-9_]+?)(?:_g([1-9][0-9]{0,5}))?")


def candidate(name: str, like: QuantSpec | None = None) -> QuantSpec:
    """Returns the weight format that `name` means.

    ``int4`` has a scale for each output channel, ``int4_g64`` for each group of 64, ``int4_tensor`` one; ``_sym`` and ``_asym``
    choose absmax or a zero point. All else of an integer format is that of `like` where that is one. Other formats go by their
    names: ``nf4``, ``fp4``, ``fp4_g32``, ``mxfp4``, ``fp8_e4m3``.

    Raises:
        UserError: for a name that means no format of a weight.
    """
    try:
        if match := _INTEGER.fullmatch(name):
            bits, group, tensor, zero = match.groups()
            base = like if like is not None and like.affine and like.granularity != "cluster" else QuantSpec()
            symmetric = base.symmetric if zero is None else zero == "sym"
            half = "float16_min" if not symmetric and int(bits) <= 6 else "float16"
            return replace(
                base,
                bits=int(bits),
                granularity="group" if group else "tensor" if tensor else "channel",
                group_size=int(group) if group else None,
                symmetric=symmetric,
                scales="float32" if base.scales == "float32" else half,
            )
        match = _OTHER.fullmatch(name)
        if match is None or match[1] not in formats():
            known = [*(f"int{bits}_g64" for bits in range(2, 9)), *(n for n in formats() if n != "int")]
            raise UserError(
                f"--formats: {name!r} is no format: use int4, int4_g64, int4_g64_asym, nf4, fp4, ...{nearest(name, known)}"
            )
        spec = spec_of(match[1], group_size=int(match[2])) if match[2] else spec_of(match[1])
        spec.check_weight()
    except SpecError as error:
        raise UserError(f"--formats: {name}: {error}") from None
    return spec


def named(names: Sequence[str], scheme: SchemeConfig) -> dict[str, QuantSpec]:
    """Returns the formats that `names` mean beside a recipe's scheme; needs no model.

    Raises:
        UserError: for a scheme without quantized weights, or a name that means no format.
    """
    if scheme.weight is None:
        raise UserError(
            "scheme.weight: null, so that there is nothing to choose: use a scheme such as scheme=w4a16_g64"
        )
    return {name: candidate(name, scheme.weight) for name in names}


def candidates(
    names: Sequence[str], scheme: SchemeConfig, export: ExportConfig | None, network: Network, given: bool
) -> tuple[dict[str, QuantSpec], list[str]]:
    """Returns the formats `names` as the exporter stores them, and a line for each that was left out.

    Args:
        names: of candidates.
        scheme: the recipe's, whose weight integer candidates are like.
        export: the recipe's; None where any format will do.
        network: the model.
        given: whether somebody has named them: then one that does not fit is refused, else it is left out.

    Raises:
        UserError: as `named` does, for a format that occurs twice or does not fit, or fewer than one that does.
    """
    found: dict[str, QuantSpec] = {}
    dropped: list[str] = []
    for name, spec in named(names, scheme).items():
        try:
            spec = _fitting(spec, scheme, export, network)
        except UserError as error:
            if given:
                raise UserError(f"--formats: {name}: {error}") from None
            dropped.append(f"{name} is left out: {error}")
            continue
        same = next((other for other, known in found.items() if known == spec), None)
        if same is not None:
            raise UserError(f"--formats: {name} is {same} once more: leave it out")
        found[name] = spec
    if not found:
        raise UserError(f"--formats: none of {', '.join(names)} fits: {dropped[-1]}")
    return found, dropped


def candidates_before(names: Sequence[str], recipe: Recipe, given: bool) -> tuple[dict[str, QuantSpec], Network] | None:
    """Returns what `candidates` will find, and the model without its weights, before these are read; None for one on the hub.

    Raises:
        UserError: as `candidates` does, and where their costs cannot be measured in the memory that there is.
    """
    if locate(recipe.model).kind == "hub":
        return None
    network = skeleton(recipe.model, store_of(recipe))
    found, _ = candidates(names, recipe.scheme, recipe.export, network, given)
    check_sensitivity_memory(recipe, network, len(found))
    return found, network


def uniform(scheme: SchemeConfig, spec: QuantSpec) -> SchemeConfig:
    """Returns `scheme` with the weights of all that it quantizes in one format: Linears, embedding, head."""
    overrides = []
    for override in scheme.overrides:
        tensors = {t: s for t, s in override.tensors.items() if t != "weight" or s is None}
        if tensors:
            overrides.append(replace(override, tensors=tensors))
    embedding, head = (spec if there is not None else None for there in (scheme.embedding, scheme.head))
    return replace(scheme, weight=spec, embedding=embedding, head=head, overrides=tuple(overrides))


def stored_bytes(shape: tuple[int, int], spec: QuantSpec) -> int:
    """Returns what a weight (out, in) takes in a format: codes, scales and zero points."""
    return codec_of(spec).layout_bytes(shape, spec)


def _fitting(spec: QuantSpec, scheme: SchemeConfig, export: ExportConfig | None, network: Network) -> QuantSpec:
    """Returns the format as the exporter stores it. Raises `UserError` where model or exporter cannot have it."""
    made = uniform(scheme, spec)
    if export is not None:
        made = build_exporter(export).adapt(made)
    check_specs(made)
    check_scheme(made, network.shapes, network.head_dim)
    check_outside(made, network)
    if export is not None:
        build_exporter(export).check(made, network)
    if made.weight is None:
        raise UserError("scheme.weight: null: report this")
    return made.weight


def total_bytes(shapes: Mapping[str, tuple[int, int]], spec: QuantSpec) -> int:
    """Returns what all of these weights take in one format."""
    return sum(stored_bytes(shape, spec) for shape in shapes.values())
