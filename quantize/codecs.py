"""The codec of every format by its name: what weights and activations are dispatched by."""

from quantize.codebook import FP4, NF4
from quantize.codec import Codec
from quantize.formats import INTEGER
from quantize.fp8 import FP8_E4M3, FP8_E5M2
from quantize.integers import INTEGERS
from quantize.llm_int8 import MIXED_INT8
from quantize.mx import MXFP4, MXFP8_E4M3, MXFP8_E5M2
from quantize.nvfp4 import NVFP4
from quantize.q8_0 import Q8_0, Q8_0_GGUF
from quantize.spec import QuantSpec

CODECS: dict[str, Codec] = {
    INTEGER: INTEGERS,
    "nf4": NF4,
    "fp4": FP4,
    "fp8_e4m3": FP8_E4M3,
    "fp8_e5m2": FP8_E5M2,
    "mxfp4": MXFP4,
    "mxfp8": MXFP8_E4M3,
    "mxfp8_e5m2": MXFP8_E5M2,
    "nvfp4": NVFP4,
    "q8_0": Q8_0,
    "q8_0_gguf": Q8_0_GGUF,
    "llm_int8": MIXED_INT8,
}


def codec_of(spec: QuantSpec) -> Codec:
    """Returns the codec of the format that `spec` names."""
    return CODECS[spec.format]
