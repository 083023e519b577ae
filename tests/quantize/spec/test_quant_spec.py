"""`QuantSpec`: what a format does not allow is refused with the nearest choice."""

import pytest

from quantize.spec.formats import formats
from quantize.spec.quant_spec import QuantSpec, SpecError, spec_of
from quantize.spec.rules import check_tensor

NF4 = {"format": "nf4", "bits": 4, "granularity": "group", "group_size": 64}
MX = {"format": "mxfp4", "bits": 4, "granularity": "group", "group_size": 32}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "nf5"}, "format: 'nf5' is not valid: expected one of int, fp4"),
        ({**NF4, "bits": 8}, "bits: 8 is not valid: expected 4 with format nf4"),
        ({**NF4, "granularity": "channel", "group_size": None}, "granularity: 'channel' .* group with format nf4"),
        ({**NF4, "symmetric": False}, "symmetric: False .* true with format nf4: only int has zero points"),
        ({**NF4, "range": "mse"}, "range: 'mse' .* minmax with format nf4"),
        ({**MX, "group_size": 64}, "group_size: 64 is not valid: expected 32 with format mxfp4"),
        ({**MX, "double_quant": True}, "double_quant: True .* false with format mxfp4: fp4 and nf4 have it"),
        ({"format": "fp8_e4m3", "bits": 4}, "bits: 4 is not valid: expected 8 with format fp8_e4m3"),
        (
            {"format": "fp8_e5m2", "granularity": "cluster"},
            "granularity: 'cluster' .* channel or tensor or token or group",
        ),
        ({"threshold": 5.0}, "threshold: 5.0 .* 6.0 with format int: only llm_int8 reads it"),
        ({"format": "llm_int8", "granularity": "token", "threshold": 0.0}, "threshold: 0.0 .* a number above 0"),
    ],
)
def test_a_field_that_the_format_does_not_allow_is_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        QuantSpec(**fields)


@pytest.mark.parametrize("name", formats())
def test_every_format_has_a_usual_spec_where_it_can_stand(name):
    form = formats()[name]
    for activation, able in ((False, form.weight), (True, form.activation)):
        spec = spec_of(name, activation)
        assert (spec.format, spec.bits, spec.dynamic) == (name, form.bits[0], activation)
        check = spec.check_activation if activation else spec.check_weight
        if able:
            check()
        else:
            with pytest.raises(SpecError, match=f"^format: '{name}' is not valid: expected {form.instead}"):
                check()


def test_an_activation_in_a_float_format_has_one_static_scale_or_dynamic_ones_and_none_a_channel():
    QuantSpec(format="fp8_e4m3", granularity="tensor").check_activation()
    with pytest.raises(SpecError, match="granularity: 'token' .* tensor with format fp8_e4m3 and dynamic false"):
        QuantSpec(format="fp8_e4m3", granularity="token").check_activation()
    with pytest.raises(SpecError, match="dynamic: False .* true with format mxfp8"):
        QuantSpec(format="mxfp8", granularity="group", group_size=32).check_activation()
    spec_of("nvfp4", activation=True, dynamic=False).check_activation()
    for tensor in ("query", "key", "value"):
        with pytest.raises(SpecError, match="'nvfp4': what a Linear reads alone has it: use dynamic true"):
            check_tensor(tensor, spec_of("nvfp4", activation=True, dynamic=False))
    with pytest.raises(SpecError, match="granularity: 'channel' .* token or tensor"):
        QuantSpec(format="fp8_e4m3", granularity="channel", dynamic=True).check_activation()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scales": "power_of_two"}, "float32 or float16 or float16_min with format int"),
        ({"format": "nvfp4", "bits": 4, "granularity": "group", "group_size": 16, "scales": "float16"}, "float32 or power_of_two with format nvfp4"),
        ({"format": "fp8_e4m3", "scales": "power_of_two"}, "float32 with format fp8_e4m3: it has its own type of scales"),
    ],
)  # fmt: skip
def test_a_format_has_the_types_of_scales_that_it_has(fields, words):
    with pytest.raises(SpecError, match="^scales: ") as error:
        QuantSpec(**fields)
    assert words in str(error.value)
    assert spec_of("nvfp4", scales="power_of_two").scales == "power_of_two"


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(SpecError, match="one of int, fp4"):
        spec_of("nf3")
