"""What all tokenizers that learn have in common: an encoder, a bottleneck, a decoder, and what training asks of them.

Shapes: B rows, D width of the bottleneck, h by w grid.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from t2i.protocol import Batch, Space


class Noise(NamedTuple):
    """What a row's draws are made of while a tokenizer trains. Without it the likeliest value stands."""

    keys: torch.Tensor  # (B,) int64
    step: int  # of the training, for what is annealed


def noise_of(batch: Batch, training: bool) -> Noise | None:
    """That of a batch in training, where its task wrote keys."""
    return Noise(batch["noise_key"], int(batch["step"])) if training and "noise_key" in batch else None


class Quantized(NamedTuple):
    """What a bottleneck returns."""

    vectors: torch.Tensor  # (B, D, h, w): what the decoder hears; gradients pass to the encoder
    codes: torch.Tensor | None  # (B, h, w) int64; None: the values are continuous
    losses: dict[str, torch.Tensor]  # per row, (B,)
    seen: dict[str, torch.Tensor] = {}  # by name, sums over rows without a gradient, for its `stepped`


class Autoencoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to codes (B, h, w) and back. Abstract: a model says what its parts compute.

    A bottleneck is a module with `size`, the number of its codes, `width` and `losses`, the names of its own; it has
    `lookup(codes)`. One that draws in training has `draws = True` and takes `Noise` beside its input, one that follows
    what its inputs were has `stepped(sums)`, as `infra.train.task.Update` describes it.
    """

    decodes = True
    logits: ClassVar[bool] = False  # the decoder speaks of logit-Laplace distributions: `t2i.tokenizers.likelihood`

    config: Any
    quantizer: Any

    @property
    def codebook_size(self) -> int:
        """How many codes there are."""
        return self.quantizer.size

    @property
    def draws(self) -> bool:
        """Whether training draws: its rows then bring keys."""
        return getattr(self.quantizer, "draws", False)

    @property
    def last_layer(self) -> torch.Tensor:
        """The weight at which the adaptive weight of a critic is measured."""
        raise NotImplementedError

    def hidden(self, images: torch.Tensor) -> torch.Tensor:
        """What the bottleneck takes, (B, D', h, w)."""
        raise NotImplementedError

    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        """Images from vectors (B, D, h, w), not clamped; or logits, where the model has these."""
        raise NotImplementedError

    def space(self, size: tuple[int, int]) -> Space:
        """Codes (h, w) of images of `size` (height, width); ValueError where it does not fit."""
        return Space(self.config.grid(size), codes=self.codebook_size)

    def quantize(self, images: torch.Tensor, noise: Noise | None = None) -> Quantized:
        """The bottleneck's vectors, codes and losses."""
        hidden = self.hidden(images)
        return self.quantizer(hidden, noise) if self.draws else self.quantizer(hidden)

    def pictures(self, output: torch.Tensor) -> torch.Tensor:
        """Images of what `reconstruct` returned, not clamped."""
        return output

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Codes (B, h, w) int64."""
        codes = self.quantize(images).codes
        assert codes is not None
        return codes

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1]."""
        return self.pictures(self.reconstruct(self.quantizer.lookup(codes))).clamp(-1, 1)
