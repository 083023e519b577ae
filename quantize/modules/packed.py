"""The packed Linear: codes and scales are all that it holds of its weight, decoded in each forward or multiplied by a kernel."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from quantize.codecs.base import Encoded, Layout, stored_bytes
from quantize.codecs.integers import INTEGERS
from quantize.codecs.llm_int8 import WEIGHT, llm_int8_linear
from quantize.codecs.registry import codec_of
from quantize.grid.affine import Grid, grouped
from quantize.kernels.base import SHIFT, IntegerRows, IntegerWeight, finish
from quantize.kernels.choice import Choice, Multiplier
from quantize.kernels.floating import StoredWeight
from quantize.kernels.opaque import is_compiled, linear
from quantize.kernels.stored import Products, products
from quantize.kernels.traced import RowProduct
from quantize.modules.frozen import DecodedWeight, FrozenProduct
from quantize.modules.fused import Place, group_bits, stack, take_apart, traced_sums
from quantize.modules.shared_input import SharedInput
from quantize.modules.simulated import QuantLinear, fake_quantize_dynamic
from quantize.spec.quant_spec import QuantSpec

INTEGER_PART = QuantSpec(bits=8, granularity="token", dynamic=True)
"""What of LLM.int8()'s input meets the int8 weight: all but the outlier columns."""


class PackedLinear(nn.Linear):
    """A Linear whose weight is held as packed codes and scales, with no dequantized copy beside them.

    It computes the function of `quantize.modules.simulated.QuantLinear` with the same specs. What it stores are parameters that need no
    gradient, named as `Codec.encode` names them (``codes``, ``scale``, ...), so that whatever moves, saves or offloads
    parameters does so with them; ``.to(dtype)`` leaves their types alone. ``weight`` is decoded each time that it is read
    (a `DecodedWeight`), in the model's type as ``.to(dtype)`` has left it. Gradients reach the input and the bias; the weight is frozen, and rounding of the input lets
    gradients through unchanged (straight-through).

    Built empty; filled by `store`, `from_weight` or ``load_state_dict``.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        bias: whether there is one.
        weight_spec: format of the weight.
        input_spec: format of the input, dynamic, or None.
        dtype: the model's, of the bias and of ``weight``; None for torch's default.
        device: where to; ``meta`` for shapes only.

    Raises:
        ValueError: for a format that the tensor cannot have, a group size that does not divide, clusters, or an input
            whose ranges are static.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        weight_spec: QuantSpec,
        input_spec: QuantSpec | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        # Not Linear's own: that would allocate the weight.
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight_spec, self.input_spec = weight_spec, input_spec
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self._choice: Choice | None = None
        self._shared = SharedInput()
        self._kernel: Multiplier | Products | None = None
        self._taken: tuple[Any] | None = None
        self._row: RowProduct | None = None
        self.place: Place | None = None
        self.apart = False
        layout = packed_layout(out_features, in_features, weight_spec, input_spec)
        self.stored_names = tuple(layout)
        for name, (shape, kind) in layout.items():
            self.register_parameter(name, _frozen(torch.empty(shape, dtype=kind, device=device)))
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else _frozen(empty))

    @classmethod
    def from_weight(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_spec: QuantSpec,
        input_spec: QuantSpec | None = None,
    ) -> Self:
        """Returns the module for a floating-point weight (out, in), rounded to nearest.

        Raises:
            ValueError: as the class, and for a weight that `quantize.codecs.base.checked` refuses.
        """
        module = cls(weight.shape[1], weight.shape[0], False, weight_spec, input_spec, weight.dtype, "meta")
        module.store(weight)
        if bias is not None:
            module.bias = _frozen(bias.detach().clone())
        return module

    @classmethod
    def from_quantized(cls, linear: QuantLinear) -> "PackedLinear":
        """Returns the packed form of a simulated Linear, with the codes that a solver has chosen.

        Raises:
            ValueError: when its weight is in floating point, is corrected or has clusters, or its input has static ranges.
        """
        spec = linear.weight_spec
        if spec is None:
            raise ValueError("the weight is in floating point: there is nothing to pack")
        if linear.corrected:
            raise ValueError("the weight has a correction of low rank, which packed codes do not hold")
        kind = packed_type(spec, linear.input_spec)
        shape = linear.in_features, linear.out_features
        module = kind(*shape, False, spec, linear.input_spec, linear.weight.dtype, "meta")
        if spec.affine:
            grid = Grid(linear.scale, linear.zero_point, 0, 0)
            module._set(INTEGERS.store(linear.codes, grid, spec))
        else:
            module._set({name: getattr(linear, name) for name in module.stored_names})
        if linear.bias is not None:
            module.bias = _frozen(linear.bias.detach().clone())
        return module

    def store(self, weight: torch.Tensor) -> None:
        """Encodes a floating-point weight (out, in) and holds the result; `weight` itself is not kept.

        Raises:
            ValueError: as `encode`.
        """
        self._set(self.encode(weight))

    @torch.no_grad()
    def encode(self, weight: torch.Tensor) -> Encoded:
        """Returns what `store` would hold of a floating-point weight (out, in).

        Raises:
            ValueError: for another shape, or a weight that `quantize.codecs.base.checked` refuses.
        """
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(f"shape {tuple(weight.shape)} is not {(self.out_features, self.in_features)}")
        return codec_of(self.weight_spec).encode(weight.contiguous(), self.weight_spec)

    def _set(self, stored: Encoded) -> None:
        self._forget_kernel()
        for name in self.stored_names:
            setattr(self, name, _frozen(stored[name].detach()))

    @property
    def stored(self) -> Encoded:
        """The tensors that hold the weight."""
        return {name: getattr(self, name) for name in self.stored_names}

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns the weight (out, in) that the codes stand for."""
        return self._decoded(self.stored, dtype)

    def _decoded(self, stored: Encoded, dtype: torch.dtype) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        return codec_of(self.weight_spec).decode(stored, self.weight_spec, shape, dtype)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and name not in self._parameters:
            return self.dequantized(self.dtype).as_subclass(DecodedWeight)
        return super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the output (..., out) for `x` (..., in), in the type of `x`."""
        bias = self._parameters["bias"]  # self.bias would be looked for everywhere else first
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            result: torch.Tensor = FrozenProduct.apply(x, bias, self, *self.stored.values())
            return result
        return self._product(x, bias, fused=True)

    def use_kernels(self, choice: Choice | None, shared: SharedInput | None = None) -> None:
        """Lets kernels multiply from now on, where `choice` has some that can; None has the weight decoded at each call.

        Which, is settled when it is first called, and again when it was moved or filled anew.

        Args:
            choice: who is wanted; may be shared by all Linears of a model.
            shared: what Linears that read the same tensor share; None for one of its own.
        """
        self._choice, self._shared = choice, SharedInput() if shared is None else shared
        shape = self.out_features, self.in_features
        self._row = None if choice is None else RowProduct.of(self.weight_spec, self.input_spec, shape)
        self._forget_kernel()

    @property
    def kernel_choice(self) -> Choice | None:
        """Who is wanted; None where the weight is decoded at each call."""
        return self._choice

    @property
    def offloaded(self) -> bool:
        """Whether accelerate brings the codes anew at each call: what a kernel packs would be packed each time."""
        return bool(getattr(self.__dict__.get("_hf_hook"), "offload", False))

    def kernel_bytes(self) -> int:
        """Returns the bytes that kernels hold of the weight at present, beside what is stored."""
        if self._kernel is None:
            return 0
        codes = 8 if isinstance(self._kernel, Multiplier) and not self._codes_as_stored else 0
        held = self._kernel.held_bits() + group_bits(self) + codes
        return round(held * self.in_features * self.out_features / 8)

    @property
    def quantizes(self) -> bool:
        """Whether it rounds its input to codes at each call: of those that are multiplied as one the first does it for all."""
        return isinstance(self._kernel, Multiplier) and (self.place is None or self.place[1] == 0)

    @property
    def _codes_as_stored(self) -> bool:
        """Whether integer kernels read what is stored, and no copy."""
        return self.weight_spec.bits == 8 and self.weight_spec.symmetric

    def read_bytes(self) -> int:
        """Returns the bytes of the weight that one row reads, as it lies in front of who multiplies it."""
        if isinstance(self._kernel, Multiplier):
            return self.in_features * self.out_features
        if isinstance(self._kernel, Products):
            bits = self._kernel.read_bits(1)
            return self.stored_bytes() if bits is None else round(bits * self.in_features * self.out_features / 8)
        # Decoded: written and read once more.
        return self.stored_bytes() + 2 * self.dtype.itemsize * self.in_features * self.out_features

    def _forget_kernel(self) -> None:
        self._kernel = self._taken = None
        take_apart(self)
        self.apart = False

    def stacking(self) -> tuple[object, ...]:
        """Returns what has to be equal in Linears that are multiplied as one."""
        return self.weight_spec, self.input_spec, self.in_features, id(self._choice), type(self._kernel)

    def stacked(self, others: Sequence["PackedLinear"]) -> tuple[Multiplier, IntegerWeight] | None:
        """Returns what multiplies by its weight with those of `others` below it, and that weight, or None where nothing can."""
        if self._choice is None:
            return None
        linears = (self, *others)
        shape = sum(linear.out_features for linear in linears), self.in_features
        multiplier = self._choice.multiplier(self.weight_spec, self.input_spec, shape, self.stored["codes"].device)
        return None if multiplier is None else (multiplier, stack([_integers(linear._held()) for linear in linears]))

    def rest_on(self, weight: IntegerWeight) -> None:
        """Takes its codes, the same as before, out of `weight` from now on, and lets its own go."""
        if self._codes_as_stored:
            self.stored["codes"].data = weight.codes.view(torch.uint8)
        if isinstance(self._kernel, Multiplier):
            self._kernel.take(weight)

    def _settled(self, x: torch.Tensor) -> Multiplier | Products | None:
        """Returns what multiplies `x`, or None where the weight is decoded."""
        if self._choice is None or type(x) is not torch.Tensor or x.dtype is not self.dtype:
            return None
        if torch.compiler.is_compiling():
            return None  # A tracer sees the definition, or the product of one row, and no timing.
        codes = self._parameters["codes"]
        if self._taken is None or self._taken[0] is not codes:
            self._take(codes)
        return self._kernel

    def _take(self, codes: Any) -> None:
        """Looks for a kernel for what is stored now."""
        self._forget_kernel()
        # In a tuple: a module would take it for a parameter of another name.
        self._taken = (codes,)
        shape = self.out_features, self.in_features
        if self._choice is None or self.offloaded:
            return
        kernel = self._look_up(self._choice, shape, codes.device)
        if isinstance(kernel, Products):
            kernel.take(self._held())
        elif kernel is not None:
            kernel.take(_integers(self._held()))
        self._kernel = kernel

    def _held(self) -> StoredWeight:
        stored = {name: tensor.detach() for name, tensor in self.stored.items()}
        shape = self.out_features, self.in_features
        return StoredWeight(stored, self.weight_spec, self.input_spec, shape, self.dtype)

    def _look_up(self, choice: Choice, shape: tuple[int, int], device: torch.device) -> Multiplier | Products | None:
        rounding = None if self.input_spec is None else self._rounded
        return products(choice, self.weight_spec, self.input_spec, shape, device, self.dtype, rounding)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.input_spec is None else self._shared.rounded(x, self.input_spec)

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None, fused: bool = False) -> torch.Tensor:
        """Returns the output; `fused`: where the Linear may multiply together with others, which gives views of one tensor."""
        kernel = self._settled(x)
        if isinstance(kernel, Multiplier) and self.input_spec is not None:
            rows, lead = self._shared.codes(x, self.input_spec), x.shape[:-1]
            part = self._shared.fused.part(self, rows, lead) if fused else None
            if part is not None:
                return finish(part, None, bias, x.dtype)
            return kernel(rows, bias, x.dtype).view(*lead, self.out_features)
        if isinstance(kernel, Products):
            return kernel(x, bias)
        if is_compiled() and (traced := self._traced(x)) is not None:
            return finish(traced, None, bias, x.dtype)
        if self.input_spec is not None:
            x = fake_quantize_dynamic(x, self.input_spec)
        return functional.linear(x, self.dequantized(x.dtype), None if bias is None else bias.to(x.dtype))

    def _traced(self, x: torch.Tensor) -> torch.Tensor | None:
        """Returns x W^T (..., out) as a compiler is given it: loops for one row, for several who was found to multiply before; None where
        that is only the definition."""
        if self._row is not None and x.numel() == self.in_features:
            stored = self.stored
            return self._row(x, stored["codes"], stored["scale"], stored.get("zero_point"))
        if self._choice is None or x.dtype is not self.dtype:
            return None
        if isinstance(self._kernel, Products):
            return linear(x, self._kernel.handle, self.out_features)
        bits = None if self._row is None else self._row.input_bits
        if bits is None or not isinstance(self._kernel, Multiplier):
            return None
        sums = None if self.place is None else self.place[0].trace(self.place[1], x, bits)
        if sums is None:
            sums = traced_sums(self._kernel, x, bits, self.out_features)
        return sums.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self._forget_kernel()
        # What `fn` makes of a tensor of the model's type says which type that is from now on.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=next(iter(self.stored.values())).device)).dtype
        result: Self = super()._apply(keeping_types(self.stored, fn), recurse)
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget_kernel()

    def __getstate__(self) -> dict[str, Any]:
        """A copy packs for itself."""
        return {**self.__dict__, "_kernel": None, "_taken": None, "place": None}

    def stored_bytes(self) -> int:
        """Returns the bytes of the weight as it is held, scales included."""
        return stored_bytes(self.stored)

    def bits_per_weight(self) -> float:
        """Returns stored bits over weights, scales and zero points included."""
        return 8 * self.stored_bytes() / (self.in_features * self.out_features)

    def extra_repr(self) -> str:
        """Names the shape and the formats."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, weight={self.weight_spec}, input={self.input_spec}"


class LlmInt8Linear(PackedLinear):
    """A Linear by LLM.int8(): int8 products, with the outlier columns of the input in floating point.

    `outlier_share` is the share of outlier columns of the last call, None before the first.
    """

    outlier_share: float | None = None

    def int8_codes(self) -> torch.Tensor:
        """Returns the weight's codes, int8 (out, in)."""
        return self.stored["codes"].view(torch.int8)

    def _look_up(self, choice: Choice, shape: tuple[int, int], device: torch.device) -> Multiplier | None:
        return choice.multiplier(WEIGHT, INTEGER_PART, shape, device)

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None, fused: bool = False) -> torch.Tensor:
        threshold = 6.0 if self.input_spec is None else self.input_spec.threshold
        kernel = self._settled(x)
        multiply = _integer_part(kernel) if isinstance(kernel, Multiplier) else None
        y, self.outlier_share = llm_int8_linear(x, self.int8_codes(), self.stored["scale"], bias, threshold, multiply)
        return y


def _integer_part(kernel: Multiplier) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Returns the int8 part of LLM.int8() by a kernel: of codes (rows, in) and their scales (rows, 1)."""

    def multiply(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return kernel(IntegerRows(codes, scale, None), None, torch.float32)

    return multiply


def packed_type(weight_spec: QuantSpec, input_spec: QuantSpec | None) -> type[PackedLinear]:
    """Returns the class of the packed Linear with these formats: `LlmInt8Linear` where its int8 product applies."""
    mixed = input_spec is not None and input_spec.format == "llm_int8"
    return LlmInt8Linear if mixed and weight_spec == WEIGHT else PackedLinear


def packed_layout(rows: int, columns: int, weight_spec: QuantSpec, input_spec: QuantSpec | None = None) -> Layout:
    """Returns shapes and dtypes of what a `PackedLinear` of a weight (rows, columns) holds of it.

    Raises:
        ValueError: for what `PackedLinear` refuses.
    """
    weight_spec.check_weight()
    if input_spec is not None:
        input_spec.check_activation()
        if not input_spec.dynamic:
            raise ValueError("dynamic: False for the input needs ranges from calibration: use dynamic true")
        grouped(torch.empty(1, columns, device="meta"), input_spec)
    return codec_of(weight_spec).layout((rows, columns), weight_spec)


def _integers(held: StoredWeight) -> IntegerWeight:
    """Returns a stored weight as integer kernels take it; symmetric codes of 8 bits are the stored ones, and no copy."""
    codes, zero = held.codes(), held.zeros()
    if zero is None:
        return IntegerWeight(codes, held.scales().contiguous(), None)
    return IntegerWeight((codes ^ SHIFT).view(torch.int8), held.scales().contiguous(), zero.to(torch.int32) - SHIFT)


def keeping_types(
    stored: Encoded, fn: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns `fn`, what a module's ``_apply`` is given, such that what is `stored` keeps its types: in another one it would no longer
    be what was encoded, and small scales would become 0.
    """
    held = {id(tensor) for tensor in stored.values()}

    def keeping(tensor: torch.Tensor) -> torch.Tensor:
        moved = fn(tensor)
        kept = id(tensor) in held and moved.dtype != tensor.dtype
        return tensor.to(moved.device) if kept else moved

    return keeping


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
