"""What a tokenizer is trained for: reconstruction, its quantizer's losses and, where wanted, a critic's opinion.

Shapes: B rows, images (B, 3, H, W). Every loss is a sum over rows of the row's mean, and counts rows.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from t2i.tokenizers.patch_vqgan import PatchVQGAN
from t2i.tokenizers.vqgan import VQGAN

Batch = dict[str, torch.Tensor]
Tokenizer = VQGAN | PatchVQGAN
PULLS = ("reconstruction", "adversarial")  # the losses that the adaptive weight balances


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses."""

    distance: Literal["l1", "l2"] = "l1"
    reconstruction: float = 1.0
    codebook: float = 1.0
    commitment: float = 0.25  # beta of arXiv 1711.00937, on the encoder's side

    def weights(self) -> dict[str, float]:
        """By the names of the losses; the adversarial one brings its weight along."""
        return {"reconstruction": self.reconstruction, "codebook": self.codebook, "commitment": self.commitment}


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """A PatchGAN critic with hinge loss (arXiv 1611.07004, 2012.09841)."""

    channels: int = 64
    layers: int = 3
    weight: float = 0.8  # of the adversarial loss, times the adaptive weight
    start_step: int = 250_001  # the critic and its loss sleep before

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
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


class GeneratorTurn(nn.Module):
    """The tokenizer's turn within a training step."""

    def __init__(self, tokenizer: Tokenizer, losses: LossConfig, critic: Critic | None) -> None:
        super().__init__()
        self.tokenizer, self._losses = tokenizer, losses
        # A tuple: its parameters are not this turn's.
        self._critic: tuple[Critic, ...] = (critic,) if critic is not None else ()

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Rows, for every loss."""
        names = ["reconstruction", *self.tokenizer.quantizer.losses, *(["adversarial"] if self._critic else [])]
        return dict.fromkeys(names, batch["weight"].sum())

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Sums over rows, or what the adaptive weight is made of where the batch is a "survey"."""
        awake = any(bool(batch["step"] >= critic.config.start_step) for critic in self._critic)
        if "survey" in batch:
            if not awake:
                return {"asleep": batch["weight"].new_zeros(1)}
            with torch.enable_grad():
                return self._pulls(self._sums(batch, awake))
        sums = self._sums(batch, awake)
        if awake:
            sums["adversarial"] = sums["adversarial"] * self._adaptive(sums, batch)
        return sums

    def _sums(self, batch: Batch, awake: bool) -> dict[str, torch.Tensor]:
        """The adversarial loss without its weight; the critic's parameters are constants here."""
        images, weight_B = scale(batch["images"]), batch["weight"]
        quantized = self.tokenizer.quantize(images)
        rebuilt = self.tokenizer.reconstruct(quantized.vectors)
        difference = (rebuilt.float() - images).flatten(1)
        distance_B = difference.abs().mean(1) if self._losses.distance == "l1" else difference.square().mean(1)
        sums = {"reconstruction": (distance_B * weight_B).sum()}
        sums |= {name: (loss_B * weight_B).sum() for name, loss_B in quantized.losses.items()}
        for critic in self._critic:
            sums["adversarial"] = weight_B.new_zeros(())
            if awake:
                constants = {name: parameter.detach() for name, parameter in critic.named_parameters()}
                logits = torch.func.functional_call(critic, constants, (rebuilt,))
                sums["adversarial"] = -(logits.float().flatten(1).mean(1) * weight_B).sum()
        return sums

    def _pulls(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The gradients at the last layer, (1, P), of what pulls at it; those of parts of a batch add up."""
        last = self.tokenizer.last_layer
        return {
            name: torch.autograd.grad(sums[name], last, retain_graph=True)[0].float().reshape(1, -1) for name in PULLS
        }

    def _adaptive(self, sums: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor | float:
        """lambda of arXiv 2012.09841, eq. 7, from gradients at the last layer, summed over the global batch."""
        weight = self._critic[0].config.weight
        if not (self.training and torch.is_grad_enabled()):
            return weight
        pulls = {name: batch[f"all_{name}"] for name in PULLS if f"all_{name}" in batch}
        if not pulls:
            pulls = self._pulls(sums)
            if dist.is_initialized() and dist.get_world_size() > 1:
                for pull in pulls.values():
                    dist.all_reduce(pull)
        distance, adversarial = (pulls[name].sum(0).norm() for name in PULLS)
        return weight * (distance / (adversarial + 1e-4)).clamp(0, 1e4).detach()


class CriticTurn(nn.Module):
    """The critic's turn: originals are real, what the tokenizer rebuilds is not."""

    def __init__(self, critic: Critic, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.critic, self._tokenizer = critic, (tokenizer,)

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Rows."""
        return {"hinge": batch["weight"].sum()}

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Hinge loss (arXiv 1705.02894), half of each side."""
        images = scale(batch["images"])
        with torch.no_grad():
            rebuilt = self._tokenizer[0].reconstruct(self._tokenizer[0].quantize(images).vectors)
        real_B = functional.relu(1 - self.critic(images).float()).flatten(1).mean(1)
        fake_B = functional.relu(1 + self.critic(rebuilt).float()).flatten(1).mean(1)
        return {"hinge": ((real_B + fake_B) / 2 * batch["weight"]).sum()}


def scale(images: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float in [-1, 1]."""
    return images.float() / 127.5 - 1
