"""docs/formats.md: every worked example is computed again, and every format has one."""

import pathlib
import re

import pytest
import torch

from quantize.codecs.k_quants.codec import FORMS
from quantize.codecs.packing import unpack
from quantize.codecs.q8_0 import encode_flat
from quantize.codecs.registry import codec_of
from quantize.spec.formats import formats
from quantize.spec.quant_spec import QuantSpec, spec_of

TEXT = (pathlib.Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
LINE = re.compile(r"^([\w ]+): scale ([\d.]+); codes ([\d ]+); values ([\d. ]+)$", re.MULTILINE)
EXAMPLES = LINE.findall(TEXT)
NUMBERS = [2.1, 3.1, 2.5, 3.7, 3.3]


def spec_of_label(label):
    if label.startswith("int"):
        _, bits, *rule = label.split()
        return QuantSpec(bits=int(bits), symmetric=rule == ["absmax"])
    return spec_of(label)


@pytest.mark.parametrize(("label", "scale", "codes", "values"), EXAMPLES, ids=[e[0] for e in EXAMPLES])
def test_a_worked_example_is_what_the_code_computes(label, scale, codes, values):
    spec = spec_of_label(label)
    x = torch.zeros(1, spec.group_size or len(NUMBERS))
    x[0, :5] = torch.tensor(NUMBERS)
    codec = codec_of(spec)
    stored = codec.encode(x, spec)
    packed = stored["codes"].view(torch.uint8)
    assert unpack(packed, spec.bits, x.shape[1])[0, :5].tolist() == [int(c) for c in codes.split()]
    assert float(stored["scale"].flatten()[0]) == pytest.approx(float(scale), rel=1e-6)
    decoded = codec.decode(stored, spec, x.shape)[0, :5].tolist()
    assert decoded == pytest.approx([float(v) for v in values.split()], abs=5.01e-5)


def test_every_format_has_an_example():
    assert {label.split()[0] for label, *_ in EXAMPLES} == set(formats()) - {"llm_int8", "trellis", *FORMS}


def test_the_examples_in_the_text_hold_too():
    x = torch.tensor([[2.1, 3.1, -8.5, 3.7, 3.3]])
    spec = spec_of("llm_int8", activation=True)
    parts = codec_of(spec).encode(x, spec)
    assert parts["columns"].tolist() == [2]
    assert parts["codes"][0, [0, 1, 3, 4]].tolist() == [72, 106, 127, 113]
    assert "the absmax codes 72, 106, 127, 113" in TEXT.replace("\n", " ")
    assert encode_flat(torch.tensor([3.0, 5.0, 2.0, 4.0]), 2)[0].tolist() == [76, 127, 64, 127]
    assert "76, 127, 64, 127" in TEXT
    assert round(127 * 2.1) == 267
