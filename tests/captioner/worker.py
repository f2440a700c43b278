"""A tiny captioner that learns to match, and one worker of its training, for `tests.infra.train.workers`."""

import json
import math
import os

import numpy as np
import torch

from captioner.matching import MatchingConfig
from captioner.model import CaptionerConfig, TextConfig, VisionConfig
from captioner.task import BaseTask
from captioner.vocabulary import train_vocabulary
from infra.train.checkpoint import Checkpoint
from infra.train.draw import uniforms
from infra.train.engine import PlainEngine
from infra.train.loop import TrainConfig, train
from infra.train.optim import OptimConfig
from infra.train.plan import BatchPlan

SIZE = (8, 16)
COLORS = ("red", "green", "blue", "yellow", "black")
ROWS = 23
STEPS = {"steps": 5, "batch": 10, "log_every_steps": 1, "save_every_steps": 5}


def rows() -> dict[str, list]:
    """Noise, and texts of several lengths of which some occur twice."""
    rng = np.random.default_rng(0)
    texts = [" and ".join(rng.choice(COLORS, 1 + row % 3)) for row in range(ROWS)]
    return {"pixels": list(rng.integers(0, 256, (ROWS, *SIZE, 3), dtype=np.uint8)), "caption_alt": texts}


def task(**matching) -> BaseTask:
    return BaseTask(
        source=CaptionerConfig(
            vision=VisionConfig(image_size=SIZE, patch_size=8, hidden=16, layers=1, heads=2, mlp=16),
            text=TextConfig(hidden=16, layers=1, heads=2, mlp=16, max_length=10),
            init_std=0.2,
        ),
        vocabulary=train_vocabulary(COLORS, 64),
        image_size=SIZE,
        max_length=10,
        optim=OptimConfig(lr=3e-3, warmup_steps=2),
        matching=MatchingConfig(**{"contrastive": 0.5, "match": 1, "width": 8, **matching}),
    )


def micro_batch(config, world, micro_steps):
    return math.ceil(math.ceil(config.batch / world) / micro_steps)


def feed(trained, config, rank, world, micro_steps):
    plan = BatchPlan([ROWS], config.batch, config.seed, 1)
    micro, table = micro_batch(config, world, micro_steps), rows()

    def batches(start):
        for step in range(start, config.steps):
            picked, weight = plan.share(step, step + 1, rank, world, micro * micro_steps)
            columns = {name: [values[row] for row in picked.row] for name, values in table.items()}
            ids = picked.row.astype(np.uint64)
            arrays = trained.collate(columns, lambda salt, i=ids, e=picked.epoch: uniforms(0, e, i, salt))
            batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
            batch["weight"] = torch.from_numpy(weight)
            yield [{name: column.chunk(micro_steps)[i] for name, column in batch.items()} for i in range(micro_steps)]

    return batches


class Log(list):
    def __call__(self, step, figures):
        self.append([figures[f"base/{name}"] for name in ("alt", "contrastive", "match", "grad_norm")])

    def begin(self, step):
        pass

    def flush(self):
        pass


def plain(folder, micro_steps=1):
    """Train in this process; the final weights by name, and the losses and gradient's norm of each step."""
    config, log, trained = TrainConfig(**STEPS), Log(), task()
    saved: Checkpoint = train(
        trained, feed(trained, config, 0, 1, micro_steps), PlainEngine, micro_steps, config, folder, log
    )
    return {name: saved[name] for name in saved.names}, log


def work(jobs, result):
    """One worker of a DeepSpeed group that trains as each job says; rank 0 writes the logs to `result`."""
    from infra.train import world, zero

    torch.set_num_threads(1)
    zero.start("gloo", 300)
    logs = []
    for job in jobs:
        config, log, trained, micro_steps = TrainConfig(**STEPS), Log(), task(), job["micro_steps"]
        micro = micro_batch(config, world.size(), micro_steps)

        def make_engine(update, micro_steps, saved, stage=job["stage"], micro=micro):
            return zero.ZeroEngine(update, micro_steps, saved, stage=stage, precision="fp32", micro_batch=micro)

        batches = feed(trained, config, world.rank(), world.size(), micro_steps)
        train(trained, batches, make_engine, micro_steps, config, job["folder"], log)
        logs.append(log)
    if world.rank() == 0:
        with open(result, "w") as file:
            json.dump(logs, file)
    world.gather(None)
    os._exit(0)  # gloo sometimes aborts while it is torn down
