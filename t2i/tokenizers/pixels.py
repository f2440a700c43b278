"""Pixels as they are: the tokenizer of priors that draw pictures without one. It has no weights."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from t2i.protocol import Space


@dataclass(frozen=True, kw_only=True)
class PixelsConfig:
    """Pictures of any size, resized to `size` (height, width)."""

    size: tuple[int, int]

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"A picture has at least a pixel a side, but size is {self.size}.")

    def build(self) -> "Pixels":
        """The tokenizer."""
        return Pixels(self)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Its own size; ValueError where pictures of `size` (height, width) have other proportions."""
        if size[0] * self.size[1] != size[1] * self.size[0]:
            raise ValueError(
                f"Pictures of {size[0]}x{size[1]} have other proportions than {self.size[0]}x{self.size[1]} pixels: "
                "give a size that they come to without being stretched."
            )
        return self.size


class Pixels(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to values (B, 3, h, w) in [-1, 1], and the same back."""

    decodes = True
    learns = False  # there is nothing to train

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__()
        self.config = config

    def space(self, size: tuple[int, int]) -> Space:
        """(3, h, w) of images of `size` (height, width); ValueError where these have other proportions."""
        return Space((3, *self.config.grid(size)), bound=1.0)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The images at the config's size, as a feed resizes them, but for the rounding."""
        if tuple(images.shape[-2:]) == self.config.size:
            return images
        resized = functional.interpolate(images, self.config.size, mode="bicubic", antialias=True)
        return resized.clamp(-1, 1)

    def decode(self, values: torch.Tensor) -> torch.Tensor:
        """The values, clamped to [-1, 1]."""
        return values.clamp(-1, 1)
