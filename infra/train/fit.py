"""Train a Task on Ray Train: as many workers as the Cluster has, DeepSpeed ZeRO between them, Ray Data before them."""

import os
import shutil
import tempfile
import threading
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.torch
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
class _Job:
    """All that a training worker has to know."""

    task: Task
    inputs: list[str]
    shards: list[str]
    counts: list[int]
    config: TrainConfig
    cluster: Cluster
    out: str


def fit(
    task: Task, inputs: list[str], config: TrainConfig, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Train `task` on the rows of `inputs` (artifacts of one ingest, joined by shard) and export it to `<out>/model`.

    Continues from the newest whole checkpoint under `<out>/checkpoints`; returns the figures of the last logged step.
    """
    finished = storage.join(out, FINISHED)
    if not storage.exists(finished):
        connect(cluster)
        counts = count_rows(inputs, task.where, task.where_reads)
        job = _Job(task, inputs, list(counts), list(counts.values()), config, cluster, out)
        BatchPlan(job.counts, config.batch, config.seed, config.window_shards)  # no rows: said before anything starts
        with _Follow(out, config.steps, report):
            _run(job)
        last = read_scalars(out)[-1]
        storage.write_json(finished, {"rows": sum(job.counts), **last})
    return storage.read_json(finished)


def _run(job: _Job) -> None:
    cluster = job.cluster
    low, high = cluster.workers
    # Ray Train's own run folder holds nothing that is needed again: checkpoints are ours, under `out`.
    scratch = tempfile.mkdtemp(prefix="rescribe-train-")
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"job": job},
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
    from infra.train.feed import Feed

    job: _Job = arguments["job"]
    config, cluster = job.config, job.cluster
    torch.set_num_threads(cluster.threads_per_worker)
    zero.start(cluster.backend)
    share = -(-config.batch // world.size())
    micro_batch = min(cluster.micro_batch or share, share)
    micro_steps = -(-share // micro_batch)
    plan = BatchPlan(job.counts, config.batch, config.seed, config.window_shards)
    feed = Feed(
        job.task, job.inputs, job.shards, plan, config.steps, world.rank(), world.size(), micro_batch, micro_steps,
        cluster.feed_tasks,
    )  # fmt: skip

    def make_engine(update: Any, micro_steps: int, saved: Any) -> zero.ZeroEngine:
        return zero.ZeroEngine(
            update, micro_steps, saved, stage=cluster.zero_stage, precision=config.precision, micro_batch=micro_batch
        )

    folder = storage.join(job.out, "checkpoints")
    log = _Log(job.out, folder)
    final = train(job.task, feed, make_engine, micro_steps, config, folder, log)
    log.close()
    if world.rank() == 0:
        _export(job.task, final, storage.join(job.out, "model"))


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
    """Turns the scalar log that rank 0 writes into progress reports of the driver."""

    def __init__(self, out: str, steps: int, report: Report) -> None:
        self._out, self._steps, self._report = out, steps, report
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        every = 1.0 if storage.is_local(self._out) else 10.0
        while not self._stop.wait(every):
            rows = read_scalars(self._out)
            if rows:
                losses = {name: value for name, value in rows[-1].items() if _is_loss(name)}
                self._report(rows[-1]["step"], self._steps, "steps", **losses)


def _is_loss(name: str) -> bool:
    return "/" in name and not name.endswith(("/lr", "/grad_norm"))


def _cause(error: BaseException) -> str:
    """The worker's own last line, not the traceback around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"Training failed: {lines[-1] if lines else error!r}"
