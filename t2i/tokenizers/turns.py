"""The turns of a tokenizer's training: it rebuilds pictures and, where wanted, critics judge these.

Shapes: B rows, images (B, 3, H, W). Every loss is a sum over rows, and counts rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from t2i.nn.critics import constant, judge, of_each, please
from t2i.pixels import scale
from t2i.protocol import Batch, Turn
from t2i.tokenizers.autoencoder import noise_of
from t2i.tokenizers.critic import Critic
from t2i.tokenizers.losses import LossConfig, picture_losses, pictures_of


class GeneratorTurn(nn.Module):
    """The tokenizer's turn within a training step; every critic that is awake has an opinion, weighed by itself.

    In evaluation none is asked: an opinion is weighed by the gradients of a training step. A perceptual network is
    loaded, and frozen.
    """

    begin: Callable[[], None] | None = None  # takes weights that training goes on from, where there are some

    def __init__(self, tokenizer: Any, losses: LossConfig, critics: Sequence[Critic] = ()) -> None:
        super().__init__()
        self.tokenizer, self._losses = tokenizer, losses
        if losses.logit_laplace and not getattr(tokenizer, "logits", False):
            raise ValueError(f"A {type(tokenizer).__name__} says pixels, not logits: leave out the loss logit_laplace.")
        # By the name of its loss, and in no ModuleDict: their parameters are not this turn's.
        self._critics = dict(zip(of_each("adversarial", len(critics)), critics, strict=True))
        self.perceptual = losses.network.load() if losses.network else None
        quantizer = getattr(tokenizer, "quantizer", None)
        if quantizer is not None and hasattr(quantizer, "stepped"):  # the loop looks whether there is one
            self.stepped = quantizer.stepped

    def turns(self) -> list[Turn]:
        """The tokenizer's and, with critics, theirs."""
        weights, critics = self._losses.weights(), list(self._critics.values())
        # With critics there are weights that depend on all rows.
        adaptive = any(critic.config.adaptive for critic in critics)
        rebuilt = ("perceptual",) if self.perceptual is not None else ()
        turns = [Turn("tokenizer", self, mixes_rows=adaptive, loss_weights=weights, rebuilt=rebuilt)]
        if critics:
            judging = CriticTurn(critics, self.tokenizer)
            turns.append(Turn("critic", judging, start_step=judging.start_step))
        return turns

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Rows, for every loss."""
        names = [*self._losses.of_pictures, *self.tokenizer.quantizer.losses, *self._asked]
        return dict.fromkeys(names, batch["weight"].sum())

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Sums over rows, or what the adaptive weights are made of where the batch is a "survey"."""
        step = int(batch["step"])
        awake = {name: critic for name, critic in self._asked.items() if step >= critic.config.start_step}
        if "survey" in batch:
            if not any(critic.config.adaptive for critic in awake.values()):
                return {"asleep": batch["weight"].new_zeros(1)}
            with torch.enable_grad():
                return self._pulls(self._sums(batch, awake)[0], awake)
        sums, seen = self._sums(batch, awake)
        if awake:
            sums |= {name: sums[name] * weight for name, weight in self._weights(sums, batch, awake).items()}
        return sums | seen

    @property
    def _asked(self) -> dict[str, Critic]:
        return self._critics if self.training else {}

    def _sums(
        self, batch: Batch, awake: Mapping[str, Critic]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The losses, adversarial ones without their weights, and what the quantizer saw.

        The critics' parameters are constants here.
        """
        images, weight_B = scale(batch["images"]), batch["weight"]
        quantized = quantize(self.tokenizer, images, batch, self.training)
        output = self.tokenizer.reconstruct(quantized.vectors)
        rows = picture_losses(self._losses, self.tokenizer, output, images, self.perceptual) | quantized.losses
        sums = {name: (loss_B * weight_B).sum() for name, loss_B in rows.items()}
        for name, critic in self._asked.items():
            sums[name] = weight_B.new_zeros(())
            if name in awake:
                opinion_B = please(constant(critic, pictures_of(self.tokenizer, output)), critic.config.adversary)
                sums[name] = (opinion_B * weight_B).sum()
        return sums, dict(getattr(quantized, "seen", {})) if self.training else {}

    def _pulls(self, sums: dict[str, torch.Tensor], awake: Mapping[str, Critic]) -> dict[str, torch.Tensor]:
        """The gradients at the last layer, (1, P), of what pulls at it; those of parts of a batch add up."""
        last, weights = self.tokenizer.last_layer, self._losses.weights()
        terms = {"nll": torch.stack([weights[name] * sums[name] for name in self._losses.of_pictures]).sum()}
        terms |= {name: sums[name] for name, critic in awake.items() if critic.config.adaptive}
        return {
            name: torch.autograd.grad(term, last, retain_graph=True)[0].float().reshape(1, -1)
            for name, term in terms.items()
        }

    def _weights(
        self, sums: dict[str, torch.Tensor], batch: Batch, awake: Mapping[str, Critic]
    ) -> dict[str, torch.Tensor | float]:
        """Of each critic; lambda of arXiv 2012.09841, eq. 7, is of gradients summed over the global batch."""
        weights: dict[str, torch.Tensor | float] = {name: critic.config.weight for name, critic in awake.items()}
        if not (self.training and torch.is_grad_enabled()):
            return weights
        pulled = [name for name, critic in awake.items() if critic.config.adaptive]
        if not pulled:
            return weights
        pulls = {name: batch[f"all_{name}"] for name in ("nll", *pulled) if f"all_{name}" in batch}
        if not pulls:
            pulls = self._pulls(sums, awake)
            if dist.is_initialized() and dist.get_world_size() > 1:
                for pull in pulls.values():
                    dist.all_reduce(pull)
        sizes = {name: pull.sum(0).norm() for name, pull in pulls.items()}
        for name in pulled:
            weights[name] = weights[name] * (sizes["nll"] / (sizes[name] + 1e-4)).clamp(0, 1e4).detach()
        return weights


class CriticTurn(nn.Module):
    """The critics' turn: originals are real, what the tokenizer rebuilds is not.

    It begins at `start_step`, with the first of them. One that sleeps has no gradient: weight decay alone moves it.
    """

    def __init__(self, critics: Sequence[Critic], tokenizer: Any) -> None:
        super().__init__()
        # One is called as it was when there was never another.
        self.critic = critics[0] if len(critics) == 1 else nn.ModuleList(critics)
        # A tuple: its parameters are not this turn's.
        self._tokenizer, self._configs = (tokenizer,), [critic.config for critic in critics]
        self.start_step = min(config.start_step for config in self._configs)

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Rows, for every critic."""
        numbered = zip(of_each("", len(self._configs)), self._configs, strict=True)
        return dict.fromkeys([config.adversary + number for number, config in numbered], batch["weight"].sum())

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The loss of each critic, half of each side."""
        images, step = scale(batch["images"]), max(int(batch["step"]), self.start_step)
        with torch.no_grad():
            tokenizer = self._tokenizer[0]
            output = tokenizer.reconstruct(quantize(tokenizer, images, batch, self.training).vectors)
            rebuilt = pictures_of(tokenizer, output)
        critics = self.critic if isinstance(self.critic, nn.ModuleList) else [self.critic]
        sums = {}
        for name, critic, config in zip(self.targets(batch), critics, self._configs, strict=True):
            sums[name] = batch["weight"].new_zeros(())
            if step >= config.start_step:
                real_B, made_B = (
                    judge(critic(shown), real, config.adversary) for shown, real in ((images, True), (rebuilt, False))
                )
                sums[name] = ((real_B + made_B) / 2 * batch["weight"]).sum()
        return sums


def quantize(tokenizer: Any, images: torch.Tensor, batch: Batch, training: bool) -> Any:
    """What a tokenizer's bottleneck gives; one that draws is told what from."""
    if not getattr(tokenizer, "draws", False):
        return tokenizer.quantize(images)
    return tokenizer.quantize(images, noise_of(batch, training))
