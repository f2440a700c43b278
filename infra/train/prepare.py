"""What a task of the feed does: read the rows of some training steps, join and decode them, and collate each step."""

import pickle
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from infra.data.shards import ShardReader, select_rows
from infra.train.draw import numeric_ids, uniforms
from infra.train.task import Task

MOST_SHARDS = 64  # that a process keeps open
MOST_BYTES = 2**28  # of their columns


@dataclass(frozen=True)
class Chunk:
    """Rows of some training steps, step after step, by the names of their shards: it is read without the plan."""

    shards: list[str]
    shard: np.ndarray  # (N,) places in `shards`
    row: np.ndarray  # (N,) among the usable rows of the shard
    epoch: np.ndarray  # (N,)
    weight: np.ndarray  # (N,) float32: 1 for a row, 0 for padding


@dataclass(frozen=True)
class Prepare:
    """Chunks in, batches out: `rows` of a chunk are one training step of the worker that is fed."""

    task: Task
    inputs: list[str]
    seed: int
    rows: int
    retries: int  # after the death of the process that tried
    key: str  # of the feed: what its tasks keep is not mistaken for another's

    def __call__(self, table: pa.Table) -> pa.Table:
        """What `unpack` reads, of chunks that came pickled in the column `chunk`."""
        if (tries := _tries()) > self.retries:
            raise RuntimeError(
                f"The process that prepares batches died {tries} times on the same rows: an image may break its "
                "decoder, or memory be short. Ray's logs say more."
            )
        return pack(batch for chunk in table["chunk"] for batch in self.batches(pickle.loads(chunk.as_py())))

    def batches(self, chunk: Chunk) -> Iterator[dict[str, np.ndarray]]:
        """The batch of each step: `weight`, `id` and what the task collates."""
        columns = self._read(chunk)
        for first in range(0, len(chunk.row), self.rows):
            part = slice(first, first + self.rows)
            yield self._collate({k: v[part] for k, v in columns.items()}, chunk.epoch[part], chunk.weight[part])

    def _read(self, chunk: Chunk) -> dict[str, list]:
        """The task's columns of the rows, in their order; each shard is looked up once."""
        names = ("sample_id", *self.task.reads)
        columns: dict[str, list] = {name: [None] * len(chunk.row) for name in names}
        for number, shard in enumerate(chunk.shards):
            places = np.flatnonzero(chunk.shard == number)
            reader, usable = self._open(shard)
            for name, values in reader.rows(names, usable[chunk.row[places]]).items():
                for place, value in zip(places, values, strict=True):
                    columns[name][place] = value
        return columns

    def _open(self, shard: str) -> tuple[ShardReader, np.ndarray]:
        """A shard's reader and usable rows; those of a window are wanted by many chunks, one after another."""
        entry = _OPEN.pop((self.key, shard), None)
        if entry is None:
            reader = ShardReader(self.inputs, shard)
            entry = reader, select_rows(reader, self.task.where, self.task.where_reads)
        while _OPEN and (len(_OPEN) >= MOST_SHARDS or pa.total_allocated_bytes() > MOST_BYTES):
            _OPEN.popitem(last=False)
        _OPEN[self.key, shard] = entry
        return entry

    def _collate(self, columns: dict[str, list], epochs: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
        ids = numeric_ids(columns["sample_id"])
        arrays = self.task.collate(columns, lambda salt: uniforms(self.seed, epochs, ids, salt))
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        if taken := arrays.keys() & {"weight", "id"}:
            raise ValueError(f"The column {min(taken)!r} of a batch is the feed's own: collate must name it otherwise.")
        return {"weight": weight, "id": ids.view(np.int64), **arrays}


def _tries() -> int:
    """How often this task was begun before; Ray says it nowhere else."""
    worker: Any = ray._private.worker.global_worker  # pyright: ignore
    return worker.core_worker.get_current_task_attempt_number() if worker.connected else 0


# The shards that a process has open, the one used last at the end: tasks run in processes that live on.
_OPEN: OrderedDict[tuple[str, str], tuple[ShardReader, np.ndarray]] = OrderedDict()


def pack(batches: Iterable[dict[str, np.ndarray]]) -> pa.Table:
    """Batches as rows of a table: what they are, pickled, and the bytes of their arrays, which are copied once."""
    heads: list[bytes] = []
    arrays: list[np.ndarray] = []
    ends = [0]
    for batch in batches:
        heads.append(pickle.dumps(batch, 5, buffer_callback=lambda buffer: arrays.append(np.asarray(buffer.raw()))))
        ends.append(len(arrays))
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.concatenate(arrays))]
    flat = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(arrays), buffers)
    return pa.table({"head": pa.array(heads, pa.binary()), "body": pa.ListArray.from_arrays(pa.array(ends), flat)})


def unpack(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The batches of a table, one in memory at a time; their arrays may be written to."""
    for head, body in zip(table["head"], table["body"], strict=True):
        yield pickle.loads(head.as_py(), buffers=[bytearray(value.as_buffer()) for value in body])
