"""A code is drawn at every position, and gradients pass through a softmax in its stead (arXiv 1611.01144, 2102.12092).

Shapes: B rows, K codebook size, D width of a code vector, h by w grid.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from t2i.nn.weights import begins, normal
from t2i.random import uniforms
from t2i.tokenizers.autoencoder import Noise, Quantized


@dataclass(frozen=True, kw_only=True)
class GumbelConfig:
    """Codes by Gumbel-softmax; the defaults are those of DALL-E's dVAE (arXiv 2102.12092, appendix A.2).

    Its loss `kl` is a mean over positions, DALL-E's beta = 6.6 is of sums, which are then divided by the picture's
    3 H W values: with codes of 8x8 pixels that is a weight of 6.6 / 192 beside a mean over values.
    """

    size: int = 8192
    width: int = 128
    temperature: float = 1.0  # at step 0, of the draw
    last_temperature: float = 1 / 16  # from `anneal_steps` on, by a cosine
    anneal_steps: int = 150_000  # 0: the last temperature from the beginning
    warmup_steps: int = 5_000  # until then the loss `kl` grows from nothing by a cosine; 0: it is whole at once
    straight_through: bool = False  # the decoder hears one code, not a blend of all; gradients are those of the blend

    def __post_init__(self) -> None:
        if self.size < 2 or self.width < 1:
            raise ValueError("A codebook needs at least 2 codes of at least width 1.")
        if min(self.temperature, self.last_temperature) <= 0 or min(self.anneal_steps, self.warmup_steps) < 0:
            raise ValueError("Gumbel-softmax needs temperatures above 0, and no negative number of steps.")

    @property
    def takes(self) -> int:
        """Channels of what it quantizes: a logit a code."""
        return self.size

    def build(self) -> "Gumbel":
        """The quantizer, with fresh weights."""
        return Gumbel(self)

    def temperature_at(self, step: int) -> float:
        """Of a training step, from 0."""
        rest = 1 - _cosine(step, self.anneal_steps)
        return self.last_temperature + rest * (self.temperature - self.last_temperature)

    def share_at(self, step: int) -> float:
        """How much of the loss `kl` counts at a training step, from 0."""
        return _cosine(step, self.warmup_steps)


class Gumbel(nn.Module):
    """Logits (B, K, h, w) to vectors: a relaxed draw in training, the likeliest code without noise.

    The loss `kl` is KL(q || uniform) in nats of the logits' own softmax, the mean over a row's positions.
    """

    losses = ("kl",)
    draws = True

    def __init__(self, config: GumbelConfig) -> None:
        super().__init__()
        self.config = config
        self.size, self.width = config.size, config.width
        self.vectors = nn.Parameter(torch.zeros(config.size, config.width))
        # As the 1x1 convolution on one-hot vectors with which the decoder of arXiv 2102.12092 begins.
        begins(self, vectors=normal(config.size**-0.5))

    def forward(self, logits_BKhw: torch.Tensor, noise: Noise | None = None) -> Quantized:
        """What the decoder hears, in fp32 inside; with noise a gradient passes to the logits through the draw."""
        with torch.autocast(logits_BKhw.device.type, enabled=False):
            logits = logits_BKhw.float()
            log_q = functional.log_softmax(logits, dim=1)
            kl_B = (log_q.exp() * (log_q + math.log(self.size))).sum(1).flatten(1).mean(1)
            if noise is None:
                codes = logits.argmax(dim=1)
                return Quantized(self.lookup(codes).to(logits_BKhw.dtype), codes, {"kl": kl_B})
            drawn = logits + gumbels(noise, tuple(logits.shape[1:]))
            heard = functional.softmax(drawn / self.config.temperature_at(noise.step), dim=1)
            codes = drawn.argmax(dim=1)
            if self.config.straight_through:
                one = torch.zeros_like(heard).scatter_(1, codes[:, None], 1.0)
                heard = one + (heard - heard.detach())  # the difference is 0 exactly
            vectors = torch.einsum("bkhw,kd->bdhw", heard, self.vectors.float())
        return Quantized(vectors.to(logits_BKhw.dtype), codes, {"kl": self.config.share_at(noise.step) * kl_B})

    def lookup(self, codes_Bhw: torch.Tensor) -> torch.Tensor:
        """Code vectors (B, D, h, w)."""
        return functional.embedding(codes_Bhw, self.vectors).permute(0, 3, 1, 2)


def gumbels(noise: Noise, shape: tuple[int, ...]) -> torch.Tensor:
    """(B, *shape) of the standard Gumbel distribution, between -2.9 and 16.7."""
    uniform = uniforms(noise.keys, shape, "gumbel").clamp_(min=2.0**-25)  # of 0 the logarithm is none
    return uniform.log_().neg_().log_().neg_()


def _cosine(step: int, steps: int) -> float:
    """From 0 to 1 over `steps`, as half a wave."""
    return (1 - math.cos(math.pi * min(1.0, step / steps))) / 2 if steps else 1.0
