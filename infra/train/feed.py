"""Ray Data reads, decodes and collates each worker's part of the plan, in order, on any CPU of the cluster."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
import safetensors.numpy
import torch

from infra.data.shards import ShardReader, select_rows
from infra.train.draw import numeric_ids, uniforms
from infra.train.plan import BatchPlan, Rows
from infra.train.task import Batch, Task

SEGMENT = 4  # chunks that each task prepares before the next segment begins


@dataclass(frozen=True)
class Feed:
    """The micro-batches of one worker: `feed(step)` yields those of each training step from `step` on."""

    task: Task
    inputs: list[str]  # artifacts whose columns are joined shard by shard
    shards: list[str]  # names, in the order of plan.counts
    plan: BatchPlan
    steps: int
    rank: int
    world: int
    micro_batch: int
    micro_steps: int
    tasks: int = 1  # that prepare at a time for this worker

    @property
    def chunk(self) -> int:
        """Training steps that one task prepares: some hundred rows, so that a task is worth its start."""
        return max(1, min(32, 512 // (self.micro_batch * self.micro_steps)))

    def __call__(self, start: int) -> Iterator[list[Batch]]:
        """Segments of the plan, one prepared while the one before is trained on.

        Each segment is an execution of its own that runs to its end: under backpressure Ray Data's scheduling loop
        spins (2.60), and takes half of the Python of the worker that it feeds.
        """
        starts = range(start, self.steps, self.chunk)
        segments = [
            starts[first : first + SEGMENT * self.tasks] for first in range(0, len(starts), SEGMENT * self.tasks)
        ]
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._prepare, segments[0])
            for following in [*segments[1:], None]:
                blobs = coming.result()
                if following is not None:
                    coming = ahead.submit(self._prepare, following)
                for blob in blobs:
                    batch = {name: torch.from_numpy(array) for name, array in safetensors.numpy.load(blob).items()}
                    parts = {name: column.chunk(self.micro_steps) for name, column in batch.items()}
                    yield [{name: part[i] for name, part in parts.items()} for i in range(self.micro_steps)]

    def _prepare(self, starts: Sequence[int]) -> list[bytes]:
        """The batches of some chunks, one blob a training step."""
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        with ray.data.DataContext.current(context):
            chunks = ray.data.from_items([{"start": first} for first in starts], override_num_blocks=len(starts))
            prepared = chunks.map_batches(
                _Prepare(self),
                batch_size=1,
                batch_format="numpy",
                zero_copy_batch=True,
                num_cpus=1,
                compute=ray.data.TaskPoolStrategy(size=self.tasks),
            )
            return [row["batch"] for row in prepared.take_all()]


class _Prepare:
    """Chunk after chunk of training steps, each step's share of the global batch as one safetensors blob."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def __call__(self, chunk: Any) -> Any:
        batches = [blob for start in chunk["start"] for blob in self._prepare(int(start))]
        return {"batch": batches}

    def _prepare(self, start: int) -> Iterator[bytes]:
        feed = self._feed
        stop = min(start + feed.chunk, feed.steps)
        padded = feed.micro_batch * feed.micro_steps
        rows, weight = feed.plan.share(start, stop, feed.rank, feed.world, padded)
        columns = self._read(rows)
        for step in range(stop - start):
            part = slice(step * padded, (step + 1) * padded)
            yield safetensors.numpy.save(
                self._collate({k: v[part] for k, v in columns.items()}, rows.epoch[part], weight[part])
            )

    def _read(self, rows: Rows) -> dict[str, list]:
        """The task's columns of `rows`, in their order; each shard is opened once."""
        columns: dict[str, list] = {name: [None] * len(rows) for name in ("sample_id", *self._feed.task.reads)}
        for shard in np.unique(rows.shard):
            places = np.flatnonzero(rows.shard == shard)
            reader = ShardReader(self._feed.inputs, self._feed.shards[shard])
            usable = select_rows(reader, self._feed.task.where, self._feed.task.where_reads)
            table = reader.rows(tuple(columns), usable[rows.row[places]])
            for name, values in table.items():
                for place, value in zip(places, values, strict=True):
                    columns[name][place] = value
        return columns

    def _collate(self, columns: dict[str, list], epochs: np.ndarray, weight: np.ndarray) -> dict[str, Any]:
        ids = numeric_ids(columns["sample_id"])
        arrays = self._feed.task.collate(columns, lambda salt: uniforms(self._feed.plan.seed, epochs, ids, salt))
        return {"weight": weight} | {name: np.ascontiguousarray(array) for name, array in arrays.items()}
