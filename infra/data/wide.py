"""Wide columns of a shard lie in side files, where rows are read by range: of Parquet, whole row groups would be.

A column is wide where it holds bytes, or lists of numbers, of LEAST bytes a value or more. Its values lie end to end in
`wide/<column>-<hash>`, put before the shard's Parquet file, which holds in their stead where each of them lies and,
with the field, what the side file is: so the Parquet file's existence stays the one act of commit, and its hash vouches
for both. A side file is named by what it holds. Two attempts at a shard do not disturb each other, and a shard that is
taken over into another artifact finds its values there.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from infra import storage, strict
from infra.data.ahead import ahead
from infra.data.clock import clocked

FOLDER = "wide"
LEAST = 4096  # bytes of a value on average: of smaller ones the column is soon read whole
LARGE = 2**31 - 1  # bytes or numbers of a column from which Arrow's 32-bit offsets do not do
HOLES = 0.2  # of the bytes that are wanted, so many more may be read for the sake of fewer requests
GAP_BYTES = 2**18  # between two values that are read together; a request takes as long as so many bytes
SPAN_BYTES = 8 * 2**20  # of a request, but where one value is larger
BYTES = "bytes"  # the dtype of values that are no numbers
MARK = b"wide"  # of a field
PLACE = pa.struct({"offset": pa.int64(), "length": pa.int64(), "crc32": pa.int64()})


@dataclass(frozen=True)
class Side:
    """The side file of a column: its name, what it holds, and what it is to be proved by."""

    file: str
    dtype: str  # of NumPy, or BYTES; bfloat16 lies as uint16
    size: int
    sha256: str

    @property
    def kind(self) -> pa.DataType:
        """The Arrow type of a column of such values, whose offsets never overflow."""
        return pa.large_binary() if self.dtype == BYTES else pa.large_list(pa.from_numpy_dtype(np.dtype(self.dtype)))

    def url(self, artifact: str) -> str:
        """Where it lies."""
        return storage.join(artifact, FOLDER, self.file)


def sides(schema: pa.Schema) -> dict[str, Side]:
    """The side files of a shard, by column."""
    return {field.name: side for field in schema if (side := side_of(field))}


def side_of(field: pa.Field) -> Side | None:
    """What a field says of its side file; ValueError where that makes no sense, or leads out of the artifact."""
    told = (field.metadata or {}).get(MARK)
    if told is None:
        return None
    try:
        side = Side(**json.loads(told))
        _ = side.kind
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"The column {field.name!r} does not say where its values lie: {error}.") from None
    if "/" in side.file or side.file.startswith("."):
        raise ValueError(f"The column {field.name!r} names {side.file!r} as its side file, which is no plain name.")
    return side


def put(artifact: str, table: pa.Table) -> pa.Table:
    """Write the side files of a shard; returns what its Parquet file is to hold."""
    for number, field in enumerate(table.schema):
        flat = _flat(table.column(number))
        if flat is None or not flat.size or flat.size < flat.count * LEAST:
            continue
        digest = hashlib.sha256()
        for piece in flat.pieces:
            digest.update(piece)
        digest = digest.hexdigest()
        file = f"{re.sub(r'[^A-Za-z0-9_]', '_', field.name)}-{digest[:32]}"
        side = Side(file, flat.dtype, flat.size, digest)
        storage.write_pieces(side.url(artifact), flat.cut())
        marks = {**(field.metadata or {}), MARK: strict.dumps(asdict(side)).encode()}
        table = table.set_column(number, pa.field(field.name, PLACE, metadata=marks), flat.places())
    return table


def whole(artifact: str, table: pa.Table) -> pa.Table:
    """A shard with all its values, of what its Parquet file holds."""
    for number, field in enumerate(table.schema):
        if side := side_of(field):
            column = Column(artifact, field.name, side, table.column(number).combine_chunks())
            values = pa.array(column.values(np.arange(len(table))), side.kind)
            marks = {key: value for key, value in (field.metadata or {}).items() if key != MARK}
            table = table.set_column(number, pa.field(field.name, side.kind, metadata=marks or None), values)
    return table


def array(values: Sequence[Any], kind: pa.DataType | None = None) -> pa.Array | pa.ChunkedArray:
    """A column of Python values, of 64-bit offsets where there are more bytes or numbers than 32 bits count."""
    sizes = (len(value) if isinstance(value, bytes | np.ndarray) else 0 for value in values)
    if sum(sizes) > LARGE:
        first = next(value for value in values if isinstance(value, bytes | np.ndarray))
        if isinstance(first, bytes):
            kind = pa.large_binary()
        else:
            kind = pa.large_list(kind.value_type if kind is not None else pa.from_numpy_dtype(first.dtype))
    return pa.array(values, kind)


def fault(artifact: str, side: Side) -> str | None:
    """What is wrong with a side file; None where it is as it was written."""
    url = side.url(artifact)
    if not storage.exists(url):
        return f"lacks {FOLDER}/{side.file}, in which values of it lie"
    found = storage.digest(url)
    if found["size"] != side.size:
        return f"has {found['size']} bytes in {FOLDER}/{side.file}, and not {side.size}"
    return f"has other bytes in {FOLDER}/{side.file} than were written" if found["sha256"] != side.sha256 else None


def sweep(artifact: str, named: Iterable[str]) -> None:
    """Remove the side files that no shard names: those of attempts that did not come to a commit, or came second."""
    for file in set(storage.list_names(storage.join(artifact, FOLDER))) - set(named):
        storage.remove(storage.join(artifact, FOLDER, file))


class Column:
    """A wide column of a shard, of which those rows are read that are asked for."""

    def __init__(self, artifact: str, name: str, side: Side, places: pa.Array) -> None:
        self.name, self.side, self.url = name, side, side.url(artifact)
        self._there = places.is_valid().to_numpy(zero_copy_only=False)
        fields = (each.fill_null(0).to_numpy(zero_copy_only=False) for each in places.flatten())
        self._offsets, self._lengths, self._sums = fields

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Bytes of the values of some rows."""
        return self._lengths[rows]

    def values(self, rows: np.ndarray) -> list[Any]:
        """Bytes, arrays, or None where a row has no value; OSError if the side file is not as it was written."""
        return fetch([Ask(self, rows)])[0]

    def stream(self, rows: np.ndarray) -> Iterator[Any]:
        """What `values` gives, one after another, read ahead in threads; or what went wrong in the place of each."""

        def read(part: np.ndarray) -> list[Any]:
            try:
                return self.values(part)
            except storage.UnavailableError:
                raise  # no fault of these rows
            except OSError as error:
                return [error] * len(part)

        for values in ahead(read, cut_runs(rows, self.lengths(rows), SPAN_BYTES), threads=4, depth=4):
            yield from values

    def spans(self, rows: np.ndarray) -> "Iterator[_Span]":
        """What is to be read for some rows: values that lie near each other together."""
        rows = np.unique(rows)
        rows = rows[self._lengths[rows] > 0]
        rows = rows[np.argsort(self._offsets[rows], kind="stable")]
        starts = self._offsets[rows]
        stops = starts + self._lengths[rows]
        gaps = starts[1:] - stops[:-1]
        nearest = np.argsort(gaps, kind="stable")
        spared = (np.cumsum(gaps[nearest]) <= HOLES * self._lengths[rows].sum()) & (gaps[nearest] <= GAP_BYTES)
        joined = np.zeros(len(gaps), bool)
        joined[nearest[spared]] = True
        first = 0
        for place in range(1, len(rows) + 1):
            if place == len(rows) or not joined[place - 1] or stops[place] - starts[first] > SPAN_BYTES:
                yield _Span(self, rows[first:place], int(starts[first]), int(stops[place - 1]))
                first = place

    def empty(self, row: int) -> Any:
        """The value of a row that takes no bytes."""
        if not self._there[row]:
            return None
        return b"" if self.side.dtype == BYTES else np.empty(0, self.side.dtype)

    def cut(self, span: "_Span", data: bytes) -> Iterator[tuple[int, Any]]:
        """Rows and their values, out of what was read of a span; OSError where they are not what was written."""
        view, number = memoryview(data), self.side.dtype != BYTES
        for row in span.rows.tolist():
            start = int(self._offsets[row]) - span.start
            part = view[start : start + int(self._lengths[row])]
            if zlib.crc32(part) != self._sums[row]:
                raise OSError(
                    f"{self.url} has changed since it was written: row {row} of {self.name!r} lies there. "
                    "`rescribe verify` says what of the artifact is not whole."
                )
            yield row, np.frombuffer(part, self.side.dtype) if number else bytes(part)


class Ask(NamedTuple):
    """Rows of a column that are wanted, in any order, perhaps several times."""

    column: Column
    rows: np.ndarray


class _Span(NamedTuple):
    """Bytes that are read at once, and the rows whose values lie there."""

    column: Column
    rows: np.ndarray
    start: int
    stop: int

    def read(self) -> dict[int, Any]:
        column = self.column
        try:
            with clocked("read"):
                data = storage.read_bytes(column.url, self.start, self.stop - self.start)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{column.url} is missing, in which values of {column.name!r} lie. "
                "`rescribe verify` says what else of the artifact is."
            ) from None
        if len(data) < self.stop - self.start:
            raise OSError(
                f"{column.url} was cut: it ends before byte {self.stop} of the {column.side.size} "
                f"that the column {column.name!r} was written with."
            )
        return dict(column.cut(self, data))


def fetch(asked: Sequence[Ask]) -> list[list[Any]]:
    """The values of what is asked for, in its order; the requests for all of it run beside each other.

    Numbers are arrays on the memory of their span. A row that is asked for twice is read once, and is one object.
    """
    spans = [(number, span) for number, ask in enumerate(asked) for span in ask.column.spans(ask.rows)]
    found: list[dict[int, Any]] = [{} for _ in asked]
    threads = min(len(spans), 8 if all(storage.is_local(ask.column.url) for ask in asked) else storage.AT_ONCE)
    reads = (
        ahead(lambda each: each[1].read(), spans, threads, len(spans)) if threads > 1 else (s.read() for _, s in spans)
    )
    for (number, _), values in zip(spans, reads, strict=True):
        found[number] |= values
    return [
        [values[row] if row in values else ask.column.empty(row) for row in ask.rows.tolist()]
        for ask, values in zip(asked, found, strict=True)
    ]


def cut_runs(rows: np.ndarray, sizes: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Rows in runs of so many bytes at most, or of one row."""
    first, held = 0, 0
    for place, size in enumerate(sizes.tolist()):
        if place > first and held + size > most:
            yield rows[first:place]
            first, held = place, 0
        held += size
    if first < len(rows):
        yield rows[first:]


class _Flat(NamedTuple):
    """The values of a column end to end."""

    dtype: str
    pieces: list[memoryview]
    lengths: np.ndarray  # of each row, in bytes
    there: np.ndarray  # which rows have a value

    @property
    def size(self) -> int:
        return int(self.lengths.sum())

    @property
    def count(self) -> int:
        return int(self.there.sum())

    def cut(self) -> Iterator[memoryview]:
        for piece in self.pieces:
            for start in range(0, len(piece), SPAN_BYTES):
                yield piece[start : start + SPAN_BYTES]

    def places(self) -> pa.Array:
        sums, piece, at = np.zeros(len(self.lengths), np.int64), 0, 0
        for row in np.flatnonzero(self.there).tolist():
            while at == len(self.pieces[piece]) and piece + 1 < len(self.pieces):
                piece, at = piece + 1, 0
            sums[row] = zlib.crc32(self.pieces[piece][at : at + self.lengths[row]])
            at += int(self.lengths[row])
        offsets = np.cumsum(self.lengths) - self.lengths
        held = [pa.array(each.astype(np.int64)) for each in (offsets, self.lengths, sums)]
        return pa.StructArray.from_arrays(held, fields=list(PLACE), mask=pa.array(~self.there))


def _flat(column: pa.ChunkedArray) -> _Flat | None:
    """None for a column whose values are neither bytes nor lists of numbers."""
    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        dtype = BYTES
    elif (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_number(kind.value_type):
        dtype = np.dtype(kind.value_type.to_pandas_dtype()).name
    else:
        return None
    chunks = [_chunk(chunk) for chunk in column.chunks if len(chunk)]
    if not chunks or any(chunk is None for chunk in chunks):
        return None
    pieces, lengths, there = zip(*(chunk for chunk in chunks if chunk), strict=True)
    return _Flat(dtype, [piece for piece in pieces if len(piece)], np.concatenate(lengths), np.concatenate(there))


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _chunk(chunk: pa.Array) -> tuple[memoryview, np.ndarray, np.ndarray] | None:
    """Bytes, lengths and which rows are there; None where a number in a list is null."""
    there = chunk.is_valid().to_numpy(zero_copy_only=False)
    if isinstance(chunk, pa.ListArray | pa.LargeListArray):
        if chunk.values.null_count:
            return None
        values = chunk.values.to_numpy()
        ends = chunk.offsets.to_numpy().astype(np.int64) * values.itemsize
        data = values.view(np.uint8)
    else:
        _, offsets, held = chunk.buffers()
        wide = pa.types.is_large_binary(chunk.type)
        ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        ends, data = ends.astype(np.int64), np.frombuffer(held or b"", np.uint8)
    lengths = np.diff(ends)
    if lengths[~there].any():  # what lies under a null is no value
        found = _chunk(chunk.drop_null())
        assert found is not None
        lengths[there], lengths[~there] = found[1], 0
        return found[0], lengths, there
    return data[ends[0] : ends[-1]].data, lengths, there
