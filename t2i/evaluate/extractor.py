"""A small network that sees the facts of a picture; what it sees before it names them are features for distances.

Shapes: B rows, D features, F facts.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from t2i.pixels import resized
from t2i.protocol import Batch, Turn

HALVINGS = 3  # of the sides, by convolutions


@dataclass(frozen=True, kw_only=True)
class ExtractorConfig:
    """How pictures come to the network, and how wide it is."""

    size: tuple[int, int] = (32, 32)  # height, width in pixels, to which others are stretched
    channels: int = 32  # of the first convolution; each further one has twice as many
    features: int = 64

    def __post_init__(self) -> None:
        if min(self.size) < 1 or any(side % 2**HALVINGS for side in self.size):
            raise ValueError(f"size is {self.size}: its sides are halved {HALVINGS} times, so 8 divides them.")
        if self.channels < 1 or self.features < 1:
            raise ValueError(f"channels and features are at least 1, but they are {self.channels}, {self.features}.")


class Extractor(nn.Module):
    """Convolutions to features (B, D), and from these a logit for each fact (B, F)."""

    def __init__(self, config: ExtractorConfig, facts: int) -> None:
        super().__init__()
        self.config = config
        widths = [3, *(config.channels * 2**level for level in range(HALVINGS))]
        layers: list[nn.Module] = []
        for width, wider in itertools.pairwise(widths):
            layers += [nn.Conv2d(width, wider, 4, stride=2, padding=1), nn.GroupNorm(1, wider), nn.GELU()]
        places = config.size[0] * config.size[1] // 4**HALVINGS
        flat = nn.Sequential(nn.Flatten(), nn.Linear(places * widths[-1], config.features))
        # Features of unit variance within each picture: else they grow with training, and distances with them.
        self.see = nn.Sequential(*layers, flat, nn.LayerNorm(config.features, elementwise_affine=False))
        self.name = nn.Linear(config.features, facts)

    def turns(self) -> list[Turn]:
        """Its own."""
        return [Turn("extractor", self)]

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Rows."""
        return {"facts": batch["weight"].sum()}

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The sum over rows of the mean binary cross-entropy (nats) of the facts of `images` (B, 3, H, W) uint8."""
        logits = self.name(self.features(batch["images"]))
        losses = functional.binary_cross_entropy_with_logits(logits.float(), batch["facts"].float(), reduction="none")
        return {"facts": (losses.mean(1) * batch["weight"]).sum()}

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, D) of images (B, 3, H, W) uint8 of the config's size."""
        return self.see(images.to(self.name.weight.dtype) / 127.5 - 1)

    @torch.no_grad()
    def extract(self, images: Sequence[np.ndarray], batch: int = 256) -> np.ndarray:
        """(N, D) float64 features of (H, W, 3) uint8 images of any sizes; ValueError for none."""
        if not len(images):
            raise ValueError("There is no picture to see features in.")
        found = []
        for start in range(0, len(images), batch):
            fitted = np.stack([resized(image, self.config.size) for image in images[start : start + batch]])
            found.append(self.features(torch.from_numpy(fitted).permute(0, 3, 1, 2)).double().cpu().numpy())
        return np.concatenate(found)
