"""A bottleneck that says of each value a normal distribution, drawn towards the standard one (arXiv 2112.10752).

Shapes: B rows, D channels of latents, h by w grid.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from t2i.random import normals
from t2i.tokenizers.autoencoder import Noise, Quantized

LEAST, MOST = -30.0, 20.0  # logarithms of a variance


@dataclass(frozen=True, kw_only=True)
class GaussianConfig:
    """How many channels latents have. There are no codes: the values are continuous."""

    width: int = 4

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"Latents have at least 1 channel, but width is {self.width}.")

    @property
    def size(self) -> int:
        """How many codes there are: none."""
        return 0

    @property
    def takes(self) -> int:
        """Channels of what the encoder says: a mean and a logarithm of a variance each."""
        return 2 * self.width

    def build(self) -> "Gaussian":
        """The bottleneck; it has no weights."""
        return Gaussian(self)


class Moments(NamedTuple):
    """A normal distribution of each value, (B, D, h, w) float32."""

    mean: torch.Tensor
    log_variance: torch.Tensor


class Gaussian(nn.Module):
    """In training a row's latents are drawn by its key, else they are the mean; the loss is `kl`.

    `kl` is of each row the sum over its latents of KL(N(mean, variance) || N(0, 1)) in nats (arXiv 1312.6114, appendix
    B). Moments and loss are fp32 throughout.
    """

    losses = ("kl",)
    draws = True

    def __init__(self, config: GaussianConfig) -> None:
        super().__init__()
        self.config = config
        self.size, self.width = config.size, config.width

    def forward(self, hidden_BEhw: torch.Tensor, noise: Noise | None = None) -> Quantized:
        """Latents of E = 2 D channels, means before logarithms of variances."""
        with torch.autocast(hidden_BEhw.device.type, enabled=False):
            mean, log_variance = self.moments(hidden_BEhw)
            kl_B = (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1) / 2
            latents = mean
            if noise is not None:
                latents = mean + (log_variance / 2).exp() * normals(noise.keys, mean.shape[1:], "posterior").to(mean)
        return Quantized(latents.to(hidden_BEhw.dtype), None, {"kl": kl_B})

    def moments(self, hidden_BEhw: torch.Tensor) -> Moments:
        """What the encoder says of each latent."""
        mean, log_variance = hidden_BEhw.float().chunk(2, dim=1)
        return Moments(mean, log_variance.clamp(LEAST, MOST))

    def before(self, hidden_BEhw: torch.Tensor) -> torch.Tensor:
        """The mode of the latents."""
        return self.moments(hidden_BEhw).mean

    def after(self, latents_BDhw: torch.Tensor) -> torch.Tensor:
        """What the decoder hears of latents: they themselves."""
        return latents_BDhw
