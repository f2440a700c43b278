"""The one loop that trains everything: captioner, tokenizers, priors, with one optimizer or two."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from infra.train import checkpoint, world
from infra.train.engine import Engine, EngineFactory
from infra.train.optim import learning_rate
from infra.train.task import Batch, Task, Update


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on how much at a time, and how exactly; all of it changes the numbers of a run."""

    steps: int
    batch: int = 64  # rows of the global batch of one training step, over all workers
    seed: int = 0  # of the order of the rows and of every draw that belongs to a row
    precision: Literal["fp32", "bf16"] = "fp32"
    window_shards: int = 16  # rows are permuted within windows of so many permuted shards
    log_every_steps: int = 10
    save_every_steps: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "window_shards", "log_every_steps", "save_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but it is {getattr(self, name)}.")


class Log(Protocol):
    """Where rank 0 writes the figures of a training step."""

    def __call__(self, step: int, figures: dict[str, float]) -> None: ...

    def flush(self) -> None:
        """Called before a checkpoint: a run that continues there must find all figures up to it."""
        ...


Feed = Callable[[int], Iterator[list[Batch]]]
"""feed(first step) yields, step by step, this worker's micro-batches of the global batch."""


def train(
    task: Task,
    feed: Feed,
    make_engine: EngineFactory,
    micro_steps: int,
    config: TrainConfig,
    folder: str,
    log: Log,
) -> checkpoint.Checkpoint:
    """Train `task` for `config.steps` steps, continuing from the newest whole checkpoint under `folder`.

    `log(step, figures)` is called on rank 0. Returns the checkpoint of the last step. Raises FloatingPointError when
    the loss is no longer a finite number.
    """
    saved = _newest(folder)
    start = saved.step if saved else 0
    if saved and start >= config.steps:
        return saved
    engines = [make_engine(update, micro_steps, saved) for update in task.updates()]
    clock = _Clock(start)
    for step, micro_batches in zip(range(start, config.steps), feed(start), strict=False):
        last = step + 1 == config.steps
        for batch in micro_batches:
            batch["step"] = torch.tensor(step)
        figures = {}
        for engine in engines:
            if step >= engine.update.start_step:
                figures |= _turn(engine, micro_batches, step, config)
        if (step + 1) % config.log_every_steps == 0 or last:
            _report(log, step + 1, figures, clock, config)
        if (step + 1) % config.save_every_steps == 0 or last:
            state = {name: tensor for engine in engines for name, tensor in engine.state().items()}
            meta = {"updates": {engine.update.name: engine.meta() for engine in engines}}
            if world.rank() == 0:
                log.flush()
            checkpoint.write(folder, step + 1, state, meta)
    return _newest(folder) or _no_checkpoint(folder)


def _turn(engine: Engine, micro_batches: list[Batch], step: int, config: TrainConfig) -> dict[str, torch.Tensor]:
    """One optimizer step of one Update: the mean of each loss over all valid targets of the global batch."""
    update = engine.update
    counts = _counts(update, micro_batches)
    if update.mixes_rows and len(micro_batches) > 1:
        micro_batches = _acquainted(engine, micro_batches)
    sums: dict[str, torch.Tensor] = {}
    for batch in micro_batches:
        losses = engine(batch)
        terms = [update.loss_weights.get(name, 1.0) * value / counts[name] for name, value in losses.items()]
        engine.backward(torch.stack([term.float() for term in terms]).sum())
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros(())) + value.detach().float().cpu()
    lr = learning_rate(update.optim, step - update.start_step, config.steps - update.start_step)
    norm = engine.step(lr)
    figures = {f"{update.name}/{name}": value / counts[name] for name, value in sums.items()}
    return figures | {f"{update.name}/lr": torch.tensor(lr), f"{update.name}/grad_norm": torch.tensor(norm)}


def _acquainted(engine: Engine, micro_batches: list[Batch]) -> list[Batch]:
    """Micro-batches that bring what all rows of the global batch show of themselves (GradCache, arXiv 2101.06983).

    A forward pass more, without gradients: else rows would see those of their own micro-batch alone, and how memory is
    shared out would change what is learned.
    """
    with torch.no_grad():
        shown = [engine({**batch, "survey": torch.tensor(True)}) for batch in micro_batches]
    seen = world.rows({name: torch.cat([part[name] for part in shown]) for name in shown[0]})
    first, sizes = seen.pop("first"), [len(batch["weight"]) for batch in micro_batches]
    columns = {f"all_{name}": column for name, column in seen.items()}
    return [
        {**batch, **columns, "all_first": first + sum(sizes[:number])} for number, batch in enumerate(micro_batches)
    ]


def _counts(update: Update, micro_batches: list[Batch]) -> dict[str, float]:
    """Targets of each loss over the global batch; at least 1, so that a batch without targets gives a loss of 0."""
    local = [update.module.targets(batch) for batch in micro_batches]  # type: ignore[operator]
    names = sorted(local[0])
    summed = world.total(
        torch.stack([torch.stack([torch.as_tensor(t[n]).float().cpu() for n in names]) for t in local]).sum(0)
    )
    return {name: max(1.0, float(value)) for name, value in zip(names, summed, strict=True)}


def _report(log: Log, step: int, figures: dict[str, torch.Tensor], clock: "_Clock", config: TrainConfig) -> None:
    """Log the figures of the step; losses are local sums over global counts: their total over workers is the mean."""
    losses = [name for name in figures if not name.endswith(("/lr", "/grad_norm"))]
    means = world.total(torch.stack([figures[name] for name in losses]))
    values: dict[str, Any] = {name: float(value) for name, value in zip(losses, means, strict=True)}
    if not all(math.isfinite(value) for value in values.values()):
        raise FloatingPointError(f"The loss is no finite number at step {step}: {values}. Lower the learning rate.")
    values |= {name: float(figures[name]) for name in figures if name not in values}
    if world.rank() == 0:
        log(step, values | clock.rates(step, config.batch))


class _Clock:
    """Steps and rows a second since the last report."""

    def __init__(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def rates(self, step: int, batch: int) -> dict[str, float]:
        now = time.perf_counter()
        rate = (step - self._step) / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return {"steps_per_second": rate, "rows_per_second": rate * batch}


def _newest(folder: str) -> checkpoint.Checkpoint | None:
    """What rank 0 finds is what all continue from."""
    url = world.from_first(checkpoint.newest(folder) if world.rank() == 0 else None)
    return checkpoint.Checkpoint(url) if url else None


def _no_checkpoint(folder: str) -> checkpoint.Checkpoint:
    raise RuntimeError(f"Training ended, but no checkpoint under {folder} is whole; run the same line again.")
