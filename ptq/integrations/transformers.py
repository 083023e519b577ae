"""transformers loads, saves and runs packed models: ``from_pretrained(path, quantization_config=PtqConfig(...))``.

Importing this module registers the method ``ptq`` with transformers. A process that loads a model whose config.json names it
has to import this module first: transformers has no other way of finding it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from ptq.config.building import build
from ptq.config.schema import SchemeConfig
from ptq.errors import UserError, nearest
from ptq.integrations.experts import TakenApart, take_apart
from ptq.integrations.kernels import say_what_is_decoded, use_kernels_
from ptq.integrations.outside import choose_outside, emptied_outside, tie_names_
from ptq.integrations.replace import (
    HEAD,
    METHOD,
    choose,
    dequantize_,
    emptied,
    record_of,
    replace_everywhere,
    scheme_of,
    tied_of,
)
from ptq.models.memory.resident_memory import forget_pages, return_freed_memory
from quantize.kernels.choice import AUTO
from quantize.kernels.stored import HOLD_BITS
from quantize.modules.packed import PackedLinear
from quantize.modules.packed_embedding import PackedEmbedding
from quantize.spec.quant_spec import QuantSpec, SpecError

_OPTIONS = ("scheme", "double_quant", "group_size", "threshold", "skip_modules", "kernels", "hold_bits")


@register_quantization_config(METHOD)
class PtqConfig(QuantizationConfigMixin):
    """How a model is quantized while transformers loads it; what config.json keeps of it.

    Args:
        scheme: a shipped scheme (``nf4``, ``w8a8``, ``llm.int8``, ...) or a `ptq.config.schema.SchemeConfig` whose inputs are
            dynamic.
        double_quant: quantize the scales of the weights too; schemes nf4 and fp4.
        group_size: values of a weight in a group, other than the scheme's; it has to divide every Linear's columns.
        threshold: magnitude from which an input column is an outlier; scheme llm.int8.
        skip_modules: patterns of the Linears that stay as they are, as `ptq.integrations.replace.quantize_`'s `exclude`; None for the
            head and what is tied to an embedding.
        kernels: who multiplies, as `ptq.integrations.kernels.use_kernels_` has it; not kept in config.json.
        hold_bits: bits a weight that kernels may hold beside what is stored; not kept either.
        specs: the scheme itself in containers of JSON, as config.json has it; then none of the above but `skip_modules`.

    Raises:
        UserError: for an unknown option or scheme, or one that a packed Linear cannot compute.
    """

    def __init__(
        self,
        scheme: str | SchemeConfig | None = None,
        double_quant: bool | None = None,
        group_size: int | None = None,
        threshold: float | None = None,
        skip_modules: Sequence[str] | None = None,
        kernels: str = AUTO,
        hold_bits: float = HOLD_BITS,
        specs: dict[str, Any] | None = None,
        **others: Any,
    ):
        self.quant_method = METHOD  # type: ignore[assignment]  # an enumeration of transformers' own methods
        unknown = sorted(set(others) - {"quant_method"})
        if unknown:
            raise UserError(f"PtqConfig: no option {unknown[0]!r}{nearest(unknown[0], _OPTIONS)}")
        if scheme is not None and not isinstance(scheme, str | SchemeConfig):
            raise UserError(
                f"PtqConfig.scheme: a {type(scheme).__name__}, expected a name or a SchemeConfig: give a dict as specs"
            )
        if specs is not None:
            found: SchemeConfig = build(SchemeConfig, specs, "quantization_config.specs")
        else:
            found = scheme_of("w8a16" if scheme is None else scheme)
        found = _changed(found, "weight", double_quant=double_quant)
        if group_size is not None:
            found = _changed(found, "weight", granularity="group", group_size=group_size)
        self.scheme = scheme_of(_changed(found, "input", threshold=threshold))
        if isinstance(skip_modules, str):
            raise UserError(f"PtqConfig.skip_modules: {skip_modules!r} is a text: use a list, [{skip_modules!r}]")
        self.given = skip_modules is not None and specs is None
        """Whether the patterns come from a user, who wants to hear of one that matches nothing."""
        self.kernels, self.hold_bits = kernels, hold_bits
        self.skip_modules = [HEAD] if skip_modules is None else list(skip_modules)

    def to_dict(self) -> dict[str, Any]:
        """Returns what config.json says."""
        return record_of(self.scheme, self.skip_modules)


def _changed(scheme: SchemeConfig, tensor: str, **changes: Any) -> SchemeConfig:
    """Returns the scheme with fields of one tensor's spec, and of its overrides, changed where they are not None."""
    changes = {key: value for key, value in changes.items() if value is not None}
    if not changes:
        return scheme
    spec: QuantSpec | None = getattr(scheme, tensor)
    field = list(changes)[-1]
    if spec is None:
        raise UserError(f"PtqConfig.{field}: {changes[field]!r}, but this scheme leaves the {tensor} alone: use null")
    try:
        return dataclasses.replace(scheme, **{tensor: dataclasses.replace(spec, **changes)})  # type: ignore[arg-type]
    except SpecError as error:
        raise UserError(f"PtqConfig.{error.field}: {error.value!r} is not valid: expected {error.expected}") from None


class _Encode(ConversionOps):
    """Encodes one weight when it has been read, and lets it go."""

    def __init__(self, quantizer: "PtqQuantizer"):
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, list[torch.Tensor]]:
        """Returns codes and scales by their full names."""
        found: dict[str, list[torch.Tensor]] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module, _ = get_module_from_name(model, name)
            prefix = name.rpartition(".")[0]
            try:
                stored = module.encode(weight.t() if prefix in self.quantizer.transposed else weight)
            except ValueError as error:
                # Raised here it would drown in a report: it is kept until loading ends.
                self.quantizer.refused.append(f"{name}: {error}".replace("the weight ", ""))
                continue
            # Otherwise the whole checkpoint would be resident in the end, beside the codes.
            forget_pages(weight)
            return_freed_memory()
            if isinstance(module, PackedEmbedding):
                stored = {**stored, "unit": torch.ones_like(module.unit, device=weight.device)}
            found.update({f"{prefix}.{key}": [tensor] for key, tensor in stored.items()})
            _stand_in(module)
            if missing_keys is not None:
                missing_keys.discard(name)
        return found


@register_quantizer(METHOD)
class PtqQuantizer(HfQuantizer):
    """Puts packed Linears into a model that is being loaded, and encodes each weight as it is read."""

    requires_calibration = False
    quantization_config: PtqConfig

    def __init__(self, quantization_config: PtqConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.compiles = False
        self.transposed: set[str] = set()
        """Names of the Linears whose checkpoint holds the weight as (in, out)."""
        self.experts = TakenApart()
        """Which fused experts are Linears while the model is loaded, and from then on."""
        self.refused: list[str] = []
        """Weights that could not be encoded, and why."""

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile: where `ptq.integrations.compiled.compile_decode_` has asked for it."""
        return self.compiles

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise UserError("tp_plan, distributed_config: packed Linears are not split over processes: use device_map")
        config = self.quantization_config
        self.experts = take_apart(model)
        chosen = choose(
            model, config.scheme, (), config.skip_modules, lambda module, name: name not in self.experts.gates,
            config.given and not self.pre_quantized,
        )  # fmt: skip
        for name, specs in chosen.items():
            old = model.get_submodule(name)
            new = emptied(old, specs)
            if self.pre_quantized:
                _stand_in(new)
            else:
                # transformers hands out a weight by its name in the module's state. Not registered as usual: that refuses a
                # name which the module answers to already.
                new._parameters["weight"] = nn.Parameter(old.weight.detach(), requires_grad=False)
                if isinstance(old, Conv1D):
                    self.transposed.add(name)
            replace_everywhere(model, old, new)
        outside = choose_outside(model, config.scheme, tied_of(model))
        for one in outside:
            old = model.get_submodule(one.name)
            packed = emptied_outside(old, one.spec)
            if self.pre_quantized or one.tied:
                _stand_in(packed)
            else:
                packed._parameters["weight"] = nn.Parameter(old.weight.detach(), requires_grad=False)
            replace_everywhere(model, old, packed)
            if one.tied:
                tie_names_(model, one.name, outside[0].name, packed.stored_names)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        missing = [name for name, m in _packed(model) if m._parameters.get("weight") is not None]
        if self.refused:
            more = f" (and {len(self.refused) - 1} more)" if len(self.refused) > 1 else ""
            raise UserError(f"{self.refused[0]}{more}: load the model without quantization_config to look at it")
        if missing:
            raise UserError(f"{missing[0]}.weight: is not in the checkpoint: there is nothing to quantize")
        for _, module in _packed(model):
            del module.__dict__["weight"]
            module.requires_grad_(False)
        say_what_is_decoded(use_kernels_(model, self.quantization_config.kernels, self.quantization_config.hold_bits))
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a checkpoint's tensor is a weight that is to be encoded."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, PackedLinear | PackedEmbedding) and name == "weight"

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes of an element, for ``device_map="auto"``: a weight takes none, its codes and scales are counted."""
        if self.param_needs_quantization(model, param_name):
            return 0
        return param.element_size()

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """What transformers does to the checkpoint's names and tensors: experts that are Linears here are not stacked."""
        usual = super().update_weight_conversions(weight_conversions, model)
        return self.experts.conversions(usual) if self.experts.fused else usual

    def get_quantize_ops(self) -> ConversionOps:
        """What transformers calls for each weight that is to be encoded."""
        return _Encode(self)

    def is_serializable(self) -> bool:
        """Codes and scales are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained beside the frozen weights."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        del model.hf_quantizer
        dequantize_(model, dtype)
        return model


def _stand_in(module: nn.Module) -> None:
    """Gives a packed Linear an empty `weight` for the time of loading: transformers initializes what is missing from a
    checkpoint, and would have every weight decoded only to overwrite it.
    """
    module._parameters.pop("weight", None)
    # As many rows as an embedding has, one of which may be set to 0 for padding.
    module.__dict__["weight"] = torch.empty(getattr(module, "num_embeddings", 0), 0, device="cpu")


def _packed(model: nn.Module) -> list[tuple[str, PackedLinear | PackedEmbedding]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)]
