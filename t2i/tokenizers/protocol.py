"""What every image tokenizer offers: pictures to codes and back, at its own scale, on its own grid."""

from typing import Protocol

import torch


class Tokenizer(Protocol):
    """Images are (B, 3, H, W) floats in [-1, 1]; H by W is never assumed square."""

    codebook_size: int

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of codes for images of `size` (height, width); ValueError where the size does not fit."""
        ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Codes (B, h, w), int64 in [0, codebook_size)."""
        ...

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), clamped to [-1, 1]."""
        ...
