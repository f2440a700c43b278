"""What does a training step cost in the loop with DeepSpeed, on a GPU where there is one? Does `torch.compile` hold?

    python -m benchmarks.loop --stages 0 1 2 3 --compiled False True
    python -m benchmarks.loop --precision bf16 --model.width 1024 --model.layers 24 --model.heads 16 --batch 64

One worker trains a prior by the loop and `ZeroEngine`, as training does, without Ray: nothing here imports it. It is
measured against a bare PyTorch loop with the same model, losses, AdamW with its moving average, clipping and autocast.
Both find their batches as tensors in the memory of the host. Each run is a process of its own, since ZeRO 3 changes
torch's functions in its process for good; they run in turns, now one first and now the other. Of each, the seconds of a
step are taken over every `log_every` steps after `warm` ones, and their median counts.

Prints one JSON object: for each stage, compiled or not, milliseconds a step, the median over rounds of bare to loop of
the same round (1: nothing is lost) and of compiled to not, FLOP/s that the model asks for and, on a GPU that is known,
their share of its peak; the largest difference of a logged loss from the bare loop's without a compiler, relative; of
`torch.compile`, how many graphs it made of the model and where it had to leave it; on a GPU, the most bytes held.
"""

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from typing import Any, Literal

import torch
import tyro

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # read at import

from benchmarks.nodes import free_port
from infra.train import zero
from infra.train.loop import TrainConfig, train
from infra.train.optim import AdamW, OptimConfig, parameter_groups
from infra.train.task import Batch, Update
from t2i.conditions.words import WordsConfig
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.protocol import Space

OPTIM = OptimConfig(lr=1e-4, warmup_steps=0, schedule="constant", ema_decay=0.99)
PRIOR = AutoregressiveConfig(width=128, layers=4, heads=4)
CPU = torch.device("cpu")
VOCABULARY, TEXT, CODEBOOK = 512, 32, 512


@dataclass(frozen=True, kw_only=True)
class Config:
    stages: tuple[int, ...] = (0, 1, 2, 3)  # of ZeRO
    compiled: tuple[bool, ...] = (False,)
    precision: Literal["fp32", "bf16"] = "fp32"
    model: AutoregressiveConfig = PRIOR
    grid: tuple[int, int] = (16, 16)
    batch: int = 16
    micro_steps: int = 1
    steps: int = 60
    log_every: int = 5
    warm: int = 10
    rounds: int = 3


@dataclass
class Run:
    """What was seen of one training."""

    seconds: list[float]  # of a step, over each `log_every` of them after the warm ones
    losses: list[float]  # of the steps that are logged
    figures: dict[str, float]


class Log:
    """Keeps the figures of the loop."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def begin(self, step: int) -> None: ...

    def flush(self) -> None: ...

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        self.rows.append(figures | {"done": step})


@dataclass
class PriorAlone:
    """A Task of one module; the loop asks it for nothing else."""

    update: Update

    def updates(self) -> list[Update]:
        return [self.update]


def build(config: Config, compiled: bool) -> Update:
    """The prior, the same each time."""
    torch.manual_seed(0)
    words = WordsConfig(vocabulary_size=VOCABULARY, length=TEXT)
    prior = config.model.build(Space(config.grid, codes=CODEBOOK), (words,))
    if compiled:
        prior.compile()
    return Update("prior", prior, OPTIM)


def batches(config: Config, number: int = 20) -> list[list[Batch]]:
    """Micro-batches of some steps, of chance codes; used again and again."""
    generator = torch.Generator().manual_seed(0)
    rows, places = config.batch // config.micro_steps, config.grid[0] * config.grid[1]

    def micro_batch() -> Batch:
        return {
            "text": torch.randint(1, VOCABULARY, (rows, TEXT), generator=generator),
            "values": torch.randint(CODEBOOK, (rows, places), generator=generator),
            "weight": torch.ones(rows),
        }

    return [[micro_batch() for _ in range(config.micro_steps)] for _ in range(number)]


def bare(
    update: Update,
    steps: Iterable[list[Batch]],
    log_every: int,
    warm: int,
    device: torch.device = CPU,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Run:
    """The step as one would write it; `steps` yields the micro-batches of each."""
    module = update.module.to(device)
    optimizer = AdamW(parameter_groups(module, update.optim), update.optim)
    marks, losses = [], []
    for done, micro_batches in enumerate(steps):
        if done >= warm and (done - warm) % log_every == 0:
            settle(device)
            marks.append(time.perf_counter())
        targets = [module.targets(batch) for batch in micro_batches]  # type: ignore[operator]
        counts = {name: sum(each[name] for each in targets) for name in targets[0]}
        total = torch.zeros((), device=device)
        for batch in micro_batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                sums = module({name: column.to(device) for name, column in batch.items()})
            terms = [update.loss_weights.get(name, 1.0) * value / counts[name] for name, value in sums.items()]
            loss = torch.stack(terms).sum()
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(module.parameters(), update.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if (done + 1) % log_every == 0:
            losses.append(float(total))
    return Run([(b - a) / log_every for a, b in pairwise(marks)], losses, {})


def looped(update: Update, steps: Iterator[list[Batch]], config: Config, stage: int) -> Run:
    """The loop and DeepSpeed."""
    log = Log()
    micro_batch = config.batch // config.micro_steps

    def engine(update: Update, micro_steps: int, saved: Any) -> zero.ZeroEngine:
        return zero.ZeroEngine(
            update, micro_steps, saved, stage=stage, precision=config.precision, micro_batch=micro_batch
        )

    train_config = TrainConfig(
        steps=config.steps, batch=config.batch, log_every_steps=config.log_every, save_every_steps=config.steps
    )
    with tempfile.TemporaryDirectory() as folder:
        train(PriorAlone(update), lambda _: steps, engine, config.micro_steps, train_config, folder, log)  # type: ignore[arg-type]
    counted = [row for row in log.rows if row["done"] > config.warm]
    told = ("model_flops_per_second", "model_flops_utilization")
    figures = {name: statistics.median(row[name] for row in counted) for name in told if name in counted[0]}
    return Run([1 / row["steps_per_second"] for row in counted], [row["prior/codes"] for row in log.rows], figures)


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured(kind: int | str, compiled: bool, config: Config) -> Run:
    """One training in a process of its own, from the same weights on the same batches."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    update, steps = build(config, compiled), cycle(batches(config))
    if kind == "bare":
        run = bare(update, islice(steps, config.steps), config.log_every, config.warm, device, config.precision)
    else:
        alone()
        zero.start("nccl" if device.type == "cuda" else "gloo")
        run = looped(update, steps, config, int(kind))
    assert "ray" not in sys.modules
    if device.type == "cuda":
        run.figures["gb"] = torch.cuda.max_memory_allocated() / 1e9
    if compiled:
        counters = torch._dynamo.utils.counters
        run.figures["graphs"] = counters["stats"]["unique_graphs"]
        run.figures["graph_breaks"] = sum(counters["graph_break"].values())
    return run


def compare(config: Config) -> list[dict[str, Any]]:
    """The figures of every kind of training."""
    kinds = [(kind, compiled) for compiled in config.compiled for kind in ("bare", *config.stages)]
    runs: dict[tuple[int | str, bool], list[Run]] = {each: [] for each in kinds}
    spawn = multiprocessing.get_context("spawn")
    for number in range(config.rounds):
        for kind, compiled in kinds[:: -1 if number % 2 else 1]:
            with ProcessPoolExecutor(1, mp_context=spawn) as one:
                run = one.submit(measured, kind, compiled, config).result()
            runs[kind, compiled].append(run)
            print(
                number, kind, compiled, f"{1000 * statistics.median(run.seconds):.2f} ms", file=sys.stderr, flush=True
            )
    reference = runs["bare", config.compiled[0]][0].losses
    found = []
    for (kind, compiled), tried in runs.items():
        ratios = [own / each for own, each in zip(times(runs["bare", compiled]), times(tried), strict=True)]
        off = max(abs(a / b - 1) for a, b in zip(tried[0].losses, reference, strict=True))
        row: dict[str, Any] = {
            "kind": "bare" if kind == "bare" else f"loop, ZeRO {kind}",
            "compiled": compiled,
            "ms": round(1000 * statistics.median(times(tried)), 2),
            "bare_to_this": round(statistics.median(ratios), 3),
            "least_and_most": [round(min(ratios), 3), round(max(ratios), 3)],
            "loss_off": float(f"{off:.1e}"),
        }
        if compiled and (kind, False) in runs:
            plain = zip(times(runs[kind, False]), times(tried), strict=True)
            row["plain_to_compiled"] = round(statistics.median(a / b for a, b in plain), 3)
        found.append(row | {name: float(f"{value:.4g}") for name, value in tried[-1].figures.items()})
    return found


def times(runs: list[Run]) -> list[float]:
    """Seconds of a step, by round."""
    return [statistics.median(run.seconds) for run in runs]


def alone() -> None:
    """What a group of one worker is told."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **where}


def main(config: Config) -> None:
    if config.batch % config.micro_steps or config.steps % config.log_every:
        raise SystemExit("batch must be a multiple of micro_steps, and steps one of log_every.")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(json.dumps({"device": name, "precision": config.precision, "runs": compare(config)}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config))
