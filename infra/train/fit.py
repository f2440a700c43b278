"""Train a Task on Ray Train: as many workers as the Cluster has, DeepSpeed ZeRO between them, Ray Data before them."""

import gc
import os
import pickle
import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from infra import storage
from infra.cluster import Cluster, connect
from infra.data.shards import count_rows
from infra.metrics import Report, ScalarLog, read_scalars
from infra.train import checkpoint, world
from infra.train.engine import load_weights
from infra.train.loop import TrainConfig, train
from infra.train.plan import BatchPlan
from infra.train.task import Task

# How often Ray Train looks at its workers; read by its controller, which inherits it from whoever starts Ray.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

FINISHED = "finished.json"  # written last: what is trained is not trained again


@dataclass(frozen=True)
class Training:
    """What is trained, on the rows of which artifacts (of one ingest, joined by shard), how, and where it ends up."""

    task: Task
    inputs: list[str]
    config: TrainConfig
    out: str


@dataclass(frozen=True)
class _Job:
    """All that a training worker has to know: the trainings that are left, and the rows of each shard of each."""

    trainings: list[Training]
    counts: list[dict[str, int]]
    cluster: Cluster


def fit(trainings: Sequence[Training], cluster: Cluster, report: Report) -> dict[str, Any]:
    """Train each task in turn and export it to its `<out>/model`; a task may begin from the model of one before.

    One group of workers trains them all: on a small machine its start takes longer than a small training. Each
    continues from the newest whole checkpoint under its `<out>/checkpoints`. Returns the figures that each logged
    last, those of a later training over those of the same name of one before.
    """
    left = [training for training in trainings if not storage.exists(storage.join(training.out, FINISHED))]
    if left:
        connect(cluster)
        counts = [count_rows(each.inputs, each.task.where, each.task.where_reads) for each in left]
        for each, rows in zip(left, counts, strict=True):
            _plan(each, rows)  # no rows: said before anything starts
        with _Follow(left, report):
            _run(_Job(left, counts, cluster))
    figures: dict[str, Any] = {}
    for training in trainings:
        figures |= storage.read_json(storage.join(training.out, FINISHED))
    return figures


def _plan(training: Training, counts: dict[str, int]) -> BatchPlan:
    config = training.config
    return BatchPlan(list(counts.values()), config.batch, config.seed, config.window_shards)


def _run(job: _Job) -> None:
    import ray.cloudpickle
    import ray.train.torch  # slow to import: `--help` and `plan` do without

    cluster = job.cluster
    low, high = cluster.workers_for(max(training.config.batch for training in job.trainings))
    # Ray Train's own run folder holds nothing that is needed again: checkpoints are ours, under `out`.
    scratch = tempfile.mkdtemp(prefix="rescribe-train-")
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        # Bytes: Ray Train's controller would otherwise import the model's libraries only to hand the job on.
        train_loop_config={"job": ray.cloudpickle.dumps(job)},  # pyright: ignore[reportPrivateImportUsage]
        torch_config=ray.train.torch.TorchConfig(backend=cluster.backend),
        scaling_config=ray.train.ScalingConfig(
            num_workers=low if low == high else (low, high),
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker}
            | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}),
        ),
        run_config=ray.train.RunConfig(
            name="run", storage_path=scratch, failure_config=ray.train.FailureConfig(max_failures=3)
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise RuntimeError(_cause(error)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _worker(arguments: dict[str, Any]) -> None:
    """Runs in every training worker."""
    from infra.train import zero  # DeepSpeed is loaded where it is used, after the worker's environment is set

    job: _Job = pickle.loads(arguments["job"])
    torch.set_num_threads(job.cluster.threads_per_worker)
    zero.start(job.cluster.backend)
    for training, counts in zip(job.trainings, job.counts, strict=True):
        finished = storage.join(training.out, FINISHED)
        if not world.from_first(world.rank() == 0 and storage.exists(finished)):
            _train(training, counts, job.cluster)
            if world.rank() == 0:
                storage.write_json(finished, {"rows": sum(counts.values()), **read_scalars(training.out)[-1]})
        gc.collect()  # engines are rings of references: the next one's memory is this one's


def _train(training: Training, counts: dict[str, int], cluster: Cluster) -> None:
    from infra.train import zero
    from infra.train.feed import Feed

    task, config = training.task, training.config
    micro_batch, micro_steps = cluster.micro_batches(config.batch, world.size())
    feed = Feed(
        task, training.inputs, list(counts), _plan(training, counts), config.steps, world.rank(), world.size(),
        micro_batch, micro_steps, cluster.feed_tasks,
    )  # fmt: skip

    def make_engine(update: Any, micro_steps: int, saved: Any) -> zero.ZeroEngine:
        return zero.ZeroEngine(
            update, micro_steps, saved, stage=cluster.zero_stage, precision=config.precision, micro_batch=micro_batch
        )

    folder = storage.join(training.out, "checkpoints")
    log = _Log(training.out, folder)
    final = train(task, feed, make_engine, micro_steps, config, folder, log)
    log.close()
    if world.rank() == 0:
        _export(task, final, storage.join(training.out, "model"))


class _Log:
    """Rank 0's scalar log, opened at its first line."""

    def __init__(self, out: str, checkpoints: str) -> None:
        self._out, self._checkpoints = out, checkpoints
        self._log: ScalarLog | None = None

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        if self._log is None:
            newest = checkpoint.newest(self._checkpoints)
            self._log = ScalarLog(self._out, checkpoint.step_of(newest) if newest else 0)
        self._log(step, figures)

    def flush(self) -> None:
        if self._log is not None:
            self._log.flush()

    def close(self) -> None:
        if self._log is not None:
            self._log.close()


def _export(task: Task, saved: checkpoint.Checkpoint, out: str) -> None:
    """The averaged weights (the last ones, where no average is kept), in the form that users load."""
    updates = task.updates()
    for update in updates:
        load_weights(update, saved, "ema")
    with tempfile.TemporaryDirectory() as folder:
        task.export({update.name: update.module.eval() for update in updates}, folder)
        storage.upload(folder, out)


class _Follow:
    """Turns the scalar logs that rank 0 writes into progress reports of the driver."""

    def __init__(self, trainings: Sequence[Training], report: Report) -> None:
        self._trainings, self._report = trainings, report
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        current = 0
        while not self._stop.wait(1.0 if storage.is_local(self._trainings[current].out) else 10.0):
            following = self._trainings[current + 1 :]
            current += bool(following and read_scalars(following[0].out))
            rows = read_scalars(self._trainings[current].out)
            if rows:
                losses = {name: value for name, value in rows[-1].items() if _is_loss(name)}
                self._report(rows[-1]["step"], self._trainings[current].config.steps, "steps", **losses)


def _is_loss(name: str) -> bool:
    return "/" in name and not name.endswith(("/lr", "/grad_norm"))


def _cause(error: BaseException) -> str:
    """The worker's own last line, not the traceback around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"Training failed: {lines[-1] if lines else error!r}"
