"""What a task of the feed does: read the rows of some training steps, join and decode them, and collate each step."""

import ctypes
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from infra.data import wide
from infra.data.images import decode
from infra.data.shards import ShardReader, lost, select_rows
from infra.train.draw import numeric_ids, uniforms
from infra.train.task import Draw, Task

MOST_SHARDS = 64  # that a process keeps open
MOST_BYTES = 2**28  # of their columns
READ_ROWS = 4096  # whose narrow columns are read at a time: a chunk's first batch does not wait for its last
WIDE_BYTES = 2**26  # of wide values that are read at a time, or those of one step
PACK_BYTES = 2**22  # of batches that travel together, at least
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Chunk:
    """Rows of some training steps, step after step, by the names of their shards: it is read without the plan."""

    shards: list[str]
    shard: np.ndarray  # (N,) places in `shards`
    row: np.ndarray  # (N,) among the usable rows of the shard
    epoch: np.ndarray  # (N,)
    weight: np.ndarray  # (N,) float32: 1 for a row, 0 for padding

    def part(self, rows: slice) -> "Chunk":
        """Some of its rows."""
        return Chunk(self.shards, self.shard[rows], self.row[rows], self.epoch[rows], self.weight[rows])


@dataclass(frozen=True)
class Prepare:
    """Chunks in, batches out: `rows` of a chunk are one training step of the worker that is fed.

    Of values in side files no more than WIDE_BYTES are held at a time, or than a single step has, whichever is more;
    what is read beside them for the sake of fewer requests adds a fifth at most, and pictures, which are cut out, are
    there twice for a moment. Beside these there are the decoded pictures and arrays of one step, PACK_BYTES of batches
    that are put together, narrow columns of READ_ROWS rows, and MOST_BYTES of the shards that are open. So a task whose
    rows have 1.2 MB of features, 32 a step, holds less than 0.2 GB of them, collated ones included. Not bounded so are
    pictures in the corpus's own files and wide columns of before there were side files: encoded, of READ_ROWS rows.
    """

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
        _keep_memory()
        for chunk in table["chunk"]:
            yield from pack(self.batches(pickle.loads(chunk.as_py())))

    def batches(self, chunk: Chunk) -> Iterator[dict[str, np.ndarray]]:
        """The batch of each step: `weight`, `id` and what the task collates; pictures are decoded step by step."""
        at_a_time = max(1, READ_ROWS // self.rows) * self.rows
        for first in range(0, len(chunk.row), at_a_time):
            yield from self._batches(chunk.part(slice(first, first + at_a_time)))

    def _batches(self, chunk: Chunk) -> Iterator[dict[str, np.ndarray]]:
        columns, later = self._read(chunk)
        ids = numeric_ids(columns["sample_id"])
        uniform = cache(partial(uniforms, self.seed, chunk.epoch, ids))  # by salt, for all of these rows at once
        apart = {one.name for one in later}
        narrow = {name: values for name, values in columns.items() if name not in apart}
        for name, chosen in self.task.picks(narrow, uniform).items():
            assert name not in columns, (
                f"{name!r} is one of the columns that are read, and picks must name it otherwise"
            )
            columns[name], found = self._picked(chunk, name, chosen)
            later += found
        sizes = np.zeros(len(chunk.row), np.int64)
        for one in later:
            sizes[one.places] += one.ask.column.lengths(one.ask.rows)
        steps = sizes.reshape(-1, self.rows).sum(axis=1)
        for run in wide.cut_runs(np.arange(len(steps)), steps, WIDE_BYTES):
            rows = slice(int(run[0]) * self.rows, (int(run[-1]) + 1) * self.rows)
            _fill(columns, later, rows)
            for first in range(rows.start, rows.stop, self.rows):
                part = slice(first, first + self.rows)
                arrays = self._collate(columns, chunk, part, lambda salt, part=part: uniform(salt)[part])
                yield {"weight": chunk.weight[part], "id": ids.view(np.int64)[part], **arrays}
                del arrays
            for one in later:
                columns[one.name][rows] = [None] * (rows.stop - rows.start)

    def _collate(self, columns: dict[str, list], chunk: Chunk, part: slice, draw: Draw) -> dict[str, np.ndarray]:
        """The arrays of one step. A function of its own, for what it decodes to be freed before the next."""
        rows = {name: values[part] for name, values in columns.items()}
        if "pixels" in self.task.reads:
            rows["pixels"] = _decoded(rows, [chunk.shards[number] for number in chunk.shard[part]])
        arrays = self.task.collate(rows, draw)
        if taken := arrays.keys() & {"weight", "id"}:
            raise ValueError(f"The column {min(taken)!r} of a batch is the feed's own: collate must name it otherwise.")
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def _read(self, chunk: Chunk) -> tuple[dict[str, list], "list[_Later]"]:
        """The task's columns of the rows, in their order, images still encoded; a shard of theirs is looked up once.

        Of those that lie in side files it is said where.
        """
        names = {"sample_id", *("image" if name == "pixels" else name for name in self.task.reads)}
        columns: dict[str, list] = {name: [None] * len(chunk.row) for name in names}
        later: list[_Later] = []
        for number, shard in enumerate(chunk.shards):
            places = np.flatnonzero(chunk.shard == number)
            if not len(places):
                continue
            reader, usable = self._open(shard)
            rows = usable[chunk.row[places]]
            asked = {name: ask for name in names if (ask := reader.ask(name, rows)) is not None}
            later += [_Later(name, places, ask) for name, ask in asked.items()]
            for name, values in reader.rows([name for name in names if name not in asked], rows).items():
                for place, value in zip(places, values, strict=True):
                    columns[name][place] = value
        return columns, later

    def _picked(self, chunk: Chunk, name: str, chosen: Sequence[str | None]) -> tuple[list, "list[_Later]"]:
        """The values that were picked, or where they lie."""
        assert len(chosen) == len(chunk.row), f"{len(chosen)} columns were picked as {name!r} for {len(chunk.row)} rows"
        values: list = [None] * len(chosen)
        later: list[_Later] = []
        for source, number in sorted(
            {(each, number) for each, number in zip(chosen, chunk.shard.tolist(), strict=True) if each}
        ):
            places = np.array([p for p in np.flatnonzero(chunk.shard == number).tolist() if chosen[p] == source])
            reader, usable = self._open(chunk.shards[number])
            rows = usable[chunk.row[places]]
            if ask := reader.ask(source, rows):
                later.append(_Later(name, places, ask))
                continue
            for place, value in zip(places, reader.rows([source], rows)[source], strict=True):
                values[place] = value
        return values, later

    def _open(self, shard: str) -> tuple[ShardReader, np.ndarray]:
        """A shard's reader and usable rows; those of a window are wanted by many chunks, one after another."""
        entry = _OPEN.pop((self.key, shard), None)
        if entry is None:
            reader = ShardReader(self.inputs, shard)
            entry = reader, select_rows(reader, self.task.where, self.task.where_reads, self.task.bucket)
        while _OPEN and (len(_OPEN) >= MOST_SHARDS or pa.total_allocated_bytes() > MOST_BYTES):
            _OPEN.popitem(last=False)
        _OPEN[self.key, shard] = entry
        return entry


@cache
def _keep_memory() -> None:
    """Have the C library keep what is freed: else pages of each batch go back to the kernel, which clears them anew."""
    with suppress(AttributeError):  # another C library than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that it takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


def _tries() -> int:
    """How often this task was begun before; Ray says it nowhere else."""
    import ray  # slow to import: `plan` does without

    worker: Any = ray._private.worker.global_worker  # pyright: ignore
    return worker.core_worker.get_current_task_attempt_number() if worker.connected else 0


# The shards that a process has open, the one used last at the end: tasks run in processes that live on.
_OPEN: OrderedDict[tuple[str, str], tuple[ShardReader, np.ndarray]] = OrderedDict()


class _Later(NamedTuple):
    """Values of a column of a shard that are read when the steps of their rows come."""

    name: str  # under which a task finds them
    places: np.ndarray  # of the rows in a chunk, ascending
    ask: wide.Ask


def _fill(columns: dict[str, list], later: Sequence[_Later], rows: slice) -> None:
    """Read what lies in side files of some rows of a chunk, all of it beside each other."""
    cuts = [slice(*np.searchsorted(one.places, [rows.start, rows.stop])) for one in later]
    found = wide.fetch([wide.Ask(one.ask.column, one.ask.rows[cut]) for one, cut in zip(later, cuts, strict=True)])
    for one, cut, values in zip(later, cuts, found, strict=True):
        for place, value in zip(one.places[cut], values, strict=True):
            columns[one.name][place] = value


def _decoded(rows: dict[str, list], shards: list[str]) -> list[np.ndarray]:
    """The pictures of some rows; a row that stands in several places is decoded once."""
    found: dict[int, np.ndarray] = {}
    for image, sample_id, shard in zip(rows["image"], rows["sample_id"], shards, strict=True):
        if id(image) not in found:
            if image is None:
                raise lost(sample_id, shard, ValueError("there is no image"))
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
    held = 0
    for batch in batches:
        buffers: list[pickle.PickleBuffer] = []
        heads.append(pickle.dumps(batch, 5, buffer_callback=buffers.append))
        rows.append([np.asarray(buffer.raw()) for buffer in buffers])
        held += sum(array.nbytes for array in rows[-1])
        if held >= size:
            yield _table(heads, rows)
            heads, rows, held = [], [], 0
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
    """The batches of tables that were put together. Arrays are the table's own memory, but where that is not aligned.

    They may be written to: of a table that came out of Ray's store, nobody else reads what this process holds.
    """
    columns = [list(_values(table[str(number)])) for number in range(table.num_columns - 1)]
    for row, head in enumerate(table["head"]):
        batch = pickle.loads(head.as_py(), buffers=[np.asarray(column[row]) for column in columns])
        yield {name: np.require(array, requirements="A") for name, array in batch.items()}


def _values(column: pa.ChunkedArray) -> Iterator["_Bytes"]:
    """The values of a column of binaries; Arrow's own way to one value copies it."""
    for chunk in column.chunks:
        _, ends, data = chunk.buffers()
        marks = np.frombuffer(ends, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        for start, stop in pairwise(marks):
            yield _Bytes(data.slice(start, stop - start))


class _Bytes:
    """Memory of an Arrow buffer as NumPy takes it, writable."""

    def __init__(self, buffer: pa.Buffer) -> None:
        self._buffer = buffer  # lives as long as an array of it
        self.__array_interface__ = {
            "version": 3, "shape": (buffer.size,), "typestr": "|u1", "data": (buffer.address, False),
        }  # fmt: skip
