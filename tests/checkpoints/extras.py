"""LoRA adapters and ControlNets for the small checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "conv1")
TRANSFORMER_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_LAYERS = ("q_proj", "v_proj")


def save_adapter(
    pipeline: Any, path: Path, *, network: str, layers: Sequence[str], rank: int = 4, text: bool = False, seed: int = 0
) -> Path:
    """As trainers save it, with random weights.

    Args:
        pipeline: of the checkpoint; its networks are changed.
        network: "unet" or "transformer".
        text: it changes the first text encoder as well.
    """
    torch.manual_seed(seed)
    saved = {f"{network}_lora_layers": _adapted(getattr(pipeline, network), layers, rank)}
    if text:
        saved["text_encoder_lora_layers"] = _adapted(pipeline.text_encoder, TEXT_LAYERS, rank)
    pipeline.save_lora_weights(path.parent, weight_name=path.name, **saved)
    return path


def save_control(unet: UNet2DConditionModel, folder: Path, *, seed: int = 0) -> Path:
    """A ControlNet for a UNet whose latents are a quarter of its pictures."""
    torch.manual_seed(seed)
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16))
    # Its outputs begin at zero, which would hide all of it.
    for weights in control.parameters():
        torch.nn.init.normal_(weights, std=0.1)
    control.save_pretrained(folder)
    return folder


def _adapted(network: Any, layers: Sequence[str], rank: int) -> dict[str, torch.Tensor]:
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False, target_modules=list(layers))
    network.add_adapter(config, adapter_name=f"made {rank}")
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(network, adapter_name=f"made {rank}")
    return {name: values.clone() for name, values in state.items()}
