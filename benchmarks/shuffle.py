"""How far from a full shuffle is the order in which rows are trained on, where the corpus is sorted by class?

    python -m benchmarks.shuffle

`sorted` is the worst case: rows lie by class, so that a shard holds one class, or two. `mixed` is how web corpora come:
rows were shuffled before they were cut into shards. Orders are those of `BatchPlan` with windows of so many shards, a
full permutation, and webdataset's: shards permuted, then its own buffer shuffle. Of each, over two epochs:

* `batch`: the distance (total variation, 0 to 1) of a batch's class mix from the corpus's, mean over batches. Chance
  alone makes it as large as `full` has it;
* `stretch`: the same of 64 batches in a row: what momentum and a moving average see;
* `correlation`: of the places of rows in one epoch with those in the next (Spearman), 0 for a full shuffle;
* `loss`: held-out cross-entropy, in nats, of a softmax classifier after two epochs of SGD at a rate that falls as a
  cosine, as `OptimConfig` has it, mean and standard deviation over seeds of order and data; `loss_constant`: at a
  constant rate, which remembers the last rows best, and is hard on orders that drift.

What follows: on mixed shards every window is as good as a full shuffle. On sorted ones a window of W shards shows at
most some W classes at a time: the default of 16 trains worse than a full shuffle, and 64 or more are wanted (or a
corpus that is shuffled once). A wider window costs reads, since a task finds fewer rows of its chunk in each shard.

Counts and seeds decide all of it: no figure depends on the machine. Prints one JSON object.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from webdataset.filters import _shuffle

from infra.train.draw import permutation
from infra.train.plan import BatchPlan


@dataclass(frozen=True, kw_only=True)
class Config:
    shards: int = 256
    shard_rows: int = 500
    classes: int = 20
    batch: int = 64
    windows: tuple[int, ...] = (1, 4, 16, 64)
    buffers: tuple[int, ...] = (1000, 8000)  # rows; webdataset's own default is 1000
    seeds: int = 3
    lr: float = 0.5

    @property
    def rows(self) -> int:
        return self.shards * self.shard_rows


def orders(config: Config, seed: int) -> Iterator[tuple[str, list[np.ndarray]]]:
    """The numbers of the rows, as they lie, in the order of each of two epochs."""
    yield "full", [permutation(config.rows, seed, epoch) for epoch in range(2)]
    for window in config.windows:
        plan = BatchPlan([config.shard_rows] * config.shards, config.rows, seed, window)
        epochs = [plan.steps(epoch, epoch + 1) for epoch in range(2)]
        yield f"window {window}", [one.shard * config.shard_rows + one.row for one in epochs]
    for buffer in config.buffers:
        yield f"buffer {buffer}", [buffered(config, buffer, seed, epoch) for epoch in range(2)]


def buffered(config: Config, buffer: int, seed: int, epoch: int) -> np.ndarray:
    shards = permutation(config.shards, seed, epoch)
    rows = (int(shard) * config.shard_rows + row for shard in shards for row in range(config.shard_rows))
    return np.array(list(_shuffle(rows, buffer, min(100, buffer), random.Random(f"{seed}/{epoch}"))))


def distance(classes: np.ndarray, size: int, count: int) -> float:
    """Mean total variation between the class mix of runs of `size` rows and that of all."""
    runs = classes[: len(classes) // size * size].reshape(-1, size)
    mixes = np.stack([np.bincount(run, minlength=count) for run in runs]) / size
    return float(np.abs(mixes - np.bincount(classes, minlength=count) / len(classes)).sum(1).mean() / 2)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(np.argsort(first), np.argsort(second))[0, 1])


def trained(config: Config, classes: np.ndarray, epochs: list[np.ndarray], seed: int, constant: bool) -> float:
    """The held-out loss of a softmax classifier of overlapping Gaussian classes."""
    generator, width = np.random.default_rng(seed), 32
    centres = generator.normal(size=(config.classes, width)) * 0.5
    points = torch.from_numpy((centres[classes] + generator.normal(size=(config.rows, width))).astype(np.float32))
    labels = torch.from_numpy(classes)
    held = torch.from_numpy(np.repeat(np.arange(config.classes), 500))
    unseen = torch.from_numpy((centres[held] + generator.normal(size=(len(held), width))).astype(np.float32))
    model = torch.nn.Linear(width, config.classes)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), config.lr, momentum=0.9)
    batches = torch.from_numpy(np.concatenate(epochs)).split(config.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for batch in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(points[batch]), labels[batch]).backward()
        optimizer.step()
        if not constant:
            schedule.step()
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(unseen), held))


def measure(config: Config, mixed: bool) -> dict[str, dict[str, float]]:
    figures: dict[str, dict[str, list[float]]] = {}
    for seed in range(config.seeds):
        classes = np.arange(config.rows) * config.classes // config.rows
        if mixed:
            classes = np.random.default_rng(seed).permutation(classes)
        for name, epochs in orders(config, seed):
            assert all(np.array_equal(np.sort(order), np.arange(config.rows)) for order in epochs), name
            found = {
                "batch": distance(classes[epochs[0]], config.batch, config.classes),
                "stretch": distance(classes[epochs[0]], 64 * config.batch, config.classes),
                "correlation": correlation(*epochs),
                "loss": trained(config, classes, epochs, seed, constant=False),
                "loss_constant": trained(config, classes, epochs, seed, constant=True),
            }
            for figure, value in found.items():
                figures.setdefault(name, {}).setdefault(figure, []).append(value)
    return {name: summary(found) for name, found in figures.items()}


def summary(found: dict[str, list[float]]) -> dict[str, float]:
    means = {figure: round(float(np.mean(values)), 4) for figure, values in found.items()}
    if len(found["loss"]) > 1:
        means |= {f"{name}_std": round(float(np.std(found[name], ddof=1)), 4) for name in ("loss", "loss_constant")}
    return means


def main(config: Config) -> None:
    torch.set_num_threads(1)
    corpora = {"sorted": measure(config, mixed=False), "mixed": measure(config, mixed=True)}
    print(json.dumps({"rows": config.rows, "classes": config.classes, **corpora}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config))
