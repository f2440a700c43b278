"""What all tokenizers that learn have in common: an encoder, a bottleneck, a decoder, and what training asks of them.

Shapes: B rows, D width of the bottleneck, h by w grid.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from t2i.protocol import Batch, Space
from t2i.tokenizers.scale import Scale


class Noise(NamedTuple):
    """What a row's draws are made of while a tokenizer trains. Without it the likeliest value stands."""

    keys: torch.Tensor  # (B,) int64
    step: int  # of the training, for what is annealed
    weight: torch.Tensor | None = None  # (B,): a row of 0 is padding, no sum that is `seen` counts it. None: all count


def noise_of(batch: Batch, training: bool) -> Noise | None:
    """That of a batch in training, where its task wrote keys."""
    if not training or "noise_key" not in batch:
        return None
    return Noise(batch["noise_key"], int(batch["step"]), batch["weight"])


class Quantized(NamedTuple):
    """What a bottleneck returns."""

    vectors: torch.Tensor  # (B, D, h, w): what the decoder hears; gradients pass to the encoder
    codes: torch.Tensor | None  # (B, h, w) int64; None: the values are continuous
    losses: dict[str, torch.Tensor]  # per row, (B,)
    seen: dict[str, torch.Tensor] = {}  # by name, sums over rows without a gradient, for its `stepped`


class Autoencoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to codes (B, h, w) or latents (B, D, h, w), and back.

    Abstract: a model says what its parts compute. Latents are continuous values, of a bottleneck with codes those
    before it quantizes them; whoever asks for them or brings them has them scaled.

    A bottleneck is a module with `size`, the number of its codes, 0 where its values are continuous, `width` and
    `losses`, the names of its own. One with codes has `lookup(codes)`, one that says distributions `moments(hidden)`.
    `before(hidden)` makes latents, `after(latents)` what the decoder hears of them; without these hidden is latents.
    One that draws in training has `draws = True` and takes `Noise` beside its input; so has one that follows what its
    inputs were, and `stepped(sums)`, as `infra.train.task.Update` describes it.
    """

    decodes = True
    logits: ClassVar[bool] = False  # the decoder speaks of logit-Laplace distributions: `t2i.tokenizers.likelihood`

    config: Any
    quantizer: Any
    scale: Scale | None = None  # of latents; None: it was not measured, and they stay as they are

    @property
    def codebook_size(self) -> int:
        """How many codes there are; 0: the values are continuous."""
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
        """Codes (h, w), or latents (D, h, w), of images of `size` (height, width); ValueError where it does not fit."""
        if not self.codebook_size:
            return self.latent_space(size)
        return Space(self.config.grid(size), codes=self.codebook_size)

    def latent_space(self, size: tuple[int, int]) -> Space:
        """Latents (D, h, w) of images of `size`, also where there are codes."""
        quantizer = self.config.quantizer
        channels = getattr(quantizer, "takes", quantizer.width) if self.codebook_size else quantizer.width
        return Space((channels, *self.config.grid(size)))

    def quantize(self, images: torch.Tensor, noise: Noise | None = None) -> Quantized:
        """The bottleneck's vectors, codes and losses."""
        hidden = self.hidden(images)
        return self.quantizer(hidden, noise) if self.draws else self.quantizer(hidden)

    def pictures(self, output: torch.Tensor) -> torch.Tensor:
        """Images of what `reconstruct` returned, not clamped."""
        return output

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Codes (B, h, w) int64, or where there are none the mode of the latents."""
        if not self.codebook_size:
            return self.latents(images)
        codes = self.quantize(images).codes
        assert codes is not None
        return codes

    @torch.no_grad()
    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """The mode of the latents (B, D, h, w), float32 and scaled."""
        hidden = self.hidden(images)
        found = self.quantizer.before(hidden) if hasattr(self.quantizer, "before") else hidden
        return self._scale.to(found.float())

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the latents, (B, D, h, w) each, scaled; ValueError where it says no distribution."""
        if not hasattr(self.quantizer, "moments"):
            raise ValueError(f"A {type(self.quantizer).__name__} says no distribution of latents, so no deviation.")
        mean, log_variance = self.quantizer.moments(self.hidden(images))
        return self._scale.to(mean), self._scale.spread((log_variance / 2).exp())

    @torch.no_grad()
    def decode(self, values: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1], of codes or, where values are floats, of latents."""
        if values.is_floating_point():
            latents = self._scale.back(values)
            after = getattr(self.quantizer, "after", None)
            vectors = after(latents) if after is not None else self.quantizer(latents).vectors
        else:
            vectors = self.quantizer.lookup(values)
        return self.pictures(self.reconstruct(vectors)).clamp(-1, 1)

    @property
    def _scale(self) -> Scale:
        return self.scale or Scale()
