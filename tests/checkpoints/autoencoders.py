"""Autoencoders of pictures that are four times as large as their latents."""

from __future__ import annotations

from diffusers import AutoencoderKL, AutoencoderTiny

FACTOR = 4


def make_vae(channels: int = 4, *, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.7,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
        mid_block_add_attention=False,
    )


def make_tiny(channels: int = 4) -> AutoencoderTiny:
    return AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        upsampling_scaling_factor=2,
    )
