"""What a cache's options may be together is said by name before any work."""

import pytest

from ptq.config.building import recipe_from
from ptq.errors import UserError

CHANNEL = {"bits": 2, "granularity": "channel", "symmetric": False, "dynamic": True}
TOKEN = {"bits": 2, "granularity": "token", "symmetric": False, "dynamic": True}
CACHE = {"window": 8, "first": 2, "tokens": 4}


def made(length=64, **scheme):
    return recipe_from({"name": "x", "model": {"path": "x"}, "evaluation": {"length": length}, "scheme": scheme})


def refused(*words, length=64, **scheme):
    with pytest.raises(UserError) as error:
        made(length, **scheme)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_keys_by_channel_and_values_by_token_are_a_cache():
    assert made(key=CHANNEL, value=TOKEN, cache=CACHE).scheme.cache.tokens == 4


@pytest.mark.parametrize("cache", [None, {"window": 8}])
def test_a_dynamic_channel_needs_tokens_that_share_a_scale(cache):
    refused("scheme.key.granularity: 'channel'", "scheme.cache.tokens=32", key=CHANNEL, cache=cache)


@pytest.mark.parametrize("tensor", ["query", "input"])
def test_only_what_a_cache_holds_has_dynamic_channels(tensor):
    refused(f"scheme.{tensor}.dynamic: true with granularity 'channel'", cache=CACHE, **{tensor: CHANNEL})


@pytest.mark.parametrize(
    ("field", "value", "use"),
    [("symmetric", True, "use false"), ("format", "fp8_e4m3", "use int"), ("range", "percentile", "minmax and mse")],
)
def test_what_a_cache_cannot_store_is_refused_with_what_it_can(field, value, use):
    spec = {**TOKEN, field: value}
    spec = {**spec, "bits": 8, "symmetric": True} if field == "format" else spec
    refused(f"scheme.value.{field}", use, value=spec, cache={"window": 4})
    if field != "range":
        made(value=spec)


def test_static_ranges_are_refused_with_a_cache():
    refused("scheme.key.dynamic: False", "use true", key={**CHANNEL, "dynamic": False}, cache={"window": 4})


def test_options_without_effect_are_refused():
    refused("scheme.cache: set, but key and value are null", cache=CACHE)
    refused("scheme.cache.tokens: 4, but neither", value=TOKEN, cache=CACHE)
    refused("scheme.cache.before_rope: true, but key is null", value=TOKEN, cache={"before_rope": True})


@pytest.mark.parametrize(("name", "value"), [("window", -1), ("first", -1), ("tokens", 1)])
def test_numbers_that_mean_nothing_are_refused(name, value):
    refused(f"scheme.cache.{name}: {value} is too small", key=CHANNEL, value=TOKEN, cache={**CACHE, name: value})


def test_a_window_that_leaves_nothing_to_round_is_refused_and_one_token_fewer_is_not():
    refused(
        "scheme.cache.window: 59 recent and 2 first", "evaluation.length=64", key=CHANNEL, cache={**CACHE, "window": 59}
    )
    assert made(key=CHANNEL, cache={**CACHE, "window": 58}).scheme.cache.window == 58


def test_specs_of_single_modules_are_held_to_the_same():
    override = {"modules": "*.1.*", "tensors": {"key": {**TOKEN, "symmetric": True}}}
    refused("scheme.overrides[0].tensors.key.symmetric", value=TOKEN, cache={"window": 4}, overrides=[override])
