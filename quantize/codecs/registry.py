"""The codec of every format by its name: what weights and activations are dispatched by.

A format is one module of this package that calls `quantize.codecs.base.register` with its facts and its codec. Name and facts are
written out there: `ptq list` reads them in the source (`ptq.cli.reference`), because the module itself needs torch.
"""

import importlib
import pkgutil

import quantize.codecs
from quantize.codecs.base import Codec, registered_codec
from quantize.spec.quant_spec import QuantSpec

for _module in pkgutil.iter_modules(quantize.codecs.__path__):
    if _module.name != "registry":
        importlib.import_module(f"quantize.codecs.{_module.name}")


def codec_of(spec: QuantSpec) -> Codec:
    """Returns the codec of the format that `spec` names."""
    return registered_codec(spec.format)
