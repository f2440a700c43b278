"""What a task of the feed does: read the rows of some training steps, join and decode them, and collate each step."""

import pickle
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from infra.data.images import decode
from infra.data.shards import ShardReader, lost, select_rows
from infra.train.draw import numeric_ids, uniforms
from infra.train.task import Task

MOST_SHARDS = 64  # that a process keeps open
MOST_BYTES = 2**28  # of their columns
PACK_BYTES = 2**22  # of batches that travel together, at least


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

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """What `unpack` reads, batch by batch, of chunks that came pickled in the column `chunk`."""
        if (tries := _tries()) > self.retries:
            raise RuntimeError(
                f"The process that prepares batches died {tries} times on the same rows: an image may break its "
                "decoder, or memory be short. Ray's logs say more."
            )
        for chunk in table["chunk"]:
            yield from pack(self.batches(pickle.loads(chunk.as_py())))

    def batches(self, chunk: Chunk) -> Iterator[dict[str, np.ndarray]]:
        """The batch of each step: `weight`, `id` and what the task collates; pictures are decoded step by step."""
        columns = self._read(chunk)
        for first in range(0, len(chunk.row), self.rows):
            part = slice(first, first + self.rows)
            rows = {name: values[part] for name, values in columns.items()}
            if "pixels" in self.task.reads:
                rows["pixels"] = _decoded(rows, [chunk.shards[number] for number in chunk.shard[part]])
            yield self._collate(rows, chunk.epoch[part], chunk.weight[part])

    def _read(self, chunk: Chunk) -> dict[str, list]:
        """The task's columns of the rows, in their order, images still encoded; each shard is looked up once."""
        names = {"sample_id", *("image" if name == "pixels" else name for name in self.task.reads)}
        columns: dict[str, list] = {name: [None] * len(chunk.row) for name in names}
        for number, shard in enumerate(chunk.shards):
            places = np.flatnonzero(chunk.shard == number)
            reader, usable = self._open(shard)
            for name, values in reader.rows(list(names), usable[chunk.row[places]]).items():
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


def _decoded(rows: dict[str, list], shards: list[str]) -> list[np.ndarray]:
    """The pictures of some rows; a row that stands in several places is decoded once."""
    found: dict[int, np.ndarray] = {}
    for image, sample_id, shard in zip(rows["image"], rows["sample_id"], shards, strict=True):
        if id(image) not in found:
            try:
                found[id(image)] = decode(image)
            except ValueError as error:
                raise lost(sample_id, shard, error) from None
    return [found[id(image)] for image in rows["image"]]


def pack(batches: Iterable[dict[str, np.ndarray]], size: int = PACK_BYTES) -> Iterator[pa.Table]:
    """Batches as rows of tables: what each is, pickled, and the bytes of its arrays, a column an array.

    Small batches are put together until there are `size` bytes; those of a table of one batch are not copied.
    """
    heads: list[bytes] = []
    rows: list[list[np.ndarray]] = []
    for batch in batches:
        buffers: list[pickle.PickleBuffer] = []
        heads.append(pickle.dumps(batch, 5, buffer_callback=buffers.append))
        rows.append([np.asarray(buffer.raw()) for buffer in buffers])
        if sum(array.nbytes for row in rows for array in row) >= size:
            yield _table(heads, rows)
            heads, rows = [], []
    if heads:
        yield _table(heads, rows)


def _table(heads: list[bytes], rows: list[list[np.ndarray]]) -> pa.Table:
    columns: dict[str, pa.Array] = {"head": pa.array(heads, pa.binary())}
    for number, parts in enumerate(zip_longest(*rows, fillvalue=np.empty(0, np.uint8))):
        data = parts[0] if len(parts) == 1 else np.concatenate(parts)
        ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        buffers = [None, pa.py_buffer(ends), pa.py_buffer(data)]
        columns[str(number)] = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(parts), buffers)
    return pa.table(columns)


def unpack(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The batches of tables that were put together, one in memory at a time; their arrays may be written to."""
    columns = [table[str(number)] for number in range(table.num_columns - 1)]
    for row, head in enumerate(table["head"]):
        values = (column[row].as_buffer() or b"" for column in columns)
        yield pickle.loads(head.as_py(), buffers=[np.array(np.frombuffer(value, np.uint8)) for value in values])
