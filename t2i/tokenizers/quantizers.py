"""From continuous vectors to the nearest of finitely many, with gradients straight through.

Shapes: B rows, D width of a code vector, h by w grid, N = B * h * w, K codebook size.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from t2i.nn.weights import begins, identity, normal, uniform
from t2i.tokenizers.autoencoder import Quantized


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """A codebook learned by gradient (arXiv 1711.00937)."""

    size: int = 1024
    width: int = 256
    normalize: bool = False  # nearest by angle, on the unit sphere (ViT-VQGAN, arXiv 2110.04627)
    linear: bool = False  # a frozen codebook seen through one learned matrix (SimVQ, arXiv 2411.02038): no code can die

    def __post_init__(self) -> None:
        if self.size < 2 or self.width < 1:
            raise ValueError("A codebook needs at least 2 codes of at least width 1.")


class Codebook(nn.Module):
    """Nearest neighbour in a learned codebook; the loss `codebook` moves codes, `commitment` moves inputs.

    Their weights, 1 and beta = 0.25, belong to the training; each has a gradient on its own side only.
    """

    losses = ("codebook", "commitment")

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        self.size, self.width = config.size, config.width
        self.vectors = nn.Parameter(torch.zeros(config.size, config.width), requires_grad=not config.linear)
        on_sphere = config.normalize or config.linear
        begins(self, vectors=normal(config.width**-0.5) if on_sphere else uniform(1 / config.size))
        mix = nn.Linear(config.width, config.width, bias=False) if config.linear else None
        self.mix = begins(mix, weight=identity()) if mix is not None else None

    def forward(self, z_BDhw: torch.Tensor) -> Quantized:
        """The nearest code at every position; the straight-through estimator carries gradients to `z_BDhw`.

        All of it in fp32: in 16 bits another code is the nearest at some positions in a hundred.
        """
        with torch.autocast(z_BDhw.device.type, enabled=False):
            return self._quantized(z_BDhw)

    def _quantized(self, z_BDhw: torch.Tensor) -> Quantized:
        batch, width, height, columns = z_BDhw.shape
        z_ND = z_BDhw.permute(0, 2, 3, 1).reshape(-1, width).float()
        book_KD = self._book()
        if self.config.normalize:
            z_ND = functional.normalize(z_ND, dim=-1)
        with torch.no_grad():
            distances_NK = book_KD.square().sum(1) - 2 * z_ND @ book_KD.T
            codes_N = distances_NK.argmin(dim=1)
        q_ND = functional.embedding(codes_N, book_KD)
        losses = {
            "codebook": (q_ND - z_ND.detach()).square().view(batch, -1).mean(1),
            "commitment": (q_ND.detach() - z_ND).square().view(batch, -1).mean(1),
        }
        straight_ND = z_ND + (q_ND - z_ND).detach()
        vectors = straight_ND.to(z_BDhw.dtype).view(batch, height, columns, width).permute(0, 3, 1, 2)
        return Quantized(vectors, codes_N.view(batch, height, columns), losses)

    def lookup(self, codes_Bhw: torch.Tensor) -> torch.Tensor:
        """Code vectors (B, D, h, w)."""
        with torch.autocast(codes_Bhw.device.type, enabled=False):
            return functional.embedding(codes_Bhw, self._book()).permute(0, 3, 1, 2).to(self.vectors.dtype)

    def _book(self) -> torch.Tensor:
        book_KD = (self.vectors if self.mix is None else self.mix(self.vectors)).float()
        return functional.normalize(book_KD, dim=-1) if self.config.normalize else book_KD


@dataclass(frozen=True, kw_only=True)
class FiniteScalarConfig:
    """A fixed lattice in place of a codebook (FSQ, arXiv 2309.15505): `levels` values along each axis."""

    levels: tuple[int, ...] = (8, 6, 5)

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"Every axis needs at least 2 levels, but levels={self.levels}.")

    @property
    def size(self) -> int:
        """How many codes there are."""
        return math.prod(self.levels)

    @property
    def width(self) -> int:
        """How many axes."""
        return len(self.levels)


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
        z_BhwD = self._bound(z_BDhw.permute(0, 2, 3, 1).float())
        digits_BhwD = self._digits(z_BhwD)
        q_BhwD = z_BhwD + (self._values(digits_BhwD) - z_BhwD).detach()
        return Quantized(q_BhwD.permute(0, 3, 1, 2).to(z_BDhw.dtype), (digits_BhwD * self._radix).sum(-1), {})

    def lookup(self, codes_Bhw: torch.Tensor) -> torch.Tensor:
        """Code vectors (B, D, h, w)."""
        return self._values(codes_Bhw[..., None] // self._radix % self._levels).permute(0, 3, 1, 2)

    def _bound(self, z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z)

    def _digits(self, z: torch.Tensor) -> torch.Tensor:
        return ((z + 1) / 2 * (self._levels - 1)).round().long()

    def _values(self, digits: torch.Tensor) -> torch.Tensor:
        return digits * (2.0 / (self._levels - 1)) - 1


def build_quantizer(config: CodebookConfig | FiniteScalarConfig) -> Codebook | FiniteScalar:
    """The quantizer that a config describes."""
    return Codebook(config) if isinstance(config, CodebookConfig) else FiniteScalar(config)
