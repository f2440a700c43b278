"""AdamW that keeps the moving average of its weights as one more piece of its own state, and its schedule."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) with linear warm-up, then a cosine (arXiv 1608.03983) or constant learning rate."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0  # on matrices only: vectors, norms and biases are left alone
    warmup_steps: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    min_lr_ratio: float = 0.0  # the cosine ends at lr * min_lr_ratio
    clip_norm: float = 1.0  # of the whole gradient; 0 turns clipping off
    ema_decay: float = 0.0  # 0 turns the moving average off

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"The learning rate must be positive, but lr={self.lr}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), but it is {self.ema_decay}.")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must lie in [0, 1], but it is {self.min_lr_ratio}.")
        if self.warmup_steps < 0 or self.clip_norm < 0 or self.weight_decay < 0:
            raise ValueError("warmup_steps, clip_norm and weight_decay must not be negative.")


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of training step `step` (from 0) of `total_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def parameter_groups(module: torch.nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with weight decay, vectors and scalars without."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# Without the wrapper around it, which imports torch's compiler, a second of each start, to set what `no_grad` sets.
_STEP = getattr(torch.optim.AdamW.step, "__wrapped__", torch.optim.AdamW.step)


class AdamW(torch.optim.AdamW):
    """AdamW whose state holds, beside `exp_avg` and `exp_avg_sq`, the moving average `ema` of the weights.

    ZeRO partitions an optimizer's state; kept there, the average is partitioned, saved and resized with the moments.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(groups, lr=config.lr, betas=config.betas)
        self._ema_decay = config.ema_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One AdamW step, then `ema <- decay * ema + (1 - decay) * weight`, decay ramped up over the first steps.

        What has no gradient is left alone, its average too.
        """
        loss = _STEP(self, closure)
        if self._ema_decay:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._average(parameter)
        return loss

    def _average(self, parameter: torch.Tensor) -> None:
        state = self.state[parameter]
        if "ema" not in state:
            state["ema"] = parameter.detach().clone()
            return
        step = float(state["step"])
        decay = min(self._ema_decay, (1 + step) / (10 + step))  # a long average must not remember the random start
        state["ema"].lerp_(parameter.detach().to(state["ema"].dtype), 1 - decay)
