"""A toy task and its feed, and a command that trains it as one worker: `python -m tests.infra.train.toy '{...}'`."""

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import nn

from infra import storage
from infra.train.checkpoint import Checkpoint
from infra.train.engine import PlainEngine
from infra.train.loop import TrainConfig, train
from infra.train.optim import OptimConfig
from infra.train.plan import BatchPlan
from infra.train.task import Update

ROWS = 50


class Net(nn.Module):
    """Two groups of parameters, a frozen one, a tied one, a buffer, and a loss over a number of targets that varies."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.hidden = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(1) + 1)

    def _mask(self, batch):
        return (batch["ids"][:, 1:] > 0) * batch["weight"][:, None]

    def targets(self, batch):
        return {"token": self._mask(batch).sum()}

    def forward(self, batch):
        x = self.norm(torch.tanh(self.hidden(self.frozen(self.embed(batch["ids"])))) * self.scale)
        logits = self.head(x)[:, :-1]
        loss = nn.functional.cross_entropy(logits.float().transpose(1, 2), batch["ids"][:, 1:], reduction="none")
        return {"token": (loss * self._mask(batch)).sum()}


@dataclass(frozen=True)
class Toy:
    """Ids whose number of padded places varies from row to row."""

    seed: int = 0
    reads: tuple[str, ...] = ("row",)
    where_reads: tuple[str, ...] = ("row",)

    def where(self, columns):
        return np.ones(len(next(iter(columns.values()))), bool)

    def updates(self):
        torch.manual_seed(self.seed)
        optim = OptimConfig(lr=1e-2, warmup_steps=3, weight_decay=0.1, clip_norm=0.5, ema_decay=0.9)
        return [Update("net", Net(), optim)]

    def collate(self, rows, draw):
        generator = [np.random.default_rng(row) for row in rows["row"]]
        ids = np.stack([g.integers(1, 11, 7) for g in generator])
        lengths = np.array([g.integers(2, 8) for g in generator])
        return {"ids": np.where(np.arange(7) < lengths[:, None], ids, 0)}

    def export(self, modules, folder):
        save_file(
            modules["net"].state_dict() | {"head.weight": modules["net"].head.weight.clone()},
            f"{folder}/net.safetensors",
        )


class SlowNet(Net):
    """A step takes a while, so that faults can come in between."""

    def forward(self, batch):
        time.sleep(0.05)
        return super().forward(batch)


@dataclass(frozen=True)
class Slow(Toy):
    """The same numbers, later."""

    def updates(self):
        (update,) = super().updates()
        slow = SlowNet()
        slow.load_state_dict(update.module.state_dict())
        return [dataclasses.replace(update, module=slow)]


def write_rows(folder):
    """An artifact of two shards whose column `row` is what `feed` makes up."""
    for shard in range(2):
        rows = [shard * ROWS + row for row in range(ROWS // 2)]
        columns = {"sample_id": [f"{row:016x}" for row in rows], "state": ["accepted"] * len(rows)}
        table = pa.table({**columns, "reason": pa.nulls(len(rows), pa.string()), "row": rows})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        storage.write_bytes(f"{folder}/shards/{shard:06d}.parquet", sink.getvalue().to_pybytes())


def feed(config, rank, world, micro_steps):
    plan = BatchPlan([ROWS // 2, ROWS - ROWS // 2], config.batch, config.seed, 2)
    share = -(-config.batch // world)
    micro = -(-share // micro_steps)

    def batches(start):
        for step in range(start, config.steps):
            rows, weight = plan.share(step, step + 1, rank, world, micro * micro_steps)
            arrays = Toy().collate({"row": (rows.shard * ROWS + rows.row).tolist()}, None)
            batch = {"ids": torch.from_numpy(arrays["ids"]), "weight": torch.from_numpy(weight)}
            yield [{name: column.chunk(micro_steps)[i] for name, column in batch.items()} for i in range(micro_steps)]

    return batches


def final_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint[name] for name in checkpoint.names}


class Losses(list):
    """The loss of each logged step."""

    def __call__(self, step, figures):
        self.append(figures["net/token"])

    def flush(self):
        pass


def plain(folder, **options):
    """Train in this process; returns the final state and the logged losses."""
    config = TrainConfig(**{"steps": 12, "batch": 10, "log_every_steps": 1, "save_every_steps": 6, **options})
    losses = Losses()
    saved = train(Toy(), feed(config, 0, 1, 1), PlainEngine, 1, config, folder, losses)
    return final_state(saved), losses


def main() -> None:
    """One worker of a DeepSpeed group; rank 0 writes its losses to `result`."""
    from infra.train import world, zero

    arguments = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    zero.start("gloo")
    config = TrainConfig(
        **{"steps": 12, "batch": 10, "log_every_steps": 1, "save_every_steps": 6, **arguments["config"]}
    )
    micro_steps = arguments["micro_steps"]
    share = -(-config.batch // world.size())
    batches = feed(config, world.rank(), world.size(), micro_steps)

    def make_engine(update, micro_steps, saved):
        return zero.ZeroEngine(
            update,
            micro_steps,
            saved,
            stage=arguments["stage"],
            precision=config.precision,
            micro_batch=-(-share // micro_steps),
        )

    losses = Losses()
    train(
        Toy(),
        batches,
        make_engine,
        micro_steps,
        config,
        arguments["folder"],
        losses,
    )
    if world.rank() == 0:
        with open(arguments["result"], "w") as file:
            json.dump(losses, file)
    world.gather(None)
    os._exit(0)  # gloo sometimes aborts while it is torn down


if __name__ == "__main__":
    main()
