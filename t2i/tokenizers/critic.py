"""A critic of patches of pictures (PatchGAN, arXiv 1611.07004), and how much it counts."""

from dataclasses import dataclass, field

import torch
from torch import nn

from t2i.nn.critics import Adversary
from t2i.nn.weights import begins, normal


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """A PatchGAN critic (arXiv 1611.07004, 2012.09841)."""

    channels: int = 64
    layers: int = 3
    weight: float = 0.8  # of the adversarial loss, times the adaptive weight
    start_step: int = 250_001  # the critic and its loss sleep before
    adversary: Adversary = field(default="hinge", metadata={"since": "0.2"})
    adaptive: bool = field(default=True, metadata={"since": "0.2"})  # else `weight` is all of its weight (ViT-VQGAN)

    def __post_init__(self) -> None:
        if min(self.channels, self.layers) < 1 or self.start_step < 0:
            raise ValueError("A critic needs channels and layers of at least 1, and a start_step of at least 0.")


class Critic(nn.Module):
    """Judges overlapping patches: images (B, 3, H, W) to logits (B, 1, h, w). Group norm: rows do not meet."""

    def __init__(self, config: CriticConfig) -> None:
        super().__init__()
        width, layers = config.channels, [nn.Conv2d(3, config.channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, config.layers + 1):
            wider = config.channels * min(2**level, 8)
            stride = 2 if level < config.layers else 1
            layers += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), nn.GroupNorm(min(32, wider), wider)]
            layers += [nn.LeakyReLU(0.2)]
            width = wider
        self.config = config
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                begins(module, weight=normal(0.02))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)
