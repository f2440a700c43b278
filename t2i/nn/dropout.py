"""Dropout whose mask is a function of (key, layer, step): the same in any batch, cut and number of micro-batches."""

import math

import torch
from torch import nn

from t2i.random import Place, bits


class Dropout(nn.Module):
    """Zeroes a share `p` of each row's values and scales up the rest (arXiv 1207.0580); the identity in evaluation.

    `name` tells a layer from the others of its model: give each its own, such as "blocks.3.attention". `p` is rounded
    to a multiple of 2^-16, and the scale is that of the rounded share, so that the mean is exact.
    """

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"Dropout leaves a part of the values: p lies in [0, 1), but it is {p}.")
        self.name = name
        self._share = min(round(p * 2**16), 2**16 - 1)  # of 2^16 equal chances

    def forward(self, x_B: torch.Tensor, keys_B: torch.Tensor, step: Place = 0) -> torch.Tensor:
        """`x_B` (B, ...) with row b masked by `keys_B[b]` (int64), at training step `step`."""
        if not self.training or not self._share:
            return x_B
        return x_B * self.mask(keys_B, x_B.shape[1:], step).to(x_B.dtype).mul_(2**16 / (2**16 - self._share))

    def mask(self, keys_B: torch.Tensor, shape: torch.Size, step: Place = 0) -> torch.Tensor:
        """Which values stay: (B, *shape) bool. Each takes 16 bits, a fourth of a word."""
        count = math.prod(shape)
        chances_BN = bits(keys_B, -(-count // 4), "dropout/" + self.name, step).view(torch.int16)
        return (chances_BN[:, :count] >= self._share - 2**15).view(len(keys_B), *shape)

    def extra_repr(self) -> str:
        return f"p={self._share / 2**16:.4g}, name={self.name!r}"
