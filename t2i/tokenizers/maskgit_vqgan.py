"""MaskGIT's VQGAN: convolutions alone around a codebook, without attention, as RAR draws its codes (arXiv 2202.04200).

Shapes: B rows, D width of a code, C channels. Strides are all 1, so what TensorFlow calls "same" is a padding of 1.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from t2i.pixels import from_unit, patches, to_unit
from t2i.tokenizers.autoencoder import Autoencoder
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.quantizers import QuantizerConfig


@dataclass(frozen=True, kw_only=True)
class MaskGITVQGANConfig:
    """The defaults are the published f16-1024. A code is as wide as the encoder's output: no layer stands between."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # of each level; every level but the last halves the picture
    blocks: int = 2  # residual blocks a level, and in the middle
    groups: int = 32
    quantizer: QuantizerConfig = field(default_factory=CodebookConfig)

    def __post_init__(self) -> None:
        if not self.multipliers or min(*self.multipliers, self.blocks, self.groups, self.channels) < 1:
            raise ValueError("MaskGIT's VQGAN needs at least one level, and blocks, groups and channels of at least 1.")
        if self.channels % self.groups:
            raise ValueError(f"{self.channels} channels do not divide into {self.groups} norm groups.")

    def build(self) -> "MaskGITVQGAN":
        """The tokenizer, with fresh weights."""
        return MaskGITVQGAN(self)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Codes (h, w) of images of `size` (height, width); ValueError where it does not divide."""
        return patches(size, 2 ** (len(self.multipliers) - 1))


def maskgit_vqgan() -> MaskGITVQGANConfig:
    """MaskGIT's VQGAN f16 with 1,024 codes, of ImageNet at 256 pixels: 54,515,587 parameters.

    arXiv 2202.04200; its sizes are those of the tokenizer of RAR, bytedance/1d-tokenizer.
    """
    return MaskGITVQGANConfig()


class MaskGITVQGAN(Autoencoder):
    """Images (B, 3, H, W) in [-1, 1] to codes (B, H / f, W / f) and back, f = 2 ** (levels - 1).

    In between pixels are in [0, 1].
    """

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.quantizer = config.quantizer.build()
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    @property
    def last_layer(self) -> torch.Tensor:
        """Of the pixels."""
        return self.decoder.to_pixels.weight

    def hidden(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder's output, (B, D, h, w) or logits."""
        return self.encoder(to_unit(images))

    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        """Images from code vectors, not clamped."""
        return from_unit(self.decoder(vectors))


class Encoder(nn.Module):
    """Levels of blocks with means of 2x2 between them, then the middle: (B, 3, H, W) to (B, D, h, w)."""

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        widths = [config.channels, *(config.channels * multiplier for multiplier in config.multipliers)]
        self.from_pixels = nn.Conv2d(3, config.channels, 3, padding=1, bias=False)
        self.levels = nn.ModuleList(stack(config, before, after) for before, after in pairwise(widths))
        self.middle = stack(config, widths[-1], widths[-1])
        self.norm = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.to_codes = nn.Conv2d(widths[-1], config.quantizer.takes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.from_pixels(images)
        for number, level in enumerate(self.levels):
            x = level(x if number == 0 else functional.avg_pool2d(x, 2))
        return self.to_codes(functional.silu(self.norm(self.middle(x))))


class Decoder(nn.Module):
    """The middle, then levels from the coarsest: (B, D, h, w) to (B, 3, H, W). `levels[0]` is the finest."""

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in (*config.multipliers, config.multipliers[-1])]
        self.from_codes = nn.Conv2d(config.quantizer.width, widths[-1], 3, padding=1)
        self.middle = stack(config, widths[-1], widths[-1])
        self.levels = nn.ModuleList(stack(config, before, after) for after, before in pairwise(widths))
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for width in widths[1:-1]]
        self.upward = nn.ModuleList([nn.Identity(), *convolutions])  # the finest level goes no further up
        self.norm = nn.GroupNorm(config.groups, widths[0], eps=1e-6)
        self.to_pixels = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        x = self.middle(self.from_codes(vectors))
        for number, level in reversed([*enumerate(self.levels)]):
            x = level(x)
            x = self.upward[number](functional.interpolate(x, scale_factor=2.0, mode="nearest") if number else x)
        return self.to_pixels(functional.silu(self.norm(x)))


def stack(config: MaskGITVQGANConfig, before: int, after: int) -> nn.Sequential:
    """The residual blocks of one level, the first of which comes to its width."""
    widths = [before] + [after] * config.blocks
    return nn.Sequential(*(ResidualBlock(*each, config.groups) for each in pairwise(widths)))


class ResidualBlock(nn.Module):
    """Twice group norm, SiLU and a convolution without bias, added to the input."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, eps=1e-6)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, after, eps=1e-6)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(after, after, 1, bias=False) if before != after else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        new = self.conv1(functional.silu(self.norm1(x)))
        new = self.conv2(functional.silu(self.norm2(new)))
        # As in the authors' own code: where the width changes, what is added is of the block's output, not its input.
        return new + (x if self.shortcut is None else self.shortcut(new))
