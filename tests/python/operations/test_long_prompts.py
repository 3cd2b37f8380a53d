"""The bound on the number of tokens of a long text never exceeds their number."""

from __future__ import annotations

import pytest

from nybble import Model


@pytest.mark.parametrize("unit", ["x", " ", "\u00e9", "<|im_end|>", "Hello, world. ", "\U0001f600"])
def test_the_fewest_tokens_are_never_more_than_the_tokens(unit: str, tiny_model: Model, default_model: Model) -> None:
    text = unit * (120_000 // len(unit))
    for model in (tiny_model, default_model):
        tokenizer = model.tokenizer
        assert 0 < tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_special=False))
        assert tokenizer.fewest_tokens("short") == 0
