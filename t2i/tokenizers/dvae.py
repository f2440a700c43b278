"""DALL-E's discrete VAE: the encoder says logits of codes, the decoder distributions of pixels (arXiv 2102.12092).

Shapes: B rows, K codes, h by w grid. The loss is `likelihood`'s, and codes in training are a relaxation (`gumbel`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from t2i.nn.weights import begins, constant, normal
from t2i.pixels import patches
from t2i.tokenizers import likelihood
from t2i.tokenizers.autoencoder import Autoencoder
from t2i.tokenizers.gumbel import GumbelConfig
from t2i.tokenizers.quantizers import QuantizerConfig


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """The defaults are the published one.

    The paper's loss is logit_laplace alone, and kl, whose weight `GumbelConfig` tells.
    """

    channels: int = 256
    multipliers: tuple[int, ...] = (1, 2, 4, 8)  # of each level; every level but the last halves the picture
    blocks: int = 2  # residual blocks a level
    quantizer: QuantizerConfig = field(default_factory=GumbelConfig)

    def __post_init__(self) -> None:
        if not self.multipliers or min(*self.multipliers, self.blocks, self.channels) < 1 or self.channels % 4:
            raise ValueError("A dVAE needs at least one level, blocks of at least 1, and channels that 4 divides.")

    def build(self) -> "DVAE":
        """The tokenizer, with fresh weights."""
        return DVAE(self)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Codes (h, w) of images of `size` (height, width); ValueError where it does not divide."""
        return patches(size, 2 ** (len(self.multipliers) - 1))


def dalle_dvae() -> DVAEConfig:
    """DALL-E's dVAE f8 with 8,192 codes: 97,616,006 parameters.

    arXiv 2102.12092; its sizes are those of its authors' code, openai/DALL-E.
    """
    return DVAEConfig()


class DVAE(Autoencoder):
    """Images (B, 3, H, W) in [-1, 1] to codes (B, H / f, W / f) and back, f = 2 ** (levels - 1)."""

    logits = True

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.quantizer = config.quantizer.build()
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    @property
    def last_layer(self) -> torch.Tensor:
        """Of mu and ln b."""
        return self.decoder.to_pixels.weight

    def hidden(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of codes (B, K, h, w), or what another quantizer takes."""
        return self.encoder(likelihood.squeezed(images))

    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        """mu and ln b (B, 6, H, W) from code vectors."""
        return self.decoder(vectors)

    def pictures(self, output: torch.Tensor) -> torch.Tensor:
        """Images of what `reconstruct` returned, not clamped."""
        return likelihood.pictures(output)


class Encoder(nn.Module):
    """Levels of blocks with the largest of 2x2 between them: (B, 3, H, W) to (B, K, h, w)."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        widths = [config.channels, *(config.channels * multiplier for multiplier in config.multipliers)]
        self.from_pixels = convolution(3, config.channels, 7)
        self.levels = levels(widths, config.blocks, kernels=(3, 3, 3, 1))
        self.to_codes = convolution(widths[-1], config.quantizer.takes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.from_pixels(images)
        for number, level in enumerate(self.levels):
            x = level(x if number == 0 else functional.max_pool2d(x, 2))
        return self.to_codes(x.relu())


class Decoder(nn.Module):
    """The encoder's levels in turn, each position four times between them: (B, D, h, w) to (B, 6, H, W).

    In the authors' code it begins with a convolution of one-hot codes. Its weight is the quantizer's vectors.
    """

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        widths = [
            config.quantizer.width,
            *(config.channels * multiplier for multiplier in reversed(config.multipliers)),
        ]
        self.bias = nn.Parameter(torch.zeros(config.quantizer.width))
        begins(self, bias=constant(0.0))
        self.levels = levels(widths, config.blocks, kernels=(1, 3, 3, 3))
        self.to_pixels = convolution(widths[-1], 6, 1)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        x = vectors + self.bias[:, None, None]
        for number, level in enumerate(self.levels):
            x = level(x if number == 0 else functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.to_pixels(x.relu())


def levels(widths: Sequence[int], blocks: int, kernels: Sequence[int]) -> nn.ModuleList:
    """So many blocks from each width to the next."""
    depth = blocks * (len(widths) - 1)
    return nn.ModuleList(
        nn.Sequential(*(Block(*each, kernels, depth) for each in pairwise([before] + [after] * blocks)))
        for before, after in pairwise(widths)
    )


class Block(nn.Module):
    """Four times ReLU and a convolution, a quarter as wide within, which counts 1 / `depth`^2 beside the input."""

    def __init__(self, before: int, after: int, kernels: Sequence[int], depth: int) -> None:
        super().__init__()
        widths = [before, *[after // 4] * (len(kernels) - 1), after]
        self._gain = 1 / depth**2
        self.convs = nn.ModuleList(
            convolution(*each, kernel) for each, kernel in zip(pairwise(widths), kernels, strict=True)
        )
        self.shortcut = convolution(before, after, 1) if before != after else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        new = x
        for conv in self.convs:
            new = conv(new.relu())
        return (x if self.shortcut is None else self.shortcut(x)) + self._gain * new


def convolution(before: int, after: int, kernel: int) -> nn.Conv2d:
    """One that keeps the size, and begins as N(0, 1 / fan in), without bias."""
    layer = nn.Conv2d(before, after, kernel, padding=kernel // 2)
    return begins(layer, weight=normal((before * kernel**2) ** -0.5), bias=constant(0.0))
