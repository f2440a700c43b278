"""What runs in every training worker: the trainings of its group, one after another."""

import gc
import os
import pickle
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from infra import storage
from infra.cluster import Cluster
from infra.data.shards import count_buckets, count_rows
from infra.metrics import ScalarLog, read_scalars
from infra.track import Tell, tracked
from infra.train import checkpoint, world
from infra.train.board import Beat, Pulse
from infra.train.buckets import BucketPlan
from infra.train.engine import load_weights
from infra.train.flops import of_training
from infra.train.ids import IdLog
from infra.train.loop import Diverged, DoesNotFitError, Left, TrainConfig, train
from infra.train.plan import BatchPlan, Plan
from infra.train.task import Batch, Task

if TYPE_CHECKING:
    from infra.train.feed import Feed

FINISHED = "finished.json"  # written last: what is trained is not trained again

Counts = dict[str, int] | dict[str, dict[str, int]]  # usable rows by shard, or by shard and bucket


@dataclass(frozen=True)
class Training:
    """What is trained, on the rows of which artifacts (of one ingest, joined by shard), how, and where it ends up."""

    task: Task
    inputs: list[str]
    config: TrainConfig
    out: str

    @property
    def checkpoints(self) -> str:
        """The folder of its checkpoints."""
        return storage.join(self.out, "checkpoints")

    def count(self) -> Counts:
        """How many usable rows each shard has."""
        task = self.task
        if task.bucket is None:
            return count_rows(self.inputs, task.where, task.where_reads)
        return count_buckets(self.inputs, task.bucket, task.where, task.where_reads)

    def plan(self, counts: Counts) -> Plan:
        """The order of its rows, given how many usable ones each shard has. ValueError where there is none."""
        kind: Any = BatchPlan if self.task.bucket is None else BucketPlan
        return kind(list(counts.values()), self.config.batch, self.config.seed, self.config.window_shards)

    def finished(self) -> bool:
        """Whether it was trained and exported."""
        return storage.exists(storage.join(self.out, FINISHED))


@dataclass(frozen=True)
class Job:
    """All that a training worker has to know: the trainings that are left, and the rows of each shard of each.

    `most` are rows that it takes at once at most, by the `out` of a training; others are not limited.
    """

    trainings: list[Training]
    counts: list[Counts]
    cluster: Cluster
    most: dict[str, int] = field(default_factory=dict)


def work(arguments: dict[str, Any]) -> None:
    """Train what is left to train; returns when all is finished, or when the board said to leave."""
    import ray  # slow to import: `plan` does without

    from infra.train import zero  # DeepSpeed is loaded where it is used, after the worker's environment is set

    job: Job = pickle.loads(arguments["job"])
    group, board = arguments["group"], arguments["board"]

    def tell(beat: Beat) -> bool:
        return ray.get(board.beat.remote(group, beat), timeout=10)

    rank, runtime = int(os.environ["RANK"]), ray.get_runtime_context()
    # Bytes: the board would otherwise import Ray Train only to hand it on.
    handle = ray.cloudpickle.dumps(runtime.current_actor)  # pyright: ignore[reportAttributeAccessIssue]
    board.hello.remote(group, rank, handle, runtime.get_runtime_env_string())
    pulse = Pulse(rank, runtime.get_node_id(), tell, int(os.environ["WORLD_SIZE"]))
    try:
        torch.set_num_threads(job.cluster.threads_per_worker)
        zero.start(job.cluster.backend)
        for number, (training, counts) in enumerate(zip(job.trainings, job.counts, strict=True)):
            pulse.at("start", training=number)
            if not world.from_first(world.rank() == 0 and training.finished()):
                _train(training, counts, job.cluster, job.most.get(training.out, 0), pulse)
            gc.collect()  # engines are rings of references: the next one's memory is this one's
        pulse.at("done")
    except Left:
        pulse.at("done")
    finally:
        pulse.close()


def _train(training: Training, counts: Counts, cluster: Cluster, most: int, pulse: Pulse) -> None:
    from infra.train import zero
    from infra.train.feed import Feed

    task, config = training.task, training.config
    micro_batch, micro_steps = cluster.micro_batches(config.batch, world.size(), most)
    plan = training.plan(counts)
    feed = Feed(
        task, training.inputs, list(counts), plan, config.steps, world.rank(), world.size(),
        micro_batch, micro_steps, cluster.feed_tasks,
    )  # fmt: skip

    def make_engine(update: Any, micro_steps: int, saved: Any) -> zero.ZeroEngine:
        return zero.ZeroEngine(
            update, micro_steps, saved, stage=cluster.zero_stage, precision=config.precision, micro_batch=micro_batch,
            offload=cluster.offload, recompute=cluster.recompute,
        )  # fmt: skip

    watch = _Watch(pulse, storage.join(training.out, "ids") if cluster.log_ids else None)
    with tracked(cluster.track if world.rank() == 0 else (), training.out) as tell:
        log = _Log(training, pulse, tell)
        try:
            final = train(task, feed, make_engine, micro_steps, config, training.checkpoints, log, watch)
        except Left:
            log.close()
            raise
        except Diverged as error:
            log.close()
            raise Diverged(f"{error} {_blamed(training, feed, error.step)}", error.step) from None
        except DoesNotFitError as error:
            raise DoesNotFitError(str(error), error.rows, training.out) from None
        pulse.at("export")
        log.close()
    if world.rank() == 0:
        _export(task, final, storage.join(training.out, "model"))
        figures = read_scalars(training.out)[-1]
        figures |= of_training(final.meta.get("flops", {}), plan, config.steps)
        storage.write_json(storage.join(training.out, FINISHED), {"rows": plan.rows_per_epoch, **figures})


def _blamed(training: Training, feed: "Feed", step: int) -> str:
    """The rows of a step that diverged, listed in a file, and what to do."""
    ids, url = feed.sample_ids(step - 1), storage.join(training.out, "diverged.json")
    if world.rank() == 0:
        storage.write_json(url, {"step": step, "sample_ids": ids})
    return (
        f"Its {len(ids)} rows are listed in {url}: {', '.join(ids[:3])}, ... The last checkpoint is good: lower the "
        "learning rate, or leave out rows that are broken."
    )


class _Watch:
    """The loop's Watch: the pulse, and a log of the rows that are used, where one is wanted."""

    def __init__(self, pulse: Pulse, ids: str | None) -> None:
        self._pulse, self._folder, self._ids = pulse, ids, None
        self.leaving = pulse.leaving

    def begin(self, step: int) -> None:
        self._ids = IdLog(self._folder, step) if self._folder else None

    def at(self, phase: Literal["data", "step", "save"], *, step: int) -> None:
        self._pulse.at(phase, step=step)
        if phase == "save" and self._ids is not None:
            self._ids.flush()  # before any worker's part: a checkpoint that counts has the ids of its steps

    def uses(self, step: int, micro_batches: list[Batch]) -> None:
        if self._ids is not None:
            self._ids(step, micro_batches)


class _Log:
    """Rank 0's scalar log, opened at its first line, since TensorBoard is slow to import; the board learns all, too."""

    def __init__(self, training: Training, pulse: Pulse, tell: Tell) -> None:
        self._out, self._pulse, self._tell = training.out, pulse, tell
        self._start = 0
        self._log: ScalarLog | None = None

    def begin(self, step: int) -> None:
        self._start = step

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        if self._log is None:
            self._log = ScalarLog(self._out, self._start, self._tell)
        self._log(step, figures)
        self._pulse.logged(figures)

    def flush(self) -> None:
        if self._log is not None:
            self._log.flush()

    def close(self) -> None:
        if self._log is not None:
            self._log.close()


def _export(task: Task, saved: checkpoint.Checkpoint, out: str) -> None:
    """The averaged weights (the last ones, where no average is kept), in the form that users load."""
    storage.sweep(out)  # of an export that was killed
    updates = task.updates()
    for update in updates:
        load_weights(update, saved, "ema")
    with tempfile.TemporaryDirectory() as folder:
        task.export({update.name: update.module.eval() for update in updates}, folder)
        storage.upload(folder, out)
