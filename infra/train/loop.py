"""The one loop that trains everything: captioner, tokenizers, priors, with one optimizer or two."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from infra.train import checkpoint, world
from infra.train.engine import EngineFactory
from infra.train.flops import Flops
from infra.train.optim import OptimConfig
from infra.train.settings import Precision
from infra.train.task import Batch, Task, Update
from infra.train.turn import Diverged as Diverged
from infra.train.turn import DoesNotFitError as DoesNotFitError
from infra.train.turn import counted, fitting, turn
from infra.train.writer import Writer


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on how much at a time, and how exactly; all of it changes the numbers of a run."""

    steps: int
    batch: int = 64  # rows of the global batch of one training step, over all workers
    seed: int = 0  # of the order of the rows and of every draw that belongs to a row
    precision: Precision = "fp32"
    window_shards: int = 16  # rows are permuted within windows of so many permuted shards
    log_every_steps: int = 10
    save_every_steps: int = 200
    stop_above: float = 1e6  # a loss, which is a mean over targets, of such a size has exploded

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "window_shards", "log_every_steps", "save_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but it is {getattr(self, name)}.")


class Trained(NamedTuple):
    """A training as far as a step's config tells; configs that train have them as `trainings`, in turn."""

    config: TrainConfig
    optimizers: dict[str, OptimConfig]  # by Update
    whole_weights: bool = False  # an Update computes with another's weights


class Log(Protocol):
    """Where rank 0 writes the figures of a training step."""

    def begin(self, step: int) -> None:
        """Training goes on after so many steps: what was logged of later ones is void."""
        ...

    def __call__(self, step: int, figures: dict[str, float]) -> None: ...

    def flush(self) -> None:
        """Called before a checkpoint: a run that continues there must find all figures up to it."""
        ...


class Watch(Protocol):
    """Who is told where training stands, on every worker, and says when it is to end before its time."""

    def begin(self, step: int) -> None:
        """Training goes on after so many steps; a collective."""
        ...

    def at(self, phase: Literal["data", "step", "save"], *, step: int) -> None: ...

    def uses(self, step: int, micro_batches: list[Batch]) -> None:
        """These are this worker's rows of a training step, from 0."""
        ...

    def leaving(self) -> bool:
        """Whether this worker is to save and to leave; if one is, all of them do, after the same step."""
        ...


class _Unwatched:
    def begin(self, step: int) -> None: ...

    def at(self, phase: str, *, step: int) -> None: ...

    def uses(self, step: int, micro_batches: list[Batch]) -> None: ...

    def leaving(self) -> bool:
        return False


class Left(Exception):  # noqa: N818 - no error
    """Training was told to leave, has saved what it has, and can be continued."""


def is_loss(figure: str) -> bool:
    """Whether a logged figure is a loss of an Update, by its name."""
    return "/" in figure and not figure.endswith(("/lr", "/grad_norm"))


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
    watch: Watch = _Unwatched(),  # noqa: B008 - it has no state
) -> checkpoint.Checkpoint:
    """Train `task` for `config.steps` steps, continuing from the newest whole checkpoint under `folder`.

    `log(step, figures)` is called on rank 0. Returns the checkpoint of the last step. Raises Diverged when a loss or
    a gradient is no longer a finite number, or a loss that is looked at (where figures are logged, and before every
    save) is none or beyond `config.stop_above`: nothing of that step is saved. Raises DoesNotFitError where memory
    is too small for a micro-batch, and Left, after a checkpoint, when `watch` says so.
    """
    saved = checkpoint.restore(folder)
    start = saved.step if saved else 0
    if saved and start >= config.steps:
        return saved
    engines = [make_engine(update, micro_steps, saved) for update in task.updates()]
    clock, score, flops = (
        _Clock(start),
        _Score(engines[0].update),
        Flops(config.steps, saved.meta.get("flops") if saved else None),
    )
    if world.rank() == 0:
        log.begin(start)
    watch.begin(start)

    def save(step: int) -> None:
        watch.at("save", step=step)
        writer.wait()  # before the state is copied: the one before it is held no longer
        if world.rank() == 0:
            log.flush()
        world.gather(None)  # who is slow is waited for here, whatever time the engine's own groups have
        writer.save(
            step,
            {name: tensor for engine in engines for name, tensor in engine.state().items()},
            {"updates": {engine.update.name: engine.meta() for engine in engines}, "flops": flops.state()},
            score.taken(),
        )

    with Writer(folder) as writer:
        try:
            watch.at("data", step=start)
            figures: dict[str, torch.Tensor] = {}
            for step, micro_batches in zip(range(start, config.steps), feed(start), strict=False):
                clock.arrived()
                writer.check()
                watch.at("step", step=step)
                for batch in micro_batches:
                    batch["step"] = torch.tensor(step)
                awake = [engine for engine in engines if step >= engine.update.start_step]
                counts, leaving = counted(awake, micro_batches, watch.leaving())
                if leaving:
                    if figures:
                        _means(figures, step, config.stop_above)
                        save(step)
                    raise Left(f"Left after {step} steps.")
                watch.uses(step, micro_batches)
                figures = {}
                for engine in awake:
                    told = counts[engine.update.name]
                    with fitting(len(micro_batches[0]["weight"])):
                        figures |= turn(engine, micro_batches, told, step, config.steps, config.precision, flops)
                done = step + 1
                saving = done % config.save_every_steps == 0 or done == config.steps
                logging = done % config.log_every_steps == 0 or done == config.steps
                if saving or logging:
                    means = _means(figures, done, config.stop_above)  # before a save: what diverged is never kept
                    score.add(means)
                    if logging and world.rank() == 0:
                        rates = clock.rates(done, config.batch)
                        rates |= flops.figures(rates["rows_per_second"], world.size())
                        if prepared := getattr(feed, "prepared", None):
                            rates["prepared_steps"] = float(prepared())
                        log(done, means | rates)
                if saving:
                    save(done)
                if done < config.steps:  # else the last save is waited for
                    watch.at("data", step=done)
                clock.waits()
        except (Left, Diverged):  # all workers raise it at the same step: what they saved is to count
            watch.at("save", step=step)
            writer.close()
            raise
    return checkpoint.Checkpoint(checkpoint.place(folder, config.steps))


def _means(figures: dict[str, torch.Tensor], step: int, most: float) -> dict[str, float]:
    """The figures of a step over all workers; losses are local sums over global counts: their total is the mean."""
    losses = [name for name in figures if is_loss(name)]
    totals = world.total(torch.stack([figures[name] for name in losses]))
    values = dict(zip(losses, totals.tolist(), strict=True))
    if not all(math.isfinite(value) and abs(value) <= most for value in values.values()):
        said = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise Diverged(f"The loss is no finite number, or beyond {most:g}, at step {step}: {said}.", step)
    return values | {name: float(value) for name, value in figures.items() if name not in values}


class _Score:
    """The mean, over what was logged since the last save, of an Update's weighted loss: by it the best is kept."""

    def __init__(self, update: Update) -> None:
        self._update, self._seen = update, []

    def add(self, means: dict[str, float]) -> None:
        prefix, weights = f"{self._update.name}/", self._update.loss_weights
        names = [name for name in means if name.startswith(prefix) and is_loss(name)]
        if names:
            self._seen.append(sum(weights.get(name.removeprefix(prefix), 1.0) * means[name] for name in names))

    def taken(self) -> float | None:
        """The mean, and begin anew; None where nothing was logged."""
        seen, self._seen = self._seen, []
        return sum(seen) / len(seen) if seen else None


class _Clock:
    """Steps and rows a second since the last report, and the share of that time that was spent waiting for data."""

    def __init__(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()
        self._waiting, self._asked = 0.0, self._time

    def waits(self) -> None:
        """The next batch is asked for."""
        self._asked = time.perf_counter()

    def arrived(self) -> None:
        """It is there."""
        self._waiting += time.perf_counter() - self._asked

    def rates(self, step: int, batch: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._time, 1e-9)
        rate, waiting = (step - self._step) / seconds, self._waiting / seconds
        self._step, self._time, self._waiting = step, now, 0.0
        return {"steps_per_second": rate, "rows_per_second": rate * batch, "waiting_share": waiting}
