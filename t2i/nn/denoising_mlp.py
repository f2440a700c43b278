"""A small network that denoises one token, told what a transformer says of its place (MAR, arXiv 2406.11838).

Shapes: N tokens, C channels of a token, D width of what is told, W width of the network.
"""

import math

import torch
from torch import nn
from torch.nn import functional

from t2i.nn.weights import begins, constant, normal, xavier


class DenoisingMLP(nn.Module):
    """Tokens (N, C) at times (N,), told vectors (N, D), to (N, outputs): residual layers with adaLN."""

    def __init__(self, channels: int, told: int, outputs: int, width: int, layers: int) -> None:
        super().__init__()
        self.time = nn.Sequential(_linear(256, width, normal(0.02)), nn.SiLU(), _linear(width, width, normal(0.02)))
        self.tell = _linear(told, width)
        self.enter = _linear(channels, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), _linear(width, 2 * width, constant(0.0)))
        self.leave = _linear(width, outputs, constant(0.0))

    def forward(self, x: torch.Tensor, t: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        """All of the output is zero at first."""
        y = self.time(time_waves(t).to(x.dtype)) + self.tell(told)
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, y)
        shift, scale = self.modulation(y).chunk(2, dim=-1)
        return self.leave(self.norm(x) * (1 + scale) + shift)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.layers = nn.Sequential(_linear(width, width), nn.SiLU(), _linear(width, width))
        self.modulation = nn.Sequential(nn.SiLU(), _linear(width, 3 * width, constant(0.0)))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.modulation(y).chunk(3, dim=-1)
        return x + gate * self.layers(self.norm(x) * (1 + scale) + shift)


def time_waves(t: torch.Tensor, size: int = 256) -> torch.Tensor:
    """Cosines, then sines of times (N,), in `size` numbers (N, size), of periods from 2 pi to 2 pi 10,000 (ADM)."""
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * torch.arange(size // 2, device=t.device) / (size // 2))
    return functional.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, size % 2))


def _linear(inputs: int, outputs: int, weight=None) -> nn.Linear:
    return begins(nn.Linear(inputs, outputs), weight=weight or xavier(), bias=constant(0.0))
