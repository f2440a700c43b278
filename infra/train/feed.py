"""Ray Data reads, decodes and collates each worker's part of the plan, in order, on any CPU of the cluster."""

import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
    ConcurrencyCapBackpressurePolicy,
)
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data._internal.execution.operators.task_pool_map_operator import TaskPoolMapOperator
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayTaskError

from infra.data.shards import ShardReader, select_rows
from infra.train.plan import Plan
from infra.train.prepare import READ_ROWS, Chunk, Prepare, unpack
from infra.train.restarts import LASTING
from infra.train.task import Batch, Task

FIRST_ROWS = 64  # of a chunk of the first execution: the first step is not to wait for more
FIRST_CHUNKS = 4  # of each task that runs at a time, while chunks grow
GROWTH = 32  # of chunks from one execution to the next, at most
CHUNK_SECONDS = 8  # that a chunk is to take, so that it is worth the start of a task
CHUNKS = 64  # of each such task in an execution from then on: its start takes as long as half a chunk
CHUNK_BYTES = 2**27  # of its batches at most; for each task that runs at a time, those of two lie in Ray's store
BLOCK_BYTES = 2**26  # of the batches that come together,
BLOCKS = 4  # and how often some come while a chunk is prepared: a trainer that has none waits no longer
PLAN_ROWS = 2**20  # of the global batches of an execution, unless that is few for a worker: each plans them all
NAP = 0.1  # seconds between two looks whether the trainer needs more
PATIENCE = 300  # seconds without a prepared chunk after which the feed gives up
ADVICE = "\nFailed to apply"  # with this begins what Ray Data adds to an error's own message
RETRIES = 3  # of a task whose process died; Ray Data itself tries for ever


_Arrays = dict[str, np.ndarray]


@dataclass
class _Position:
    """Training steps that a feed has come to."""

    begun: int = 0  # where the execution that began last starts
    given: int = 0  # the first that is still to be given out


@dataclass(frozen=True)
class Feed:
    """The micro-batches of one worker: `feed(step)` yields those of each training step from `step` on.

    A batch has the columns of the task's `collate`, `weight` (B,) float32 and `id` (B,) int64, the rows' numeric ids.

    What goes wrong is a RuntimeError where the next batch is asked for, and nothing is passed over: an error in reading
    or collating at once, with its message, as a ValueError where it would come again; the death of the process that
    prepares, if RETRIES more tries die as well; and PATIENCE seconds in which no task ended, as when no CPU is free.
    """

    task: Task
    inputs: list[str]  # artifacts whose columns are joined shard by shard
    shards: list[str]  # names, in the order of plan.counts
    plan: Plan
    steps: int
    rank: int
    world: int
    micro_batch: int
    micro_steps: int
    tasks: int = 1  # that prepare at a time for this worker
    key: str = field(default_factory=lambda: uuid.uuid4().hex)  # of what its tasks keep between chunks
    _at: _Position = field(default_factory=_Position, init=False, repr=False, compare=False)

    @property
    def rows(self) -> int:
        """Rows of this worker in a training step, with padding."""
        return self.micro_batch * self.micro_steps

    def prepared(self) -> int:
        """Training steps whose batches lie ready."""
        return max(0, self._at.begun + Pace.prepared - self._at.given)

    def __call__(self, start: int) -> Iterator[list[Batch]]:
        """The plan in executions of Ray Data: first short ones, to see how large and slow a batch is, then long ones.

        The next one begins when all of this one is prepared, while the trainer has that before it. No batch depends on
        where they are cut.
        """
        run = self._execution(start, max(1, FIRST_ROWS // self.rows), FIRST_CHUNKS, BLOCK_BYTES)
        while start < self.steps:
            size, following = 1, None
            for batch in run.batches:
                size = max(size, sum(array.nbytes for array in batch.values()))
                start += 1
                self._at.given = start
                if following is None and run.stop < self.steps and self._at.begun + Pace.prepared >= run.stop:
                    following = _ahead(self._execution, run.stop, *run.next_cut(size))
                yield self._micro_batches(batch)
            if start < self.steps:
                run = following.result() if following else self._execution(run.stop, *run.next_cut(size))

    def _micro_batches(self, batch: _Arrays) -> list[Batch]:
        parts = {name: torch.from_numpy(array).chunk(self.micro_steps) for name, array in batch.items()}
        return [{name: part[i] for name, part in parts.items()} for i in range(self.micro_steps)]

    def _execution(self, start: int, length: int, chunks: int, block: int) -> "_Execution":
        """Begin to prepare `chunks` for each task, of `length` steps or fewer; comes when the first batch is there."""
        most = min(self.steps - start, max(1, PLAN_ROWS // self.plan.batch, READ_ROWS // self.rows))
        length = max(1, min(length, -(-most // (FIRST_CHUNKS * self.tasks))))
        stop = start + min(most, chunks * self.tasks * length)
        Pace.prepared, Pace.enough, self._at.begun = 0, min(CHUNK_BYTES, BLOCKS * block), start
        began = time.monotonic()
        batches = self._prepared(start, stop, length, block)
        return _Execution(stop, length, (stop - start) / length / self.tasks, began, chain([next(batches)], batches))

    def _prepared(self, start: int, stop: int, length: int, block: int) -> "Iterator[_Arrays]":
        items = [{"chunk": pickle.dumps(chunk)} for chunk in self.chunks(start, stop, length)]
        prepared = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Prepare(self.task, self.inputs, self.plan.seed, self.rows, RETRIES, self.key),
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            num_cpus=1,
            compute=ray.data.TaskPoolStrategy(size=self.tasks),
        )
        context = prepared.context
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        context.raise_original_map_exception = True
        context.execution_no_progress_timeout_s = -1  # it does not know a trainer that needs nothing for a while
        context.target_max_block_size = block
        context.op_resource_reservation_enabled = False
        context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [Pace, ConcurrencyCapBackpressurePolicy])
        try:
            for table in prepared.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
                for batch in unpack(table):
                    yield batch
                    start += 1
            if start < stop:  # else a batch that Ray Data lost would shift all that follow
                raise RuntimeError(f"The feed gave nothing for steps {start} to {stop - 1}.")
        except RayTaskError as error:  # its own text is a traceback, and ends with advice on Ray Data's settings
            cause = f"{type(error.cause).__name__}: {str(error.cause).partition(ADVICE)[0]}"
            kind = ValueError if isinstance(error.cause, LASTING) else RuntimeError
            raise kind(f"The feed failed at steps {start} to {stop - 1}: {cause}") from error
        except ExecutionTimeoutError as error:
            free, whole = (f.get("CPU", 0) for f in (ray.available_resources(), ray.cluster_resources()))
            raise RuntimeError(
                f"The feed waited {PATIENCE} seconds for its tasks, and none has ended: {free:g} of {whole:g} CPUs "
                "of the cluster are free, and each task needs one beside those of the training workers."
            ) from error

    def sample_ids(self, step: int) -> list[str]:
        """The sample ids of the global batch of a training step, from 0."""
        rows = self.plan.steps(step, step + 1)
        rows = rows[rows.weight > 0]
        ids = [""] * len(rows)
        for shard in np.unique(rows.shard):
            places = np.flatnonzero(rows.shard == shard)
            reader = ShardReader(self.inputs, self.shards[shard])
            usable = select_rows(reader, self.task.where, self.task.where_reads, self.task.bucket)
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
class _Execution:
    """Batches of training steps that tasks of Ray Data prepare."""

    stop: int  # the training step after its last
    length: int  # training steps of a chunk
    chunks: float  # of each task that runs at a time
    began: float
    batches: Iterator[_Arrays]

    def next_cut(self, size: int) -> tuple[int, int, int]:
        """Steps of a chunk, chunks of a task, and bytes of a block of the execution after this, by what this one took.

        `size` are the bytes of a batch. They grow until a chunk takes CHUNK_BYTES, or CHUNK_SECONDS: of the feed, or of
        the trainer where that is slower, so that no core is taken to prepare far more than is wanted soon.
        """
        seconds = max(1e-3, Pace.moved - self.began) / self.chunks
        growth = min(GROWTH, CHUNK_SECONDS / seconds)
        length = max(1, min(CHUNK_BYTES // size, int(max(1.0, growth) * self.length)))
        return (
            length,
            FIRST_CHUNKS if length >= 2 * self.length else CHUNKS,
            min(BLOCK_BYTES, 1 + length * size // BLOCKS),
        )


class Pace(BackpressurePolicy):
    """A task of the feed begins while less lies ready than as many chunks as run at a time.

    Ray Data's own policies (2.60) let its loop spin while the trainer is slower than the feed, which takes half of the
    trainer's Python, and reckon with budgets at each turn, which takes two thirds of that loop's time.
    """

    prepared = 0  # training steps of the execution that began last, of this process
    enough = CHUNK_BYTES  # bytes of one of its chunks
    moved = 0.0  # when there last were more of them, or enough (monotonic seconds)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        Pace.moved = time.monotonic()

    def can_add_input(self, op: PhysicalOperator) -> bool:
        """Asked at every turn of Ray Data's loop."""
        if not isinstance(op, TaskPoolMapOperator):
            return True
        before, Pace.prepared = Pace.prepared, op.metrics.row_outputs_taken
        most = Pace.enough * (op.get_max_concurrency_limit() or 1)
        enough = self._topology[op].total_enqueued_output_blocks_bytes() >= most
        if enough or Pace.prepared != before:
            Pace.moved = time.monotonic()
        elif time.monotonic() - Pace.moved > PATIENCE:
            raise ExecutionTimeoutError
        if enough and not op.num_active_tasks():
            time.sleep(NAP)  # there is nothing else that the loop would wait for
        return not enough


def _ahead(function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
    """Call a function in a thread that no end of the process waits for."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="feed", daemon=True).start()
    return future
