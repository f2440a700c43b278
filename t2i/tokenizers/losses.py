"""How far what a tokenizer rebuilds lies from the picture, by the terms that a training weighs.

Shapes: B rows, images (B, 3, H, W) in [-1, 1].
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from t2i.tokenizers.likelihood import negative_log_likelihood
from t2i.tokenizers.perceptual import ClipDistanceConfig, LPIPSConfig


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses. A term of pictures that weighs nothing is not worked out."""

    distance: Literal["l1", "l2"] = "l1"
    reconstruction: float = 1.0
    codebook: float = 1.0
    commitment: float = 0.25  # beta of arXiv 1711.00937, on the encoder's side
    logit_laplace: float = field(default=0.0, metadata={"since": "0.2"})  # arXiv 2102.12092: of models that say logits
    perceptual: float = field(default=0.0, metadata={"since": "0.2"})
    network: LPIPSConfig | ClipDistanceConfig | None = field(default=None, metadata={"since": "0.2"})  # which sees it
    kl: float = field(default=1e-6, metadata={"since": "0.2"})  # of what a bottleneck says from its prior
    entropy: float = field(default=0.1, metadata={"since": "0.2"})  # of lookup-free codes, arXiv 2310.05737
    # What a row's loss is of its pixels' and values'. With "sum" the KL term weighs as in arXiv 2112.10752.
    reduction: Literal["mean", "sum"] = field(default="mean", metadata={"since": "0.2"})

    def __post_init__(self) -> None:
        if not self.of_pictures:
            raise ValueError("A tokenizer learns from a loss of pictures: reconstruction, logit_laplace or perceptual.")
        if bool(self.perceptual) != bool(self.network):
            raise ValueError("The perceptual loss has a weight and a network: give both perceptual and network.")
        if min(self.weights().values()) < 0:
            raise ValueError("No loss weighs less than 0.")

    def weights(self) -> dict[str, float]:
        """By the names of the losses; an adversarial one brings its weight along."""
        names = ("reconstruction", "logit_laplace", "perceptual", "codebook", "commitment", "kl", "entropy")
        return {name: getattr(self, name) for name in names}

    @property
    def of_pictures(self) -> tuple[str, ...]:
        """The terms that compare pictures: together they are `nll` of arXiv 2012.09841, eq. 7."""
        return tuple(name for name in ("reconstruction", "logit_laplace", "perceptual") if getattr(self, name))


def picture_losses(
    config: LossConfig, tokenizer: Any, output: torch.Tensor, images: torch.Tensor, perceptual: nn.Module | None
) -> dict[str, torch.Tensor]:
    """The terms of pictures, (B,) each, without their weights, of what the decoder said.

    `perceptual` takes pictures rebuilt and originals, and returns how far they are from each other, (B,).
    """
    rebuilt, losses = pictures_of(tokenizer, output), {}
    each = images[0].numel() if config.reduction == "sum" else 1
    if config.reconstruction:
        difference = (rebuilt.float() - images).flatten(1)
        losses["reconstruction"] = (
            difference.abs().mean(1) if config.distance == "l1" else difference.square().mean(1)
        ) * each
    if config.logit_laplace:
        losses["logit_laplace"] = negative_log_likelihood(output, images) * each
    if config.perceptual:
        assert perceptual is not None
        losses["perceptual"] = perceptual(rebuilt, images).float() * each
    return losses


def pictures_of(tokenizer: Any, output: torch.Tensor) -> torch.Tensor:
    """Images, not clamped, of what the decoder said; a tokenizer without `pictures` says them itself."""
    return tokenizer.pictures(output) if hasattr(tokenizer, "pictures") else output
