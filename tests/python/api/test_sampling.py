"""Sampling options: defined once, checked when they are made."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, get_type_hints

import numpy as np
import pytest

from nybble import SamplingOptions
from nybble.sampling import SamplingOverrides, choice_seed, merge


def test_type_checkers_know_every_option_with_its_type() -> None:
    options = {field.name: get_type_hints(SamplingOptions)[field.name] for field in dataclasses.fields(SamplingOptions)}
    assert get_type_hints(SamplingOverrides) == options


def test_every_option_has_a_help() -> None:
    for field in dataclasses.fields(SamplingOptions):
        assert field.metadata["help"].endswith("."), field.name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "warm"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 2),
        ("typical_p", 0.0),
        ("repetition_penalty", 0),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1.5: 1.0}),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {3: math.inf}),
        ("seed", -1),
        ("seed", 2**64),
        ("max_tokens", -1),
        ("max_tokens", 2.5),
        ("stop", ""),
        ("stop", ["end", ""]),
        ("stop", [7]),
        ("logprobs", -1),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: found .*, expected "):
        SamplingOptions(**{name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1},
        {"logit_bias": {0: -math.inf, 7: 2}},
        {"seed": 2**64 - 1, "max_tokens": None, "logprobs": 0},
        {"temperature": np.float32(0.5), "top_k": np.int64(3), "seed": np.uint64(7)},
    ],
)
def test_values_at_the_limits_are_accepted(values: dict[str, Any]) -> None:
    options = SamplingOptions(**values)
    assert all(getattr(options, name) == value for name, value in values.items())


def test_one_stop_string_is_a_list_of_one_and_none_is_an_empty_list() -> None:
    assert SamplingOptions(stop="end").stop == ("end",)
    assert SamplingOptions(stop=None).stop == SamplingOptions().stop == ()
    assert SamplingOptions(stop=["a", "b"]).stop == ("a", "b")


def test_overrides_replace_single_options() -> None:
    base = SamplingOptions(temperature=0.1, top_k=3)
    assert merge(base, {"top_k": 5}) == SamplingOptions(temperature=0.1, top_k=5)
    assert merge(None, {"seed": 1}) == SamplingOptions(seed=1)
    assert merge(base, {}) is base


def test_an_override_is_checked_like_an_option() -> None:
    with pytest.raises(ValueError, match="top_p: found 7"):
        merge(None, {"top_p": 7})


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"no such option: temprature \(options: temperature, top_k"):
        merge(None, {"temprature": 1})  # type: ignore[typeddict-unknown-key]


def test_options_are_immutable() -> None:
    options = SamplingOptions()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.temperature = 0.0  # type: ignore[misc]


def test_seeds_of_several_choices_are_far_apart() -> None:
    seeds = [[choice_seed(seed, index) for index in range(16)] for seed in (0, 1, 2, 2**64 - 1, -1)]
    # The first choice keeps the seed, so that its text does not depend on the number of choices.
    assert [row[0] for row in seeds] == [0, 1, 2, 2**64 - 1, 2**64 - 1]
    distinct = {seed for row in seeds[:4] for seed in row}
    assert len(distinct) == 4 * 16
    assert all(0 <= seed < 2**64 for seed in distinct)
    later = sorted(seed for row in seeds[:4] for seed in row[1:])
    assert min(b - a for a, b in itertools.pairwise(later)) > 2**40
