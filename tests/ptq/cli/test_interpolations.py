"""What interpolations write out is reckoned before they are resolved, and never too low."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ptq.cli.compose.interpolations import check_interpolations
from ptq.errors import UserError

KEYS = "abcdef"
PARTS = st.sampled_from(
    ["x", "yyyy", *(f"${{{key}}}" for key in KEYS), *(f"${{g.{key}}}" for key in KEYS), "${oc.select:a}"]
)
TEXTS = st.dictionaries(st.sampled_from(KEYS), st.lists(PARTS, max_size=4).map("".join), max_size=6)


@given(TEXTS, TEXTS, st.integers(1, 60))
def test_a_config_that_is_let_through_writes_out_no_more_than_it_may(texts, inner, most):
    config = {**texts, "g": inner}
    try:
        check_interpolations(config, "r.yaml", most)
    except UserError as error:
        assert "write the values instead" in str(error)
        return
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    except OmegaConfBaseException:
        return
    for value in (*resolved.values(), *resolved["g"].values()):
        # A whole group in the middle of a text is written with its braces, which are not counted.
        assert "{" in str(value) or len(str(value)) <= most


@given(st.dictionaries(st.sampled_from(KEYS), st.text("xyz ", max_size=20), max_size=6))
def test_a_config_without_interpolations_is_as_large_as_its_texts(texts):
    longest = max(map(len, texts.values()), default=0)
    check_interpolations(texts, "r.yaml", max(1, longest))
    if longest > 1:
        with pytest.raises(UserError):
            check_interpolations(texts, "r.yaml", longest - 1)
