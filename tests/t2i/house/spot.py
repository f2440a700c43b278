"""What the hard spots share: a task of generated rows, a tiny network, and the moments of what was drawn."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn

from infra.train import checkpoint
from infra.train.draw import uniforms
from infra.train.engine import PlainEngine, load_weights
from infra.train.loop import TrainConfig, train
from infra.train.optim import OptimConfig
from t2i.nn.weights import begins, constant
from t2i.priors.asking import Asking
from t2i.random import normals
from t2i.task import updates_of
from tests.infra.train import toy

OPTIM = OptimConfig(lr=1e-2, warmup_steps=10, ema_decay=0.99)


@dataclass(frozen=True)
class Spot:
    """Learn what `learner()` is, on the arrays that `data(rows, draw)` makes of row numbers."""

    learner: Callable[[], nn.Module]
    data: Callable[[np.ndarray, Callable], dict[str, np.ndarray]]
    optims: dict[str, OptimConfig] = field(default_factory=dict)
    rows: int = 4096
    whole_weights: bool = False
    reads: tuple[str, ...] = ("row",)
    where_reads: tuple[str, ...] = ("row",)
    bucket: str | None = None

    def where(self, columns):
        return np.ones(len(columns["row"]), bool)

    def updates(self):
        learner = self.learner()
        first = learner.turns()[0].name
        return updates_of(learner, {first: OPTIM, **self.optims}, seed=1)

    def collate(self, rows, draw):
        arrays = self.data(np.array(rows["row"]), draw)
        return {"noise_key": (draw("noise") * 2.0**53).astype(np.int64), **arrays}

    def export(self, modules, folder):
        pass


class Net(nn.Module):
    """x, the time and a vector to as many numbers: three layers; what they say is nothing at first."""

    def __init__(self, size, width=64, outputs=None, hears=("vector",), times=1.0):
        super().__init__()
        self.times = times  # the last one
        self.hears = frozenset(hears)
        self.enter = nn.Linear(size + 16, width)
        self.tell = nn.Linear(width, width)
        self.middle = nn.Linear(width, width)
        self.leave = begins(nn.Linear(width, outputs or size), weight=constant(0.0))

    def forward(self, x, t, told):
        waves = t[:, None] * (2.0 ** torch.arange(8) / self.times)
        x = self.enter(torch.cat([x, waves.sin(), waves.cos()], dim=1))
        if told.vector is not None:
            x = x + self.tell(told.vector)
        for skip in told.skips:
            x = x + skip
        return self.leave(torch.tanh(self.middle(torch.relu(x)) + x))


def normal(rows, salt, *shape):
    """Numbers (B, *shape) of N(0, 1) that are functions of the row's number."""
    return normals(torch.from_numpy(rows.astype(np.int64)), shape, f"spot/{salt}").numpy()


def asker(*configs):
    """How a prior is asked that hears these conditions."""
    return Asking(configs, tuple(config.rows("") for config in configs))


def moments(values):
    """Mean (D,) and covariance (D, D) of (B, D)."""
    return values.double().mean(0), values.double().T.cov()


def trained(spot, steps=400, batch=128):
    """A learner with the trained averages, and its losses on rows that it never saw, before and after."""
    config = TrainConfig(steps=steps, batch=batch, log_every_steps=steps, save_every_steps=steps)
    updates = spot.updates()
    before = held_out(spot, updates[0])
    with tempfile.TemporaryDirectory() as folder:
        saved = train(spot, toy.feed(config, 0, 1, 1, spot), PlainEngine, 1, config, folder, toy.Losses())
        for update in updates:
            load_weights(update, checkpoint.Checkpoint(saved.url), "ema")
    after = held_out(spot, updates[0])
    return updates[0].module.eval().requires_grad_(False), {name: (before[name], after[name]) for name in before}


@torch.no_grad()
def held_out(spot, update, count=1024):
    """The mean of each loss over rows that come after those that are trained on."""
    rows = np.arange(spot.rows, spot.rows + count)
    draw = partial(uniforms, 9, np.zeros(count), rows.astype(np.uint64))
    batch = {name: torch.from_numpy(array) for name, array in spot.collate({"row": rows.tolist()}, draw).items()}
    batch |= {"weight": torch.ones(count), "step": torch.tensor(7)}
    module = update.module.eval()
    losses, targets = module(batch), module.targets(batch)
    module.train()
    return {name: float(losses[name] / targets[name]) for name in targets}


def falls(losses, name, to):
    """Whether a loss fell to less than a share of what it was."""
    before, after = losses[name]
    return after < to * before
