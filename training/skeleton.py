"""Phase `skeleton`: what needs no training, and random weights for each part that is still missing."""

from __future__ import annotations

import json

import torch

from training.networks import new_scheduler, new_text_encoder, new_tiny_vae, new_unet, new_vae
from training.parts import MODEL_DIR, half_copy, write_part
from training.tokenizer import new_tokenizer

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def run() -> None:
    """Writes model_index.json, scheduler and tokenizer, and random weights where a part is missing."""
    torch.manual_seed(0)
    MODEL_DIR.mkdir(parents=True, exist_ok=True)
    (MODEL_DIR / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
    tokenizer = new_tokenizer()
    write_part(new_scheduler(), "scheduler")
    write_part(tokenizer, "tokenizer")
    modules = {
        "text_encoder": lambda: new_text_encoder(len(tokenizer), tokenizer.eos_token_id),
        "unet": new_unet,
        "unet_base": new_unet,
        "vae": new_vae,
        "tiny_vae": new_tiny_vae,
    }
    for name, make in modules.items():
        if not (MODEL_DIR / name).exists():
            write_part(half_copy(make()), name)
