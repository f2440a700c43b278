"""AdamW, Muon for matrices where it is asked for, the moving average of the weights beside them, and the schedule."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from infra.config import setting
from infra.train import world

MOMENTUM = 0.95  # of Muon
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic's coefficients, steepest at zero; five rounds do


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
    muon: bool = setting(False, since="0.2")  # the weights of linear and convolution layers learn by Muon

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
    """Trainable parameters: what Muon moves, other matrices, both with weight decay, and vectors and scalars without.

    A group of Muon's says the `shapes` of its matrices, since ZeRO hands its optimizer their parts as one vector.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    hidden = _layers(module) if config.muon else set()
    moved = [parameter for parameter in trainable if parameter in hidden]
    rest = [parameter for parameter in trainable if parameter not in hidden]
    groups = [
        {"params": moved, "weight_decay": config.weight_decay, "shapes": [tuple(p.shape) for p in moved]},
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _layers(module: torch.nn.Module) -> set[torch.Tensor]:
    """Weights of linear and convolution layers, without those that are an embedding's, too."""
    layers = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    found = {part.weight for part in module.modules() if isinstance(part, layers)}
    return found - {part.weight for part in module.modules() if isinstance(part, torch.nn.Embedding)}


# Without the wrapper around it, which imports torch's compiler, a second of each start, to set what `no_grad` sets.
_STEP = getattr(torch.optim.AdamW.step, "__wrapped__", torch.optim.AdamW.step)


class AdamW(torch.optim.AdamW):
    """AdamW whose state holds, beside `exp_avg` and `exp_avg_sq`, the moving average `ema` of the weights.

    ZeRO partitions an optimizer's state; kept there, the average is partitioned, saved and resized with the moments.

    Groups with `shapes` are Muon's (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): a matrix is moved
    along its Nesterov momentum with all singular values made equal, by steps as large as AdamW's (arXiv 2502.16982), so
    that one learning rate serves both. Of the moments it has `exp_avg` alone.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(groups, lr=config.lr, betas=config.betas)
        self._ema_decay = config.ema_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, then `ema <- decay * ema + (1 - decay) * weight`, decay ramped up over the first steps.

        What has no gradient is left alone, its average too. Under ZeRO 1 to 3 a collective, where there is Muon.
        """
        groups = self.param_groups
        self.param_groups = [group for group in groups if "shapes" not in group]
        try:
            loss = _STEP(self, closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if "shapes" in group:
                self._muon(group)
            for parameter in group["params"]:
                if self._ema_decay and parameter.grad is not None:
                    self._average(parameter)
        return loss

    def _muon(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "exp_avg" not in state:
                state["step"], state["exp_avg"] = torch.tensor(0.0), torch.zeros_like(parameter)
            state["step"] += 1
            state["exp_avg"].lerp_(parameter.grad, 1 - MOMENTUM)
            ahead = parameter.grad.lerp(state["exp_avg"], MOMENTUM).bfloat16()
            move = _moves(ahead, group["shapes"], group.get("each", False)) if parameter.dim() == 1 else _move(ahead)
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(move, alpha=-group["lr"])

    def _average(self, parameter: torch.Tensor) -> None:
        state = self.state[parameter]
        if "ema" not in state:
            state["ema"] = parameter.detach().clone()
            return
        step = float(state["step"])
        decay = min(self._ema_decay, (1 + step) / (10 + step))  # a long average must not remember the random start
        state["ema"].lerp_(parameter.detach().to(state["ema"].dtype), 1 - decay)


def _moves(part: torch.Tensor, shapes: list[tuple[int, ...]], each: bool) -> torch.Tensor:
    """This worker's part of the moves of all matrices of `shapes`, given its part of what is ahead; a collective.

    The parts of all workers, end to end, are the matrices end to end (ZeRO 1 and 2); or `each` matrix is cut into as
    many pieces, and a part holds one of each (ZeRO 3). Who has a piece of a matrix works out the whole of it, from the
    same numbers as the others.
    """
    workers, rank = world.size(), world.rank()
    parts = torch.stack(world.tensors(part))
    moves, start = torch.zeros_like(part, dtype=torch.float32), 0
    for shape in shapes:
        count = math.prod(shape)
        size = -(-count // workers) if each else count  # of its piece in a part, or of all of it
        low, high = (start, start + size) if each else (start - rank * len(part), start + size - rank * len(part))
        first, last = max(low, 0), min(high, len(part))
        if first < last:
            ahead = parts[:, low:high].reshape(-1)[:count] if each else parts.reshape(-1)[start : start + count]
            move = _move(ahead.view(shape)).reshape(-1)
            piece = move[rank * size : (rank + 1) * size] if each else move[first - low : last - low]
            moves[first : first + len(piece)] = piece
        start += size
    return moves


def _move(ahead: torch.Tensor) -> torch.Tensor:
    """`ahead`, the first axis against all others, with its singular values near 1, at the size of a step of AdamW."""
    x = ahead.flatten(1)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).float().mul(0.2 * math.sqrt(max(x.shape))).view(ahead.shape)
