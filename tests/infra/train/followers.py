"""Toy tasks for what the loop promises beside a plain Update; each is named by jobs of `toy.work`."""

import copy
import datetime
import functools
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.distributed import distributed_c10d

from infra.train import world, zero
from infra.train.optim import OptimConfig
from infra.train.task import Update
from infra.train.writer import Writer
from tests.infra.train.toy import Net, Toy, train_as_told, worker_engine

WAITED = 4  # seconds, by the groups of DeepSpeed in `slow`


def swapped(update, module, **changes):
    """The toy's Update with another module."""
    return replace(update, module=module, **changes)


class Masked(Net):
    """Its targets are other places at each step, as a mask's share that is scheduled."""

    def _mask(self, batch):
        places = torch.arange(6) + batch["ids"][:, :1]
        return super()._mask(batch) * (places % 3 != batch["step"] % 3)


class Scheduled(Toy):
    def updates(self):
        (update,) = super().updates()
        return [swapped(update, Masked())]


class Codes(nn.Module):
    """Nearest of eight vectors, each an average of what chose it (arXiv 1711.00937, appendix A.1)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(8, 16))
        self.register_buffer("counts", torch.ones(8))
        self.register_buffer("sums", self.codes.clone())
        self.mix = nn.Linear(16, 16)

    def forward(self, x, weight):
        z = self.mix(x)
        chosen = nn.functional.one_hot(torch.cdist(z.float(), self.codes).argmin(-1), 8).float() * weight[:, None, None]
        with torch.autocast("cpu", enabled=False):
            held = chosen.detach().flatten(0, 1)
            given = {"counts": held.sum(0), "sums": held.T @ z.detach().float().flatten(0, 1)}
        return z + (chosen @ self.codes - z).detach(), (z - (chosen @ self.codes)).square().mean(-1), given

    def follow(self, sums):
        for name in ("counts", "sums"):
            getattr(self, name).lerp_(sums[name], 0.2)
        self.codes.copy_(self.sums / self.counts[:, None].clamp(min=1e-3))


class Book(Net):
    """A codebook among its blocks follows the whole batch of each step that was taken."""

    def __init__(self):
        super().__init__()
        self.blocks.append(nn.Sequential(nn.Linear(16, 16), nn.Tanh()))
        self.books = nn.ModuleList([Codes()])
        self.register_buffer("rows", torch.zeros(()))
        self.register_buffer("followed", torch.zeros((), dtype=torch.int64))

    def targets(self, batch):
        return super().targets(batch) | {"commitment": batch["weight"].sum()}

    def forward(self, batch):
        x = self.embed(batch["ids"])
        for block in self.blocks:
            x = x + block(x)
        x, distance, given = self.books[0](x, batch["weight"])
        if "sick" in batch:  # adds 0, of which the gradient is no number
            x = x + torch.sqrt((x[batch["sick"]] * 0).sum()) * batch["sick"].any()
        logits = self.head(self.norm(x))[:, :-1]
        loss = nn.functional.cross_entropy(logits.float().transpose(1, 2), batch["ids"][:, 1:], reduction="none")
        losses = {"token": (loss * self._mask(batch)).sum(), "commitment": (distance.mean(1) * batch["weight"]).sum()}
        return losses | given | {"rows": batch["weight"].sum()}

    def stepped(self, sums):
        assert not torch.is_grad_enabled()
        self.books[0].follow(sums)
        self.rows += sums["rows"]
        self.followed += 1


class Follows(Toy):
    def updates(self):
        (update,) = super().updates()
        return [swapped(update, Book())]


class Skips(Follows):
    """Row 7 has a gradient that is no number."""

    def collate(self, rows, draw):
        return super().collate(rows, draw) | {"sick": np.array(rows["row"]) == 7}


class Pupil(Net):
    """It learns to say what an average of its own weights says, which is held in frozen parameters."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.blocks).requires_grad_(False)

    def targets(self, batch):
        return super().targets(batch) | {"teacher": batch["weight"].sum()}

    def forward(self, batch):
        x = wanted = self.embed(batch["ids"])
        for block, other in zip(self.blocks, self.teacher, strict=True):
            x, wanted = x + block(x), wanted + other(wanted)
        far = (x - wanted.detach()).square().flatten(1).mean(1)
        return super().forward(batch) | {"teacher": (far * batch["weight"]).sum()}

    def stepped(self, sums):
        assert not sums
        for mean, weight in zip(self.teacher.parameters(), self.blocks.parameters(), strict=True):
            mean.lerp_(weight, 0.2)


@dataclass(frozen=True)
class Averages(Toy):
    whole_weights: bool = True

    def updates(self):
        (update,) = super().updates()
        return [swapped(update, Pupil())]


class Held(nn.Linear):
    """Held in bf16, multiplied in fp32 where there is no autocast: else rounding would hide what is compared."""

    def forward(self, x):
        assert self.weight.dtype == torch.bfloat16
        return nn.functional.linear(x, self.weight.float(), self.bias.float())


class Adapted(nn.Module):
    """A frozen layer in bf16 and a trained low rank beside it."""

    def __init__(self):
        super().__init__()
        self.base = Held(16, 16).bfloat16().requires_grad_(False)
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)
        self.register_buffer("gain", torch.rand(1))

    def forward(self, x):
        return self.base(x) * self.gain + self.up(self.down(x))


class OnBase(Net):
    """A trained net on a base that is loaded anew; what is trained in the base is saved."""

    def __init__(self):
        super().__init__()
        self.base = nn.ModuleDict({"table": nn.Embedding(500, 16).bfloat16(), "layers": nn.ModuleList([Adapted()])})
        self.base["table"].requires_grad_(False)

    def forward(self, batch):
        assert self.base["table"].weight.dtype == torch.bfloat16
        x = self.embed(batch["ids"]) + self.base["table"](batch["ids"]).float()
        for layer in self.base["layers"]:
            x = x + layer(x)
        logits = self.head(self.norm(x))[:, :-1]
        loss = nn.functional.cross_entropy(logits.float().transpose(1, 2), batch["ids"][:, 1:], reduction="none")
        return {"token": (loss * self._mask(batch)).sum()}


class Based(Toy):
    rebuilt = ("base",)

    def updates(self):
        (update,) = super().updates()
        return [swapped(update, OnBase(), rebuilt=self.rebuilt)]


class Whole(Based):
    """The same, with all of the base in each checkpoint."""

    rebuilt = ()


class Meeting(Net):
    """Each row is to lie near the one after it, the nearer the more words both show; lengths differ."""

    def targets(self, batch):
        return super().targets(batch) | {"near": batch["weight"].sum()}

    def show(self, batch):
        there = batch["ids"] > 0
        length = int((there.any(0) * torch.arange(1, 8)).max())  # of this micro-batch alone
        vector = (self.embed(batch["ids"]) * there[..., None]).sum(1)
        return {
            "weight": batch["weight"],
            "ids": batch["ids"][:, :length],
            "there": there[:, :length],
            "vector": vector,
        }

    def forward(self, batch):
        own = self.show(batch)
        if "survey" in batch:
            return own
        seen = {name.removeprefix("all_"): column for name, column in batch.items() if name.startswith("all_")}
        seen = seen or world.rows(own)
        assert torch.equal(seen["ids"] > 0, seen["there"])
        assert (seen["weight"] > 0).all()
        first, there = int(seen["first"]), own["weight"] > 0
        end = first + int(there.sum())
        vectors = torch.cat([seen["vector"][:first], own["vector"][there], seen["vector"][end:]])
        both = (seen["ids"][:, :, None] == seen["ids"].roll(-1, 0)[:, None, :]) & seen["there"][:, :, None]
        far = (vectors - vectors.roll(-1, 0)).square().mean(1) * (1 + both.flatten(1).sum(1))
        whole = far.sum()
        near = far[first:end].sum().detach() + (whole - whole.detach())
        return super().forward(batch) | {"near": near}


class Meets(Toy):
    def updates(self):
        (update,) = super().updates()
        return [swapped(update, Meeting(), mixes_rows=True)]


class GreedyNet(Net):
    """More than some rows at once are too many for its memory."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def forward(self, batch):
        if len(batch["weight"]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(batch)


@dataclass(frozen=True)
class Greedy(Toy):
    most: int = 0

    def updates(self):
        (update,) = super().updates()
        greedy = GreedyNet(self.most)
        greedy.load_state_dict(update.module.state_dict())
        return [swapped(update, greedy)]


class Summed(nn.Module):
    """One weight in a layer of each kind that DeepSpeed would sum in 16 bits; its gradient is `x`."""

    def __init__(self):
        super().__init__()
        kinds = [functools.partial(kind, 1, 1) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)]
        self.layers = nn.ModuleList([nn.Linear(1, 1, bias=False), *(kind(1, bias=False) for kind in kinds)])

    def forward(self, batch):
        axes = (2, 3, 4, 5)
        return {"sum": sum(layer(batch["x"].view([1] * n)).sum() for layer, n in zip(self.layers, axes, strict=True))}


def added(job, config):
    """The norm of a gradient that is 1 on the first worker and 2^-12 on others, a micro-step and layer."""
    torch.manual_seed(0)
    engine = worker_engine(job, config)(Update("summed", Summed(), OptimConfig()), job["micro_steps"], None)
    for _ in range(job["micro_steps"]):
        engine.backward(engine({"x": torch.tensor(2.0**-12 if world.rank() else 1.0)})["sum"])
    return engine.step(1e-3)


def slow(job, config):
    """Train two steps, and a third anew; of the first worker a save takes longer than DeepSpeed's groups wait, and so
    does reading a checkpoint.
    """
    distributed_c10d.default_pg_timeout = datetime.timedelta(seconds=WAITED)
    save, load = Writer._save, zero.load_weights
    naps = [WAITED + 2] if world.rank() == 0 else []

    def late(function, *arguments):
        time.sleep(naps.pop() if naps else 0)
        return function(*arguments)

    Writer._save = lambda *arguments: late(save, *arguments)
    zero.load_weights = lambda *arguments: late(load, *arguments)
    try:
        losses = train_as_told(job, replace(config, steps=2, save_every_steps=1))
        naps += [WAITED + 2] if world.rank() == 0 else []
        return losses + train_as_told(job, replace(config, steps=3))
    finally:
        Writer._save, zero.load_weights = save, load
