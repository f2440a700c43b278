"""What a tokenizer is trained for: reconstruction, its quantizer's losses and, where wanted, critics' opinions.

Shapes: B rows, images (B, 3, H, W). Every loss is a sum over rows of the row's mean, and counts rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from t2i.nn.critics import constant, judge, of_each, please
from t2i.nn.weights import begins, normal
from t2i.pixels import scale
from t2i.protocol import Batch, Turn
from t2i.tokenizers.patch_vqgan import PatchVQGAN
from t2i.tokenizers.vqgan import VQGAN

Tokenizer = VQGAN | PatchVQGAN


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses."""

    distance: Literal["l1", "l2"] = "l1"
    reconstruction: float = 1.0
    codebook: float = 1.0
    commitment: float = 0.25  # beta of arXiv 1711.00937, on the encoder's side

    def weights(self) -> dict[str, float]:
        """By the names of the losses; an adversarial one brings its weight along."""
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
                begins(module, weight=normal(0.02))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


class GeneratorTurn(nn.Module):
    """The tokenizer's turn within a training step; every critic that is awake has an opinion, weighed by itself.

    In evaluation none is asked: an opinion is weighed by the gradients of a training step.
    """

    def __init__(self, tokenizer: Tokenizer, losses: LossConfig, critics: Sequence[Critic] = ()) -> None:
        super().__init__()
        self.tokenizer, self._losses = tokenizer, losses
        # By the name of its loss, and in no ModuleDict: their parameters are not this turn's.
        self._critics = dict(zip(of_each("adversarial", len(critics)), critics, strict=True))

    def turns(self) -> list[Turn]:
        """The tokenizer's and, with critics, theirs."""
        weights, critics = self._losses.weights(), list(self._critics.values())
        # With critics there are weights that depend on all rows.
        turns = [Turn("tokenizer", self, mixes_rows=bool(critics), loss_weights=weights)]
        if critics:
            judging = CriticTurn(critics, self.tokenizer)
            turns.append(Turn("critic", judging, start_step=judging.start_step))
        return turns

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Rows, for every loss."""
        names = ["reconstruction", *self.tokenizer.quantizer.losses, *self._asked]
        return dict.fromkeys(names, batch["weight"].sum())

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Sums over rows, or what the adaptive weights are made of where the batch is a "survey"."""
        step = int(batch["step"])
        awake = {name: critic for name, critic in self._asked.items() if step >= critic.config.start_step}
        if "survey" in batch:
            if not awake:
                return {"asleep": batch["weight"].new_zeros(1)}
            with torch.enable_grad():
                return self._pulls(self._sums(batch, awake), awake)
        sums = self._sums(batch, awake)
        if awake:
            sums |= {name: sums[name] * weight for name, weight in self._adaptive(sums, batch, awake).items()}
        return sums

    @property
    def _asked(self) -> dict[str, Critic]:
        return self._critics if self.training else {}

    def _sums(self, batch: Batch, awake: Mapping[str, Critic]) -> dict[str, torch.Tensor]:
        """The adversarial losses without their weights; the critics' parameters are constants here."""
        images, weight_B = scale(batch["images"]), batch["weight"]
        quantized = self.tokenizer.quantize(images)
        rebuilt = self.tokenizer.reconstruct(quantized.vectors)
        difference = (rebuilt.float() - images).flatten(1)
        distance_B = difference.abs().mean(1) if self._losses.distance == "l1" else difference.square().mean(1)
        sums = {"reconstruction": (distance_B * weight_B).sum()}
        sums |= {name: (loss_B * weight_B).sum() for name, loss_B in quantized.losses.items()}
        for name, critic in self._asked.items():
            sums[name] = weight_B.new_zeros(())
            if name in awake:
                sums[name] = (please(constant(critic, rebuilt)) * weight_B).sum()
        return sums

    def _pulls(self, sums: dict[str, torch.Tensor], awake: Mapping[str, Critic]) -> dict[str, torch.Tensor]:
        """The gradients at the last layer, (1, P), of what pulls at it; those of parts of a batch add up."""
        last = self.tokenizer.last_layer
        return {
            name: torch.autograd.grad(sums[name], last, retain_graph=True)[0].float().reshape(1, -1)
            for name in ("reconstruction", *awake)
        }

    def _adaptive(
        self, sums: dict[str, torch.Tensor], batch: Batch, awake: Mapping[str, Critic]
    ) -> dict[str, torch.Tensor | float]:
        """lambda of arXiv 2012.09841, eq. 7, from gradients at the last layer, summed over the global batch."""
        if not (self.training and torch.is_grad_enabled()):
            return {name: critic.config.weight for name, critic in awake.items()}
        names = ("reconstruction", *awake)
        pulls = {name: batch[f"all_{name}"] for name in names if f"all_{name}" in batch}
        if not pulls:
            pulls = self._pulls(sums, awake)
            if dist.is_initialized() and dist.get_world_size() > 1:
                for pull in pulls.values():
                    dist.all_reduce(pull)
        sizes = {name: pull.sum(0).norm() for name, pull in pulls.items()}
        return {
            name: critic.config.weight * (sizes["reconstruction"] / (sizes[name] + 1e-4)).clamp(0, 1e4).detach()
            for name, critic in awake.items()
        }


class CriticTurn(nn.Module):
    """The critics' turn: originals are real, what the tokenizer rebuilds is not.

    It begins at `start_step`, with the first of them. One that sleeps has no gradient: weight decay alone moves it.
    """

    def __init__(self, critics: Sequence[Critic], tokenizer: Tokenizer) -> None:
        super().__init__()
        # One is called as it was when there was never another.
        self.critic = critics[0] if len(critics) == 1 else nn.ModuleList(critics)
        # A tuple: its parameters are not this turn's.
        self._tokenizer, self._starts = (tokenizer,), [critic.config.start_step for critic in critics]
        self.start_step = min(self._starts)

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Rows, for every critic."""
        return dict.fromkeys(of_each("hinge", len(self._starts)), batch["weight"].sum())

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Hinge loss (arXiv 1705.02894) of each critic, half of each side."""
        images, step = scale(batch["images"]), max(int(batch["step"]), self.start_step)
        with torch.no_grad():
            rebuilt = self._tokenizer[0].reconstruct(self._tokenizer[0].quantize(images).vectors)
        critics = self.critic if isinstance(self.critic, nn.ModuleList) else [self.critic]
        sums = {}
        for name, critic, start in zip(self.targets(batch), critics, self._starts, strict=True):
            sums[name] = batch["weight"].new_zeros(())
            if step >= start:
                loss_B = (judge(critic(images), real=True) + judge(critic(rebuilt), real=False)) / 2
                sums[name] = (loss_B * batch["weight"]).sum()
        return sums
