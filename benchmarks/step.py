"""What does a training step cost with Ray, DeepSpeed and the feed, against a bare PyTorch loop on tensors in memory?

    python -m benchmarks.step
    taskset -c 0 python -m benchmarks.step --only long

On one core the daemons of a Ray node count in full; on two they, and the feed, have a core that the one thread of the
model leaves free in both trainings.

Three trainings of one worker, each with the same model, losses, AdamW with its moving average, clipping and threads:

* `long`, a prior on cached codes, steps of 200 ms and more on one core; `short`, one of some 10 ms;
* `images`, a tokenizer on JPEGs that the feed decodes: measured against T / (T + D), of the bare step T and the
  decoding and collating D of a batch, where both have one core. The bare loop has its tensors in memory.

`fit` and the bare loop run in turns, now one first and now the other. Of each run, the seconds of a step are taken over
every `log_every` steps after `warm` ones, and their median counts. Prints one JSON object: milliseconds a step, the
median over rounds of bare to `fit` of the same round (1: nothing is lost), and the share of its time that the trainer
waited for data.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal

import torch
import tyro

from benchmarks.feed import Config as FeedConfig
from benchmarks.feed import collate, fed, jpegs, prior_task, quiet, tokenizer_task, write_codes, write_images
from benchmarks.loop import OPTIM, bare
from infra.cluster import Cluster, connect, laptop
from infra.data.images import decode
from infra.metrics import read_scalars
from infra.train.fit import Training, fit
from infra.train.loop import TrainConfig
from infra.train.task import Task
from t2i.priors.autoregressive import AutoregressiveConfig
from workflows.ingest import IngestConfig, ingest

LONG = AutoregressiveConfig(width=128, layers=4, heads=4)
SHORT = AutoregressiveConfig(width=64, layers=2, heads=2)


@dataclass(frozen=True, kw_only=True)
class Case:
    rows: int
    batch: int
    steps: int
    log_every: int
    warm: int


@dataclass(frozen=True, kw_only=True)
class Config:
    only: Literal["all", "long", "short", "images"] = "all"
    rounds: int = 5
    long: Case = Case(rows=8000, batch=16, steps=60, log_every=5, warm=10)
    long_model: AutoregressiveConfig = LONG
    short: Case = Case(rows=40_000, batch=16, steps=2400, log_every=50, warm=400)
    short_model: AutoregressiveConfig = SHORT
    images: Case = Case(rows=2000, batch=32, steps=100, log_every=5, warm=20)
    channels: int = 32


def fitted(task: Task, artifact: str, case: Case, out: str) -> tuple[list[float], float]:
    """The same of `fit`, and the share of its time that it waited for data."""
    train = TrainConfig(steps=case.steps, batch=case.batch, log_every_steps=case.log_every, save_every_steps=case.steps)
    fit([Training(task, [artifact], train, out)], Cluster(name="one"), quiet)
    rows = [row for row in read_scalars(out) if row["step"] > case.warm]
    seconds = [1 / row["steps_per_second"] for row in rows]
    waited = sum(row["waiting_share"] * each for row, each in zip(rows, seconds, strict=True))
    return seconds, waited / sum(seconds)


def compare(task: Task, artifact: str, case: Case, config: Config, place: str, tars: str = "") -> dict[str, Any]:
    batches = list(islice(in_memory(task, artifact, case, tars), 50))
    decoding = decode_seconds(task, tars, case) if tars else 0.0
    figures: dict[str, list[float]] = {"bare": [], "fit": [], "ratio": []}
    shares: list[float] = []
    for number in range(config.rounds):
        for kind in ("fit", "bare") if number % 2 else ("bare", "fit"):
            if kind == "fit":
                seconds, share = fitted(task, artifact, case, f"{place}/out-{number}")
                shares.append(share)
            else:
                (update,) = task.updates()
                steps = islice(([batch] for batch in cycle(batches)), case.steps)
                seconds = bare(update, steps, case.log_every, case.warm).seconds
            figures[kind].append(statistics.median(seconds))
        figures["ratio"].append(figures["bare"][-1] / figures["fit"][-1])
        print(number, {name: values[-1] for name, values in figures.items()}, shares[-1], file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    result = {
        "bare_ms": round(medians["bare"] * 1000, 2),
        "fit_ms": round(medians["fit"] * 1000, 2),
        "bare_to_fit": round(medians["ratio"], 3),
        "least_and_most": [round(min(figures["ratio"]), 3), round(max(figures["ratio"]), 3)],
        "waiting": round(statistics.median(shares), 4),
    }
    if tars:
        possible = medians["bare"] / (medians["bare"] + decoding)
        result |= {"decode_ms": round(decoding * 1000, 2), "possible": round(possible, 3)}
        result["of_possible"] = round(medians["ratio"] / possible, 3)
    return result


def in_memory(task: Task, artifact: str, case: Case, tars: str) -> Iterator[dict[str, torch.Tensor]]:
    """Batches as the feed makes them; of pictures, the same ones as tensors."""
    if not tars:
        yield from fed(task, artifact, FeedConfig(batch=case.batch), 1)
        return
    encoded = jpegs(tars, 1)
    while data := list(islice(encoded, case.batch)):
        yield collate(task, {"pixels": [decode(one) for one in data]}) | {"weight": torch.ones(len(data))}


def decode_seconds(task: Task, tars: str, case: Case) -> float:
    """Of decoding and collating a batch, in one thread; the median of some."""
    encoded, times = jpegs(tars, 1), []
    while len(data := list(islice(encoded, case.batch))) == case.batch:
        began = time.perf_counter()
        collate(task, {"pixels": [decode(one) for one in data]})
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    connect(laptop())
    figures: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory() as place:
        for name, grid in (("long", (16, 16)), ("short", (4, 4))):
            if config.only in ("all", name):
                case, model = getattr(config, name), getattr(config, f"{name}_model")
                write_codes(f"{place}/{name}", case.rows, 8, grid[0] * grid[1], 512)
                task = prior_task(f"{place}/{name}", grid, 512, model, optim=OPTIM)
                figures[name] = compare(task, f"{place}/{name}", case, config, f"{place}/{name}-runs")
        if config.only in ("all", "images"):
            tars, images = f"{place}/tars", f"{place}/images"
            write_images(tars, config.images.rows, 8)
            ingest.work(IngestConfig(corpus=tars, test_fraction=0.0), out=images, cluster=laptop(), report=quiet)
            task = tokenizer_task(config.channels)
            figures["images"] = compare(task, images, config.images, config, f"{place}/image-runs", tars)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config))
