"""Small checkpoints with random weights, made with the classes that real ones are made of."""

from tests.checkpoints.autoencoders import make_tiny, make_vae
from tests.checkpoints.sd import save_sd_checkpoint
from tests.checkpoints.text import TOKENS, make_clip, make_t5, make_t5_tokenizer, make_tokenizer

__all__ = [
    "TOKENS",
    "make_clip",
    "make_t5",
    "make_t5_tokenizer",
    "make_tiny",
    "make_tokenizer",
    "make_vae",
    "save_sd_checkpoint",
]
