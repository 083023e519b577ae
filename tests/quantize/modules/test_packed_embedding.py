"""An embedding held as codes: what is looked up is what the whole weight decoded has there, whatever the format."""

import pytest
import torch
from torch import nn

from quantize.codecs.registry import codec_of
from quantize.modules.packed_embedding import packed_embedding, plain_embedding
from quantize.spec.quant_spec import QuantSpec, spec_of

FORMATS = [
    QuantSpec(bits=3, granularity="group", group_size=16, symmetric=False),
    QuantSpec(bits=6, symmetric=False, scales="float16_min"),
    QuantSpec(bits=8, granularity="tensor", symmetric=False),
    QuantSpec(bits=5),
    *(spec_of(name) for name in ("nvfp4", "mxfp4", "mxfp8", "fp8_e4m3", "q8_0_gguf", "q4_k", "q6_k")),
    *(spec_of(name, group_size=16) for name in ("nf4", "fp4", "q8_0")),
]


class Scaled(nn.Embedding):
    """Does something beside the lookup."""

    def forward(self, input):
        return super().forward(input) * 3


@pytest.mark.parametrize("spec", FORMATS, ids=lambda s: f"{s.format}{s.bits}-{s.granularity}")
def test_rows_that_are_looked_up_are_those_of_the_whole_weight_decoded(spec):
    module = Scaled(21, 64)
    packed = packed_embedding(module, spec)
    packed.store(module.weight)
    ids = torch.tensor([[0, 20, 7], [7, 7, 1]])
    expected = codec_of(spec).fake_weight(module.weight.detach(), spec)[ids] * 3
    assert torch.equal(packed(ids), expected) and packed(ids[:, :0]).shape == (2, 0, 64)
    half = packed.half()
    assert half(ids).dtype == half.weight.dtype == torch.float16
    assert {name: t.dtype for name, t in half.stored.items()} == {name: t.dtype for name, t in packed.stored.items()}
    plain = plain_embedding(packed, nn.Parameter(packed.dequantized()))
    assert type(plain) is Scaled and torch.equal(plain(ids), expected) and list(plain.state_dict()) == ["weight"]


def test_formats_whose_rows_are_not_stored_by_themselves_are_refused():
    for spec in (spec_of("nf4", double_quant=True), spec_of("q8_0", group_size=48)):
        with pytest.raises(ValueError, match="row"):
            packed_embedding(nn.Embedding(960, 64), spec)
