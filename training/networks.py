"""The networks of models/shapes, untrained."""

from __future__ import annotations

from diffusers import AutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

LATENT_PX = 16
TOKENS = 32
TEXT_WIDTH = 128
UNET_CHANNELS = (64, 96, 96)
REFINER_CHANNELS = (16,)


def new_vae() -> AutoencoderKL:
    """Images [B, 3, 128, 128] to latents [B, 4, 16, 16] and back; convolutions only, so any multiple of 8 px works."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
    )


def new_tiny_vae() -> AutoencoderTiny:
    """The small decoder (and encoder) of the same latents, already scaled to unit variance."""
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16, 16),
        decoder_block_out_channels=(16, 16, 16, 16),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(2, 2, 2, 1),
        latent_channels=4,
        scaling_factor=1.0,
    )


def new_text_encoder(vocabulary_size: int, end_token: int) -> CLIPTextModel:
    """Tokens [B, 32] to embeddings [B, 32, 128]."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=end_token - 1,
            eos_token_id=end_token,
            pad_token_id=end_token,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """Latents [B, 4, 16, 16], timestep = 1000 sigma [B] and embeddings [B, 32, 128] to velocity = noise - data.

    Attention only at 8 x 8 and 4 x 4: the 16 x 16 level is convolutions, which halves the time of a step.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_PX,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=UNET_CHANNELS,
        layers_per_block=1,
        attention_head_dim=4,  # in SD-1.5's configuration this is the number of heads
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
    )


def new_refiner(*, max_step: float, channels: tuple[int, ...] = REFINER_CHANNELS) -> UNet2DConditionModel:
    """Latents and the last velocity [B, 8, 16, 16], timestep and embeddings to the change of velocity; 0 untrained.

    Without attention: what the caption asks for is in the last velocity already.

    Args:
        max_step: the longest step of sigma that it is trained for; kept in its config.
    """
    levels = len(channels)
    refiner = UNet2DConditionModel(
        sample_size=LATENT_PX,
        in_channels=8,
        out_channels=4,
        down_block_types=("DownBlock2D",) * levels,
        mid_block_type=None,
        up_block_types=("UpBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
    )
    refiner.register_to_config(max_step=max_step)
    nn.init.zeros_(refiner.conv_out.weight)
    nn.init.zeros_(refiner.conv_out.bias)
    return refiner


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
