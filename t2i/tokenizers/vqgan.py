"""VQGAN: a convolutional encoder and decoder around a bottleneck (arXiv 2012.09841; 2112.10752 with a Gaussian)."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from t2i.pixels import patches
from t2i.tokenizers.autoencoder import Autoencoder
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.gaussian import GaussianConfig
from t2i.tokenizers.quantizers import QuantizerConfig


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """The defaults are the published f16-1024."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # of each level; every level but the last halves the picture
    blocks: int = 2  # residual blocks a level; the decoder has one more
    attention_levels: tuple[int, ...] = (4,)
    middle_attention: bool = True
    groups: int = 32
    latent_channels: int = 256
    quantizer: QuantizerConfig | GaussianConfig = field(default_factory=CodebookConfig)
    # 1x1 convolutions before and after the bottleneck. The autoencoders of Stable Diffusion 3 and FLUX have none.
    pointwise: bool = field(default=True, metadata={"since": "0.2"})  # as infra.config.setting marks it

    def __post_init__(self) -> None:
        if not self.multipliers or self.channels % self.groups:
            raise ValueError("VQGAN needs at least one level, and channels that its norm groups divide.")
        if not self.pointwise and (self.says, self.latent_channels) != (self.quantizer.takes, self.quantizer.width):
            raise ValueError(
                f"Without pointwise convolutions the bottleneck is as wide as latent_channels, {self.latent_channels}, "
                f"but it takes {self.quantizer.takes} channels and has {self.quantizer.width}."
            )

    @property
    def says(self) -> int:
        """Channels of the encoder's output: of a Gaussian a mean and a logarithm of a variance each."""
        return self.latent_channels * (2 if isinstance(self.quantizer, GaussianConfig) else 1)

    def build(self) -> "VQGAN":
        """The tokenizer, with fresh weights."""
        return VQGAN(self)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Codes (h, w) of images of `size` (height, width); ValueError where it does not divide."""
        return patches(size, 2 ** (len(self.multipliers) - 1))


def vqgan_f16_1024() -> VQGANConfig:
    """VQGAN f16 with 1,024 codes, of ImageNet at 256 pixels: 72,141,699 parameters.

    arXiv 2012.09841; its sizes are those of its authors' code, CompVis/taming-transformers.
    """
    return VQGANConfig()


def vqgan_f16_16384() -> VQGANConfig:
    """VQGAN f16 with 16,384 codes, of ImageNet at 256 pixels: 76,073,859 parameters.

    arXiv 2012.09841; its sizes are those of its authors' code, CompVis/taming-transformers.
    """
    return VQGANConfig(quantizer=CodebookConfig(size=16_384))


def ldm_vq_f4() -> VQGANConfig:
    """Latent diffusion's VQ-f4, of OpenImages: 55,322,782 parameters.

    arXiv 2112.10752; its sizes are those of its authors' code, CompVis/latent-diffusion.
    """
    return VQGANConfig(
        multipliers=(1, 2, 4),
        attention_levels=(),
        latent_channels=3,
        quantizer=CodebookConfig(size=8192, width=3),
    )


def ldm_vq_f8() -> VQGANConfig:
    """Latent diffusion's VQ-f8 with 16,384 codes, of OpenImages: 67,717,295 parameters.

    arXiv 2112.10752; its sizes are those of its authors' code, CompVis/latent-diffusion.
    """
    return VQGANConfig(
        multipliers=(1, 2, 2, 4),
        attention_levels=(3,),
        latent_channels=4,
        quantizer=CodebookConfig(size=16_384, width=4),
    )


def ldm_vq_f8_256() -> VQGANConfig:
    """Latent diffusion's VQ-f8 with 256 codes, of OpenImages: 67,652,783 parameters.

    arXiv 2112.10752; its sizes are those of its authors' code, CompVis/latent-diffusion.
    """
    return replace(ldm_vq_f8(), quantizer=CodebookConfig(size=256, width=4))


def ldm_vq_f16() -> VQGANConfig:
    """Latent diffusion's VQ-f16, of OpenImages: 69,593,371 parameters.

    arXiv 2112.10752; its sizes are those of its authors' code, CompVis/latent-diffusion.
    """
    return VQGANConfig(latent_channels=8, quantizer=CodebookConfig(size=16_384, width=8))


class VQGAN(Autoencoder):
    """Images (B, 3, H, W) in [-1, 1] to codes (B, H / f, W / f) and back, f = 2 ** (levels - 1); or to latents."""

    def __init__(self, config: VQGANConfig) -> None:
        from diffusers.models.autoencoders.vae import Decoder, Encoder  # slow to import, and seldom wanted

        super().__init__()
        self.config = config
        levels = range(len(config.multipliers))
        shared: Any = {
            "block_out_channels": tuple(config.channels * multiplier for multiplier in config.multipliers),
            "layers_per_block": config.blocks,
            "norm_num_groups": config.groups,
            "mid_block_add_attention": config.middle_attention,
        }
        down = tuple("AttnDownEncoderBlock2D" if i in config.attention_levels else "DownEncoderBlock2D" for i in levels)
        up = tuple(
            "AttnUpDecoderBlock2D" if i in config.attention_levels else "UpDecoderBlock2D" for i in reversed(levels)
        )
        double = config.says > config.latent_channels
        self.encoder = Encoder(3, config.latent_channels, down_block_types=down, double_z=double, **shared)
        quantizer, pointwise = config.quantizer, config.pointwise
        self.to_codes = nn.Conv2d(config.says, quantizer.takes, 1) if pointwise else nn.Identity()
        self.quantizer = quantizer.build()
        self.from_codes = nn.Conv2d(quantizer.width, config.latent_channels, 1) if pointwise else nn.Identity()
        self.decoder = Decoder(config.latent_channels, 3, up_block_types=up, **shared)

    @property
    def last_layer(self) -> torch.Tensor:
        """Of the pixels."""
        return self.decoder.conv_out.weight

    def hidden(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder's output, (B, D, h, w) or logits."""
        return self.to_codes(self.encoder(images))

    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        """Images from code vectors, not clamped."""
        return self.decoder(self.from_codes(vectors))
