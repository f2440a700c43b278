"""Ray Data reads, decodes and collates each worker's part of the plan, in order, on any CPU of the cluster."""

import pickle
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayTaskError

from infra.data.shards import ShardReader, select_rows
from infra.train.plan import BatchPlan
from infra.train.prepare import Chunk, Prepare, unpack
from infra.train.task import Batch, Task

FIRST_ROWS = 64  # of a task of the first segment: the first step is not to wait for more
SEGMENT = 4  # tasks of a segment for each that runs at a time
SEGMENT_SECONDS = 4  # that a segment is to take, so that it is worth the start of an execution
SEGMENT_BYTES = 2**29  # of its batches at most, for each of those; two segments are held at a time
PATIENCE = 300  # seconds without a prepared chunk after which the feed gives up
RETRIES = 3  # of a task whose process died; Ray Data itself tries for ever


@dataclass(frozen=True)
class Feed:
    """The micro-batches of one worker: `feed(step)` yields those of each training step from `step` on.

    A batch has the columns of the task's `collate`, `weight` (B,) float32 and `id` (B,) int64, the rows' numeric ids.

    What goes wrong is a RuntimeError where the next batch is asked for, and nothing is passed over: an error in reading
    or collating at once, with its message; the death of the process that prepares, if RETRIES more tries die as well;
    and PATIENCE seconds in which no task ended, as when no CPU is free for one.
    """

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
    key: str = field(default_factory=lambda: uuid.uuid4().hex)  # of what its tasks keep between chunks
    _held: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)  # the segment in use

    @property
    def rows(self) -> int:
        """Rows of this worker in a training step, with padding."""
        return self.micro_batch * self.micro_steps

    def prepared(self) -> int:
        """Training steps whose batches lie ready."""
        return sum(len(segment.batches) for segment in self._held)

    def __call__(self, start: int) -> Iterator[list[Batch]]:
        """Segments of the plan, one prepared while the one before is trained on.

        Each segment is an execution of its own that runs to its end: under backpressure Ray Data's scheduling loop
        spins (2.60), and takes half of the Python of the worker that it feeds. Segments grow until the start of an
        execution no longer counts or they hold SEGMENT_BYTES a task; no batch depends on where they are cut.
        """
        coming = _ahead(self._prepare, start, max(1, FIRST_ROWS // self.rows))
        try:
            while start < self.steps:
                segment = coming.result()
                self._held[:] = [segment]
                start = segment.stop
                if start < self.steps:
                    coming = _ahead(self._prepare, start, segment.following(SEGMENT_BYTES * self.tasks))
                while segment.batches:
                    yield self._micro_batches(segment.batches.popleft())
        finally:
            wait([coming], timeout=1)  # an execution that is left behind takes the processor from what follows

    def _micro_batches(self, batch: dict[str, np.ndarray]) -> list[Batch]:
        parts = {name: torch.from_numpy(array).chunk(self.micro_steps) for name, array in batch.items()}
        return [{name: part[i] for name, part in parts.items()} for i in range(self.micro_steps)]

    def _prepare(self, start: int, length: int) -> "_Segment":
        """Chunks of `length` training steps from `start` on, some for each task."""
        began = time.perf_counter()
        stop = min(start + SEGMENT * self.tasks * length, self.steps)
        items = [{"chunk": pickle.dumps(chunk)} for chunk in self.chunks(start, stop, length)]
        prepared = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Prepare(self.task, self.inputs, self.plan.seed, self.rows, RETRIES, self.key),
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            num_cpus=1,
            compute=ray.data.TaskPoolStrategy(size=self.tasks),
        )
        prepared.context.enable_progress_bars = False
        prepared.context.execution_options.preserve_order = True
        prepared.context.raise_original_map_exception = True
        prepared.context.execution_no_progress_timeout_s = PATIENCE
        try:
            tables = prepared.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
            batches = deque(batch for table in tables for batch in unpack(table))  # taken out of Ray's store
        except RayTaskError as error:  # its own text is a traceback, and ends with advice on Ray Data's settings
            cause = f"{type(error.cause).__name__}: {error.cause}"
            raise RuntimeError(f"The feed failed at steps {start} to {stop - 1}: {cause}") from error
        except ExecutionTimeoutError as error:
            free, whole = (f.get("CPU", 0) for f in (ray.available_resources(), ray.cluster_resources()))
            raise RuntimeError(
                f"The feed waited {PATIENCE} seconds for its tasks, and none has ended: {free:g} of {whole:g} CPUs "
                "of the cluster are free, and each task needs one beside those of the training workers."
            ) from error
        return _Segment(stop, length, batches, time.perf_counter() - began)

    def sample_ids(self, step: int) -> list[str]:
        """The sample ids of the global batch of a training step, from 0."""
        rows = self.plan.steps(step, step + 1)
        ids = [""] * len(rows)
        for shard in np.unique(rows.shard):
            places = np.flatnonzero(rows.shard == shard)
            reader = ShardReader(self.inputs, self.shards[shard])
            usable = select_rows(reader, self.task.where, self.task.where_reads)
            found = reader.stored(["sample_id"], usable[rows.row[places]])["sample_id"]
            for place, sample_id in zip(places, found, strict=True):
                ids[place] = str(sample_id)
        return ids

    def chunks(self, start: int, stop: int, length: int) -> Iterator[Chunk]:
        """This worker's rows of training steps [start, stop), `length` steps a chunk: all that a task has to know."""
        rows, weight = self.plan.share(start, stop, self.rank, self.world, self.rows)
        for first in range(0, len(rows), length * self.rows):
            part = slice(first, first + length * self.rows)
            shards, shard = np.unique(rows.shard[part], return_inverse=True)
            names = [self.shards[number] for number in shards]
            yield Chunk(names, shard, rows.row[part], rows.epoch[part], weight[part])


@dataclass(frozen=True)
class _Segment:
    """What one execution prepared."""

    stop: int  # the training step after its last
    length: int  # training steps of a chunk
    batches: deque[dict[str, np.ndarray]]
    seconds: float

    def following(self, most: int) -> int:
        """How long the chunks of the next are to be, which may hold `most` bytes."""
        held = sum(array.nbytes for batch in self.batches for array in batch.values())
        fit = most * self.length // max(1, held)
        growth = min(4, max(1, SEGMENT_SECONDS / self.seconds))
        return max(1, min(fit, int(growth * self.length)))


def _ahead(function: Callable[..., _Segment], *arguments: Any) -> "Future[_Segment]":
    """Call a function in a thread that no end of the process waits for."""
    future: Future[_Segment] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="feed", daemon=True).start()
    return future
