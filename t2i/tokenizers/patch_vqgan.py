"""A VQGAN without a pyramid: patches are folded into channels at once, and all blocks work on the grid of codes.

Cheap where pictures are simple: every convolution runs on H / f by W / f positions.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from t2i.nn.weights import begins, constant
from t2i.pixels import patches
from t2i.tokenizers.autoencoder import Autoencoder
from t2i.tokenizers.finite_scalar import FiniteScalarConfig
from t2i.tokenizers.quantizers import QuantizerConfig


@dataclass(frozen=True, kw_only=True)
class PatchVQGANConfig:
    """Sizes; `patch` is f, the pixels a side that one code stands for."""

    patch: int = 4
    channels: int = 96
    encoder_blocks: int = 1
    decoder_blocks: int = 2
    groups: int = 8
    # Patches a side that a convolution of the encoder sees. With 1, and no blocks, whose norms see all of a picture, a
    # code says what its own patch shows and nothing else: fewer codes, and a prior has far less to learn.
    encoder_kernel: int = field(default=3, metadata={"since": "0.2"})  # as infra.config.setting marks it
    quantizer: QuantizerConfig = field(default_factory=FiniteScalarConfig)

    def __post_init__(self) -> None:
        if min(self.patch, self.channels, self.groups) < 1 or self.channels % self.groups:
            raise ValueError("PatchVQGAN needs a patch of at least 1 pixel, and channels that its norm groups divide.")
        if self.encoder_kernel < 1 or self.encoder_kernel % 2 == 0:
            raise ValueError(f"encoder_kernel has a middle: 1, 3, 5, but it is {self.encoder_kernel}.")

    def build(self) -> "PatchVQGAN":
        """The tokenizer, with fresh weights."""
        return PatchVQGAN(self)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Codes (h, w) of images of `size` (height, width); ValueError where it does not divide."""
        return patches(size, self.patch)


def patch_vqgan_shapes() -> PatchVQGANConfig:
    """Shapes at 32 pixels, a code for 8x8 of them, as the recipe `demo` has it: 1,115,716 parameters.

    Chosen here; no paper has it.
    """
    return PatchVQGANConfig(
        patch=8,
        channels=192,
        encoder_kernel=1,
        encoder_blocks=0,
        quantizer=FiniteScalarConfig(levels=(8, 8, 8, 5)),
    )


class PatchVQGAN(Autoencoder):
    """Images (B, 3, H, W) in [-1, 1] to codes (B, H / f, W / f) and back."""

    def __init__(self, config: PatchVQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.quantizer = config.quantizer.build()
        channels, width, pixels = config.channels, config.quantizer.width, 3 * config.patch**2
        self.encoder = nn.Sequential(
            nn.Conv2d(pixels, channels, config.encoder_kernel, padding=config.encoder_kernel // 2),
            *(ResidualBlock(channels, config.groups, config.encoder_kernel) for _ in range(config.encoder_blocks)),
            nn.SiLU(),
            nn.Conv2d(channels, config.quantizer.takes, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(width, channels, 3, padding=1),
            *(ResidualBlock(channels, config.groups) for _ in range(config.decoder_blocks)),
            nn.SiLU(),
        )
        self.to_pixels = nn.Conv2d(channels, pixels, 3, padding=1)

    @property
    def last_layer(self) -> torch.Tensor:
        """Of the pixels."""
        return self.to_pixels.weight

    def hidden(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder's output, (B, D, h, w) or logits."""
        return self.encoder(functional.pixel_unshuffle(images, self.config.patch))

    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        """Images from code vectors, not clamped."""
        return functional.pixel_shuffle(self.to_pixels(self.decoder(vectors)), self.config.patch)


class ResidualBlock(nn.Module):
    """Group norm, a convolution, SiLU, a 1x1 convolution that starts at zero: the block begins as the identity."""

    def __init__(self, channels: int, groups: int, kernel: int = 3) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.spatial = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.pointwise = begins(nn.Conv2d(channels, channels, 1), weight=constant(0.0), bias=constant(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.pointwise(functional.silu(self.spatial(self.norm(x))))
