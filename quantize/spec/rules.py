"""The rule book: which tensor of a block may have which `QuantSpec`."""

from quantize.spec.quant_spec import QuantSpec, SpecError

TENSORS = ("weight", "input", "query", "key", "value", "attention_probs")
"""The kinds of tensors of a block that may have a spec."""
OUTSIDE = ("embedding", "head")
"""The weights outside the blocks that may have one."""
_CACHED = {"query", "key", "value"}
_HELD = {"key", "value"}


class TensorRuleError(SpecError):
    """A field that has a meaning, but not for this tensor. `sentence` says why, and what to use."""

    def __init__(self, field: str, value: object, sentence: str):
        super().__init__(field, value, sentence)
        self.sentence = sentence


def check_tensor(tensor: str, spec: QuantSpec) -> None:
    """Checks the spec of one kind of tensor, of `TENSORS`.

    Raises:
        SpecError: when tensors of this kind cannot have the format.
        TensorRuleError: when they cannot have one of its fields' values.
    """
    if tensor == "weight":
        spec.check_weight()
        _check_weight(spec)
        return
    spec.check_activation()
    if spec.format == "llm_int8" and tensor != "input":
        _refuse("format", spec.format, "'llm_int8' is for what a Linear reads: use int, or llm_int8 for scheme.input")
    _check_activation(tensor, spec)
    if tensor in _CACHED and not spec.dynamic and spec.range != "minmax":
        _refuse("range", spec.range, f"{spec.range!r} with dynamic false: only inputs have it: use minmax")
    if tensor != "input" and spec.dynamic and spec.granularity == "tensor":
        why = "its range would depend on the other samples of the batch"
        _refuse("granularity", "tensor", f"'tensor' with dynamic true: {why}: use token")
    if tensor == "attention_probs":
        _check_probabilities(spec)


def _check_weight(spec: QuantSpec) -> None:
    why = "a weight has no tokens and never changes: use dynamic false, granularity channel"
    if spec.dynamic:
        _refuse("dynamic", True, f"true: {why}")
    if spec.granularity == "token":
        _refuse("granularity", "token", f"'token': {why}")
    if spec.full_range:
        _refuse("full_range", True, "true, but it is for activations: use false")
    if spec.clip != 1:
        _refuse(
            "clip",
            spec.clip,
            f"{spec.clip}, but it is for activations: use 1.0, and steps.rtn.scales or steps.gptq.scales",
        )
    if spec.range == "ema":
        _refuse("range", "ema", "'ema' is a mean over samples, and a weight has none: use minmax or mse")


def _check_activation(tensor: str, spec: QuantSpec) -> None:
    if spec.scales != "float32":
        _refuse("scales", spec.scales, f"{spec.scales!r}, but an activation's scale is stored nowhere: use float32")
    # NVFP4's blocks have scales of their own at each call, under one of the tensor that may be static.
    only_input = not spec.affine and spec.granularity == "group" and not spec.dynamic
    if only_input and tensor != "input":
        _refuse(
            "dynamic", False, f"false with format {spec.format!r}: what a Linear reads alone has it: use dynamic true"
        )
    if spec.dynamic and spec.range == "ema":
        _refuse("range", "ema", "'ema' with dynamic true: a mean over samples is static: use dynamic false")
    if not spec.dynamic and not only_input and spec.granularity in {"token", "group"}:
        unknown = spec.granularity == "token"
        why = "tokens are not known in advance" if unknown else "groups of an activation are dynamic"
        _refuse("dynamic", False, f"false with granularity {spec.granularity!r}: {why}: use dynamic true")
    # A cache gathers tokens: those of a group share a channel's scale (KIVI).
    gathered = tensor in _HELD and spec.granularity == "channel"
    if spec.dynamic and spec.granularity in {"channel", "cluster"} and not gathered:
        why = "its ranges come from statistics"
        _refuse("dynamic", True, f"true with granularity {spec.granularity!r}: {why}: use dynamic false")


def _check_probabilities(spec: QuantSpec) -> None:
    if spec.granularity not in {"token", "tensor"}:
        why = "probabilities have no fixed channels"
        _refuse("granularity", spec.granularity, f"{spec.granularity!r}: {why}: use token or tensor")
    if spec.affine and spec.symmetric:
        why = "probabilities are never negative: half the codes would be lost"
        _refuse("symmetric", True, f"true, but {why}: use false")


def _refuse(field: str, value: object, sentence: str) -> None:
    raise TensorRuleError(field, value, sentence)
