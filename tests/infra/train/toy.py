"""A toy task and its feed, and a command that works on it as one worker: `python -m tests.infra.train.toy '{...}'`."""

import functools
import gc
import json
import os
import pkgutil
import shutil
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import nn

from infra import storage
from infra.train.checkpoint import COMMIT, Checkpoint, newest
from infra.train.draw import uniforms
from infra.train.engine import PlainEngine
from infra.train.loop import TrainConfig, is_loss, train
from infra.train.optim import OptimConfig
from infra.train.plan import BatchPlan
from infra.train.task import Update
from infra.train.writer import Writer

ROWS = 50


class Net(nn.Module):
    """What may go wrong in a checkpoint, small.

    Two groups of parameters whose sizes no number of workers divides, a frozen one, a tied one, an unused one, buffers
    that are kept, change and are not kept, blocks that repeat, and a loss over a number of targets that varies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.hidden = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 16)) for _ in range(2))
        self.unused = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(1) + 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.ones(1), persistent=False)

    def _mask(self, batch):
        return (batch["ids"][:, 1:] > 0) * batch["weight"][:, None]

    def targets(self, batch):
        return {"token": self._mask(batch).sum()}

    def forward(self, batch):
        x = torch.tanh(self.hidden(self.frozen(self.embed(batch["ids"])))) * self.scale * self.shift
        for block in self.blocks:
            x = x + block(x)
        if "poison" in batch:  # where it is 0 the value is 0, but the gradient is no number
            x = torch.sqrt(batch["poison"][:, None, None] * x * x)
        if self.training:
            self.calls += len(x) > 0
        logits = self.head(self.norm(x))[:, :-1]
        loss = nn.functional.cross_entropy(logits.float().transpose(1, 2), batch["ids"][:, 1:], reduction="none")
        return {"token": (loss * self._mask(batch)).sum()}


@dataclass(frozen=True)
class Toy:
    """Ids whose number of padded places varies from row to row."""

    seed: int = 0
    reads: tuple[str, ...] = ("row",)
    where_reads: tuple[str, ...] = ("row",)
    bucket: str | None = None
    whole_weights: bool = False

    def where(self, columns):
        return np.ones(len(next(iter(columns.values()))), bool)

    def updates(self):
        torch.manual_seed(self.seed)
        optim = OptimConfig(lr=1e-2, warmup_steps=3, weight_decay=0.1, clip_norm=0.5, ema_decay=0.9)
        return [Update("net", Net(), optim)]

    def picks(self, rows, draw):
        return {}

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
        return [replace(update, module=slow)]


class SoreNet(Net):
    """The device of the node that is first to compute fails, and that node's name is written down."""

    def forward(self, batch):
        import ray

        here = ray.get_runtime_context().get_node_id()
        with open(os.environ["BAD_NODE"], "a+") as file:
            file.seek(0)
            bad = file.read()
            file.write("" if bad else here)
        if bad in ("", here):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().forward(batch)


@dataclass(frozen=True)
class Sore(Toy):
    """The same numbers, but not on a node that is bad."""

    def updates(self):
        (update,) = super().updates()
        sore = SoreNet()
        sore.load_state_dict(update.module.state_dict())
        return [replace(update, module=sore)]


class Sick(Toy):
    """One row, number 7, has a gradient that is no number."""

    def collate(self, rows, draw):
        return super().collate(rows, draw) | {"poison": (np.array(rows["row"]) != 7).astype(np.float32)}


class Moved(Toy):
    """Its linear layer learns by Muon; embeddings, other matrices and the head, which is an embedding's, do not."""

    def updates(self):
        (update,) = super().updates()
        return [replace(update, optim=replace(update.optim, muon=True))]


class Pair(Toy):
    """Two updates in one step, as generator and critic; the second sleeps at first."""

    def updates(self):
        (first,) = super().updates()
        return [first, replace(first, name="late", module=Net(), start_step=4)]


def write_rows(folder):
    """An artifact of two shards whose column `row` is what `feed` makes up."""
    for shard in range(2):
        rows = [shard * ROWS + row for row in range(ROWS // 2)]
        columns = {"sample_id": [f"{row:016x}" for row in rows], "state": ["accepted"] * len(rows)}
        table = pa.table({**columns, "reason": pa.nulls(len(rows), pa.string()), "row": rows})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        storage.write_bytes(f"{folder}/shards/{shard:06d}.parquet", sink.getvalue().to_pybytes())


def feed(config, rank, world, micro_steps, task=None):
    count = getattr(task, "rows", ROWS)
    plan = BatchPlan([count // 2, count - count // 2], config.batch, config.seed, 2)
    share = -(-config.batch // world)
    micro = -(-share // micro_steps)

    def batches(start):
        for step in range(start, config.steps):
            rows, weight = plan.share(step, step + 1, rank, world, micro * micro_steps)
            numbers = rows.shard * count + rows.row
            draw = functools.partial(uniforms, config.seed, rows.epoch, numbers.astype(np.uint64))
            arrays = (task or Toy()).collate({"row": numbers.tolist()}, draw)
            batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
            batch["weight"] = torch.from_numpy(weight)
            yield [{name: column.chunk(micro_steps)[i] for name, column in batch.items()} for i in range(micro_steps)]

    return batches


def final_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint[name] for name in checkpoint.names}


class Figure(list):
    """One figure of each logged step, by its name."""

    def __init__(self, name="net/token"):
        self.name = name

    def __call__(self, step, figures):
        self.append(figures[self.name])

    def begin(self, step):
        pass

    def flush(self):
        pass


class Losses(Figure):
    """All losses of each logged step, by their names."""

    def __call__(self, step, figures):
        self.append({name: value for name, value in figures.items() if is_loss(name)})


def log_of(task):
    return Figure() if isinstance(task, Toy) else Losses()


def plain(folder, task=None, micro_steps=1, **options):
    """Train in this process; returns the final state and the logged losses."""
    config = TrainConfig(**{"steps": 12, "batch": 10, "log_every_steps": 1, "save_every_steps": 6, **options})
    task = task or Toy()
    losses, batches = log_of(task), feed(config, 0, 1, micro_steps, task)
    saved = train(task, batches, PlainEngine, micro_steps, config, folder, losses)
    return final_state(saved), losses


def worker_engine(job, config):
    """What makes the engine of this worker."""
    from infra.train import world, zero

    share = -(-config.batch // world.size())

    def make_engine(update, micro_steps, saved):
        return zero.ZeroEngine(
            update,
            micro_steps,
            saved,
            stage=job["stage"],
            precision=config.precision,
            micro_batch=-(-share // micro_steps),
            offload=job.get("offload", "none"),
            recompute=job.get("recompute", False),
        )

    return make_engine


def train_as_told(job, config):
    """Train a task of the tests by its name; returns the losses of the logged steps."""
    from infra.train import world

    task, micro_steps = pkgutil.resolve_name(job.get("task", f"{__name__}:Toy"))(), job.get("micro_steps", 1)
    losses = log_of(task)
    batches = feed(config, world.rank(), world.size(), micro_steps, task)
    train(task, batches, worker_engine(job, config), micro_steps, config, job["folder"], losses)
    return losses


def copy(job, config):
    """Load the newest checkpoint of `folder` into an engine and save it from there to `out`."""
    saved = Checkpoint(newest(job["folder"]))
    (update,) = pkgutil.resolve_name(job.get("task", f"{__name__}:Toy"))().updates()
    engine = worker_engine(job, config)(update, 1, saved)
    with Writer(job["out"]) as writer:
        writer.save(saved.step, engine.state(), {"updates": {update.name: engine.meta()}})


def refused(job, config):
    """What training a task says that cannot be trained."""
    try:
        train_as_told(job, config)
    except ValueError as error:
        return str(error)


def flops(job, config):
    """Of a row of the model, in a first micro-batch."""
    from infra.train import world
    from infra.train.flops import Flops

    (update,) = Toy().updates()
    counted, engine = Flops(1), worker_engine(job, config)(update, 1, None)
    ((batch,), *_) = feed(config, world.rank(), world.size(), 1)(0)
    with counted.counted(update, 0, len(batch["ids"])):
        engine.backward(engine(batch)["token"])
    return counted.figures(1.0, 1)["model_flops_per_second"]


def tear(job, config):
    """Leave the checkpoint of the last step as a worker leaves it that is killed before the commit."""
    from infra.train import world

    if world.rank() == 0:
        os.unlink(f"{job['folder']}/{config.steps:09d}/{COMMIT}")
    world.gather(None)


def compilers(job, config):
    """Those that are loaded, those that are found, and what was made by them."""
    loaded = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
    found = [name for name in ("cc", "gcc", "c++", "g++", "clang", "ninja", "nvcc") if shutil.which(name)]
    extensions = os.environ["TORCH_EXTENSIONS_DIR"]
    return loaded + found + (os.listdir(extensions) if os.path.exists(extensions) else [])


def poison(job, config):
    """Two good steps, one whose last row, of the last worker, has a gradient that is no number, and one good one.

    Returns what every worker saw: the norms, and what the poisoned step changed.
    """
    from infra.train import world

    (update,) = Toy().updates()
    engine = worker_engine(job, config)(update, 1, None)
    steps = feed(config, world.rank(), world.size(), 1)(0)
    norms, states, metas = [], [], []
    for step, (batch,) in zip(range(4), steps, strict=False):
        if step == 2:
            batch["poison"] = torch.ones(len(batch["ids"]))
            batch["poison"][-1] = float(world.rank() + 1 < world.size())
        engine.backward(engine(batch)["token"] / config.batch)
        norms.append(engine.step(1e-3))
        states.append(engine.state())
        metas.append(engine.meta())
    changed = [name for name in states[1] if not torch.equal(states[1][name], states[2][name])]
    moved = [name for name in states[2] if not torch.equal(states[2][name], states[3][name])]
    # JSON knows no inf.
    seen = {"norms": [str(norm) for norm in norms], "changed": changed, "moved": len(moved), "metas": metas}
    return world.gather(seen)


def work(jobs, result):
    """One worker of a DeepSpeed group that does job after job; rank 0 writes what each returned to `result`."""
    from infra.train import world, zero

    torch.set_num_threads(1)
    zero.start("gloo")
    plain_settings, results = zero.settings, []
    # The usual scale is too large for a loss that is a sum, and would be lowered for some steps.
    zero.LossScale = functools.partial(zero.LossScale, value=256.0)
    for job in jobs:
        if job.get("small"):  # no parameter is too small to be spread over workers, and some are too large for a bucket

            def settings(*given):
                told = plain_settings(*given)
                small = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100}
                return told | {"zero_optimization": told["zero_optimization"] | small}

            zero.settings = settings
        config = TrainConfig(
            **{"steps": 12, "batch": 10, "log_every_steps": 1, "save_every_steps": 6, **job.get("config", {})}
        )
        do = job.get("do", "train_as_told")
        results.append(pkgutil.resolve_name(do if ":" in do else f"{__name__}:{do}")(job, config))
        zero.settings = plain_settings
        gc.collect()
    if world.rank() == 0:
        with open(result, "w") as file:
            json.dump(results, file)
    world.gather(None)
    os._exit(0)  # gloo sometimes aborts while it is torn down
