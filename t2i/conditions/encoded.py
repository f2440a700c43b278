"""A picture by an encoder that learns with the prior, as Wuerstchen does (arXiv 2306.00637): its values are a space.

Another prior draws in that space. In training the encoder sees pixels; when pictures are drawn, its values come from
such a prior, or from `t2i.tokenizers.from_condition` of a picture that there is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from t2i.pixels import resized, stacked
from t2i.protocol import Batch, Draw, Space, Told


@dataclass(frozen=True)
class EncodedRows:
    """Pictures (B, 3, h, w) uint8 of a size under `<name>_pixels`."""

    name: str
    size: tuple[int, int]

    def __call__(self, rows: Mapping[str, list], draw: Draw | None) -> dict[str, np.ndarray]:
        return {f"{self.name}_pixels": stacked([resized(each, self.size) for each in rows["pixels"]])}


class Encoded(nn.Module):
    """Values of an encoder: as planes, where they have rows and columns, else as a vector. The null is zeros.

    `encoder` maps pictures (B, 3, *size) in [-1, 1] to values (B, *values.shape); it stands in this module and learns
    with the prior, whose rows and columns are those of `space`.
    """

    length = 0

    def __init__(
        self, name: str, encoder: nn.Module, size: tuple[int, int], values: Space, width: int, space: Space
    ) -> None:
        super().__init__()
        self.name, self.encoder, self.values = name, encoder, values
        self._seen = size
        self._planes = len(values.shape) == 3
        self.channels = values.shape[0] if self._planes else 0
        self.says = frozenset({"planes" if self._planes else "vector"})
        self._size = (space.shape[-2], space.shape[-1]) if self._planes else (1, 1)
        self.project = None if self._planes else nn.Linear(values.places, width)

    def load(self, folder: str) -> None:
        """It keeps nothing but its weights."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Values of pictures in [-1, 1] of any size."""
        if images.shape[-2:] != self._seen:
            images = functional.interpolate(images, self._seen, mode="bicubic", antialias=True).clamp(-1, 1)
        return self.encoder(images)

    def forward(self, batch: Batch, dropped: torch.Tensor) -> Told:
        pixels = batch.get(f"{self.name}_pixels")
        values = batch[self.name] if pixels is None else self.encode(pixels.float() / 127.5 - 1)
        values = values * ~dropped.view(-1, *[1] * (values.dim() - 1))
        if self.project is not None:
            return Told(vector=self.project(values))
        return Told(planes=functional.interpolate(values, self._size, mode="bilinear", align_corners=False))
