"""VQ-VAE: strided convolutions and residual blocks around a codebook (arXiv 1711.00937)."""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from t2i.pixels import patches
from t2i.tokenizers.autoencoder import Autoencoder
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.quantizers import QuantizerConfig


def _codebook() -> CodebookConfig:
    return CodebookConfig(size=512, width=64)


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """The defaults are section 4.1's, of ImageNet at 128 pixels."""

    channels: int = 256
    levels: int = 2  # convolutions that halve the picture
    blocks: int = 2  # residual ones, on the grid of codes
    quantizer: QuantizerConfig = field(default_factory=_codebook)

    def __post_init__(self) -> None:
        if min(self.channels, self.levels) < 1 or self.blocks < 0:
            raise ValueError("VQ-VAE needs channels and levels of at least 1, and no negative number of blocks.")

    def build(self) -> "VQVAE":
        """The tokenizer, with fresh weights."""
        return VQVAE(self)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Codes (h, w) of images of `size` (height, width); ValueError where it does not divide."""
        return patches(size, 2**self.levels)


def vq_vae_imagenet() -> VQVAEConfig:
    """VQ-VAE of ImageNet at 128 pixels, 32x32 of 512 codes: 4,811,843 parameters.

    arXiv 1711.00937, section 4.1. It is silent on the width of a code, which is 64 in the example of its authors'
    library, google-deepmind/sonnet, and on what leads to it and from it: 1x1 convolutions here. The encoder has
    12,544 + 1,048,832 parameters in strided convolutions, 2 x 655,872 in blocks and 16,448 in the one to codes, the
    codebook 32,768, the decoder 16,640, 2 x 655,872, and 1,048,832 + 12,291.
    """
    return VQVAEConfig()


class VQVAE(Autoencoder):
    """Images (B, 3, H, W) in [-1, 1] to codes (B, H / f, W / f) and back, f = 2 ** levels."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        channels, ends = config.channels, [3, *[config.channels] * config.levels]
        down, up = [], []
        for wide, narrow in zip(ends[1:], ends, strict=False):
            down += [nn.Conv2d(narrow, wide, 4, 2, 1), nn.ReLU()]
            up = [nn.ReLU(), nn.ConvTranspose2d(wide, narrow, 4, 2, 1), *up]
        self.encoder = nn.Sequential(*down[:-1], *(ResidualBlock(channels) for _ in range(config.blocks)), nn.ReLU())
        self.to_codes = nn.Conv2d(channels, config.quantizer.takes, 1)
        self.quantizer = config.quantizer.build()
        self.from_codes = nn.Conv2d(config.quantizer.width, channels, 1)
        self.decoder = nn.Sequential(*(ResidualBlock(channels) for _ in range(config.blocks)), *up)

    @property
    def last_layer(self) -> torch.Tensor:
        """Of the pixels."""
        return self.decoder[-1].weight  # type: ignore[return-value]

    def hidden(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder's output, (B, D, h, w) or logits."""
        return self.to_codes(self.encoder(images))

    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        """Images from code vectors, not clamped."""
        return self.decoder(self.from_codes(vectors))


class ResidualBlock(nn.Module):
    """ReLU, a 3x3 convolution, ReLU, a 1x1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1)
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.pointwise(functional.relu(self.spatial(functional.relu(x))))
