"""A lattice in place of a codebook: each axis is rounded by itself (FSQ, arXiv 2309.15505).

Shapes: B rows, D axes, h by w grid.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from t2i.tokenizers.autoencoder import Quantized


@dataclass(frozen=True, kw_only=True)
class FiniteScalarConfig:
    """A fixed lattice in place of a codebook (FSQ, arXiv 2309.15505): `levels` values along each axis."""

    levels: tuple[int, ...] = (8, 6, 5)
    # Where values lie. False: `levels` of them from -1 to 1, bound by tanh. True: as published, whole numbers over
    # half of `levels`, of which an even axis has one more below 0 than above, and a shift that leaves 0 where it is.
    shifted: bool = field(default=False, metadata={"since": "0.2"})

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"Every axis needs at least 2 levels, but levels={self.levels}.")
        if self.shifted and 2 in self.levels:  # the shift would set 0 where tanh is flat: atanh(1 / 1.001)
            raise ValueError(f"With shifted=True every axis needs at least 3 levels, but levels={self.levels}.")

    @property
    def size(self) -> int:
        """How many codes there are."""
        return math.prod(self.levels)

    @property
    def width(self) -> int:
        """How many axes."""
        return len(self.levels)

    @property
    def takes(self) -> int:
        """Channels of what it quantizes."""
        return self.width

    def build(self) -> "FiniteScalar":
        """The quantizer."""
        return FiniteScalar(self)


class FiniteScalar(nn.Module):
    """Each axis is squashed to its range and rounded; codes are mixed-radix numbers, the first axis the fastest."""

    losses = ()

    def __init__(self, config: FiniteScalarConfig) -> None:
        super().__init__()
        self.config = config
        self.size, self.width = config.size, config.width
        self._levels: torch.Tensor
        self._radix: torch.Tensor
        levels = torch.tensor(config.levels)
        self.register_buffer("_levels", levels, persistent=False)
        self.register_buffer(
            "_radix", torch.cat([torch.ones(1, dtype=torch.long), levels[:-1].cumprod(0)]), persistent=False
        )

    def forward(self, z_BDhw: torch.Tensor) -> Quantized:
        """Rounded vectors in [-1, 1]; no losses of its own."""
        with torch.autocast(z_BDhw.device.type, enabled=False):
            z_BhwD = self._bound(z_BDhw.permute(0, 2, 3, 1).float())
            digits_BhwD = self._digits(z_BhwD)
            q_BhwD = z_BhwD + (self._values(digits_BhwD) - z_BhwD).detach()
        return Quantized(q_BhwD.permute(0, 3, 1, 2).to(z_BDhw.dtype), (digits_BhwD * self._radix).sum(-1), {})

    def lookup(self, codes_Bhw: torch.Tensor) -> torch.Tensor:
        """Code vectors (B, D, h, w)."""
        return self._values(codes_Bhw[..., None] // self._radix % self._levels).permute(0, 3, 1, 2)

    def before(self, z_BDhw: torch.Tensor) -> torch.Tensor:
        """Values before they are rounded, (B, D, h, w)."""
        return self._bound(z_BDhw.permute(0, 2, 3, 1).float()).permute(0, 3, 1, 2)

    def after(self, values_BDhw: torch.Tensor) -> torch.Tensor:
        """The nearest values that codes stand for, (B, D, h, w)."""
        digits_BhwD = self._digits(values_BDhw.permute(0, 2, 3, 1).float()).clamp(min=0)
        return self._values(torch.minimum(digits_BhwD, self._levels - 1)).permute(0, 3, 1, 2)

    def _bound(self, z: torch.Tensor) -> torch.Tensor:
        if not self.config.shifted:
            return torch.tanh(z)
        reach = (self._levels - 1) * (1 + 1e-3) / 2  # a little more, so that the outermost values are reached
        offset = (1 - self._levels % 2) / 2
        return (torch.tanh(z + torch.atanh(offset / reach)) * reach - offset) / self._half

    def _digits(self, z: torch.Tensor) -> torch.Tensor:
        if self.config.shifted:
            return (z * self._half).round().long() + self._half
        return ((z + 1) / 2 * (self._levels - 1)).round().long()

    def _values(self, digits: torch.Tensor) -> torch.Tensor:
        if self.config.shifted:
            return (digits - self._half) / self._half
        return digits * (2.0 / (self._levels - 1)) - 1

    @property
    def _half(self) -> torch.Tensor:
        return self._levels // 2
