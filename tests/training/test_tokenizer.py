"""Each of our words is one token, and any text has tokens."""

from __future__ import annotations

import numpy as np
import pytest

from training.captions import random_caption, words
from training.drawing import sample_scenes
from training.networks import TOKENS
from training.tokenizer import new_tokenizer

TOKENIZER = new_tokenizer()


@pytest.mark.parametrize("word", words())
def test_a_word_is_one_token(word: str) -> None:
    start, token, end = TOKENIZER(word).input_ids
    assert (start, end) == (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)
    assert TOKENIZER.decode(token).strip() == word


def test_captions_round_trip_and_fit() -> None:
    rng = np.random.default_rng(0)
    for scene in sample_scenes(200, rng):
        caption = random_caption(scene, rng)
        tokens = TOKENIZER(caption).input_ids
        assert len(tokens) == 2 + len(caption.split()) <= TOKENS
        assert TOKENIZER.decode(tokens, skip_special_tokens=True).strip() == caption


@pytest.mark.parametrize("text", ["qwertz", "ein Füßchen", "你好", "🎨 1+1", "greenish"])
def test_any_text_round_trips(text: str) -> None:
    decoded = TOKENIZER.decode(TOKENIZER(text).input_ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.lower().replace(" ", "")


def test_padding_repeats_the_end_token() -> None:
    tokens = TOKENIZER("a red circle", padding="max_length", max_length=TOKENS).input_ids
    assert tokens[4:] == [TOKENIZER.eos_token_id] * (TOKENS - 4)
