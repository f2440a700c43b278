"""The Engine contract, and the plain one-process engine that every other must agree with."""

import math
from collections.abc import Callable
from typing import Protocol

import torch

from infra.train.optim import AdamW, parameter_groups
from infra.train.task import Batch, Losses, Update

STATE_KEYS = ("exp_avg", "exp_avg_sq", "ema")
"""Moments and average of a weight, saved beside it in fp32 and in full, so that a checkpoint knows no world size."""


class Saved(Protocol):
    """Named tensors of a checkpoint, read on demand."""

    meta: dict

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> torch.Tensor: ...


class Engine(Protocol):
    """Forward, backward, step, save and load of one Update, however its state is spread over workers."""

    update: Update

    def __call__(self, batch: Batch) -> Losses:
        """The losses of this worker's micro-batch."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`; the gradient of a step is the SUM over micro-steps and workers."""
        ...

    def step(self, lr: float) -> float:
        """Clip, update the weights, forget the gradient; returns the norm of the gradient before clipping.

        A gradient that is no finite number gives a norm that is none, on every worker, and updates nothing: weights,
        moments, averages and the optimizer's count of steps stay. In fp16 that happens now and then and the loss scale
        is lowered; FloatingPointError is raised where that no longer helps.
        """
        ...

    def stepped(self, sums: dict[str, torch.Tensor]) -> None:
        """Call `module.stepped(sums)` (`Update`), after a step that was taken. ValueError where it cannot be done."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of this worker's share of the full fp32 state; those of all workers are disjoint and complete.

        What is built anew (`Update.rebuilt`) is no part of it.
        """
        ...

    def meta(self) -> dict:
        """What goes into the checkpoint beside tensors."""
        ...


EngineFactory = Callable[[Update, int, Saved | None], Engine]
"""(update, micro-steps a training step, checkpoint to continue from) -> engine."""


class PlainEngine:
    """One process, fp32, no sharding: the reference."""

    def __init__(self, update: Update, micro_steps: int = 1, saved: Saved | None = None) -> None:
        self.update = update
        self._module = update.module
        if saved is not None:
            load_weights(update, saved)
        self._optimizer = AdamW(parameter_groups(self._module, update.optim), update.optim)
        if saved is not None:
            load_optimizer(update, self._optimizer, saved)

    def __call__(self, batch: Batch) -> Losses:
        return self._module(batch)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = clip(self.update)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def stepped(self, sums: dict[str, torch.Tensor]) -> None:
        self._module.stepped(sums)  # type: ignore[operator]

    def state(self) -> dict[str, torch.Tensor]:
        name = self.update.name
        state = {key: value.clone() for key, value in buffers(self.update).items()}
        for key, parameter in parameters(self.update).items():
            state[f"{name}/w/{key}"] = parameter.detach().clone()
            for moment in STATE_KEYS:
                value = self._optimizer.state.get(parameter, {}).get(moment)
                if value is not None:
                    state[f"{name}/{moment}/{key}"] = value.clone()
        return state

    def meta(self) -> dict:
        steps = [float(state["step"]) for state in self._optimizer.state.values()]
        return {"optimizer_step": max(steps, default=0.0)}


def clip(update: Update, scale: float = 1.0) -> float:
    """Divide the gradient by `scale`, clip it, and return its norm before that; no finite number: it is dropped."""
    trainable = [parameter for parameter in update.module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        if parameter.grad is None:  # no loss reached it: a gradient of zero, as in ZeRO
            parameter.grad = torch.zeros_like(parameter)
        elif scale != 1:
            parameter.grad.div_(scale)
    norm = float(torch.nn.utils.clip_grad_norm_(trainable, update.optim.clip_norm or float("inf")))
    if not math.isfinite(norm):
        for parameter in trainable:
            parameter.grad = None
    return norm


def parameters(update: Update) -> dict[str, torch.nn.Parameter]:
    """The module's parameters that a checkpoint holds, by name: not the frozen ones of what is built anew."""
    named = update.module.named_parameters()
    return {key: each for key, each in named if each.requires_grad or not _is_rebuilt(update, key)}


def buffers(update: Update) -> dict[str, torch.Tensor]:
    """The module's persistent buffers, without those of what is built anew, under their checkpoint names."""
    kept = update.module.state_dict(keep_vars=True)
    named = {key: each for key, each in update.module.named_buffers() if key in kept and not _is_rebuilt(update, key)}
    return {f"{update.name}/b/{key}": value.detach() for key, value in named.items()}


def _is_rebuilt(update: Update, key: str) -> bool:
    return any(key.startswith(f"{part}.") for part in update.rebuilt)


def load_weights(update: Update, saved: Saved, kind: str = "w") -> None:
    """Copy weights (`kind` "w", or the average "ema" where there is one) and buffers from a checkpoint."""
    with torch.no_grad():
        for key, parameter in parameters(update).items():
            name = f"{update.name}/{kind}/{key}"
            parameter.copy_(saved[name if name in saved else f"{update.name}/w/{key}"])
        for name, buffer in buffers(update).items():
            buffer.copy_(saved[name])


def load_optimizer(update: Update, optimizer: AdamW, saved: Saved) -> None:
    """Moments, average and step of an optimizer that holds whole parameters."""
    step = saved.meta["updates"][update.name]["optimizer_step"]
    for key, parameter in update.module.named_parameters():
        names = {kind: f"{update.name}/{kind}/{key}" for kind in STATE_KEYS}
        held = {kind: saved[name].to(parameter.device, copy=True) for kind, name in names.items() if name in saved}
        if parameter.requires_grad and held:
            optimizer.state[parameter] = {"step": torch.tensor(step), **held}
