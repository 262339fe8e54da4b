"""The tokenizer: CLIP's byte-level pair encoding, trained until each of our words is one token."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from training.captions import words
from training.networks import TOKENS

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_pair_merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Merges, in order, that turn each word into one token.

    Always the commonest pair first, over all words at once: encoding replays the merges in the same order, so what
    trained a word to one token also encodes it as one. (A chain of merges per word would not: chains cut into others.)
    """
    spellings = [[*word[:-1], f"{word[-1]}</w>"] for word in vocabulary]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for symbols in spellings for pair in pairwise(symbols)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spellings = [_merge(symbols, best) for symbols in spellings]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def new_tokenizer() -> CLIPTokenizer:
    """The tokenizer of models/shapes: 512 byte symbols, so that any text has tokens, then our words."""
    merges = byte_pair_merges(words())
    characters = list(bytes_to_unicode().values())
    symbols = [*characters, *(f"{c}</w>" for c in characters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)
