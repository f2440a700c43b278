"""Read one shard's columns out of several artifacts, joined by sample id."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.data.ahead import ahead
from infra.data.clock import clocked
from infra.data.encoded import Place, fetch_images, read_rows
from infra.data.images import decode
from infra.data.plain import check_plain
from infra.data.stage import ACCEPTED

FOLDER = "shards"
VIRTUAL = ("image", "pixels")
OPTIONAL = {"optional": "true"}  # metadata of a field that only those shards have in which a row needs it

Where = Callable[[dict[str, np.ndarray]], np.ndarray]
View = Callable[[np.ndarray], np.ndarray]  # of (H, W, 3) uint8 pixels, what a model sees of them


def shard_url(artifact: str, name: str) -> str:
    """The file of one shard of an artifact."""
    return storage.join(artifact, FOLDER, f"{name}.parquet")


def shard_names(artifact: str) -> list[str]:
    """The shards that an artifact has, sorted."""
    names = storage.list_names(storage.join(artifact, FOLDER))
    return [name.removesuffix(".parquet") for name in names if name.endswith(".parquet")]


def joined_names(inputs: Sequence[str]) -> list[str]:
    """The shards that all of the artifacts have; ValueError if one of them lacks some."""
    names = shard_names(inputs[0])
    for artifact in inputs[1:]:
        if missing := sorted(set(names) ^ set(shard_names(artifact))):
            raise ValueError(
                f"{inputs[0]} and {artifact} do not cover the same shards: {missing[0]} is in one of them only. "
                "Give artifacts that were derived from one ingest."
            )
    return names


class ShardReader:
    """One shard of artifacts that share their rows; a column comes from the last artifact that has it.

    A row is accepted if every artifact accepted it; `columns` and `rows` show accepted rows only, unless they are to
    show `every` row. A name that is asked for with a mark, as "codes?", is null in a shard that has no such column. The
    virtual column `image` is the encoded image (the resized copy if ingest made one, else read
    from the source), `pixels` is it decoded, (H, W, 3) uint8.
    """

    def __init__(self, inputs: Sequence[str], name: str, every: bool = False) -> None:
        self.name = name
        self._tables = [_Sidecar(artifact, name) for artifact in inputs]
        # An ingest says the order, so that images are read as they lie.
        self._index = next((table for table in self._tables if "offset" in table.names), None)
        self.sample_ids: list[str] = (self._index or self._tables[0]).sample_ids
        self.states: list[str] = [ACCEPTED] * len(self.sample_ids)
        self.reasons: list[str | None] = [None] * len(self.sample_ids)
        for table in self._tables:
            table.align(self.sample_ids)
            for row, (state, reason) in enumerate(zip(table.states, table.reasons, strict=True)):
                if self.states[row] == ACCEPTED and state != ACCEPTED:
                    self.states[row], self.reasons[row] = state, reason
        self.accepted = np.flatnonzero([state == ACCEPTED for state in self.states])
        self._shown = np.arange(len(self.states)) if every else self.accepted
        self._loaded: dict[str, pa.Array] = {}

    def __len__(self) -> int:
        """How many rows are shown."""
        return len(self._shown)

    @property
    def names(self) -> set[str]:
        """The stored columns of all the artifacts."""
        return set[str]().union(*(table.names for table in self._tables))

    def columns(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Whole columns of the shown rows as arrays: numbers as numbers, texts and lists as objects."""
        return {name: _as_array(column, self._shown) for name, column in self._load(names).items()}

    def rows(self, names: Sequence[str], indices: Sequence[int] | np.ndarray) -> dict[str, list[Any]]:
        """Columns at some of the shown rows, virtual ones too; OSError if an image cannot be had."""
        indices = np.asarray(indices, dtype=np.int64)
        found = self.stored([name for name in names if name not in VIRTUAL], indices)
        for name in set(names) & set(VIRTUAL):
            wanted, places = np.unique(indices, return_inverse=True)
            values = list(self.pixels(wanted) if name == "pixels" else self.images(wanted))
            for row, value in zip(wanted, values, strict=True):
                if isinstance(value, Exception):
                    raise lost(self.sample_ids[self._shown[row]], self.name, value)
            found[name] = [values[place] for place in places]
        return found

    def stored(self, names: Sequence[str], indices: np.ndarray) -> dict[str, list[Any]]:
        """Stored columns at some of the shown rows; lists of numbers come as arrays."""
        rows = self._shown[indices]
        return {name: _as_list(column, rows) for name, column in self._load(names).items()}

    def table(self, names: Sequence[str], indices: np.ndarray) -> pa.Table:
        """Stored columns at some of the shown rows, of the types that they are stored in."""
        taken = pa.array(self._shown[indices])
        return pa.table({name: column.take(taken) for name, column in self._load(names).items()})

    def originals(self, indices: np.ndarray) -> Iterator[bytes | Exception]:
        """What `images` yields, but as the corpus has it, also where ingest made resized copies."""
        if self._index is None:
            raise ValueError("Images are wanted, but none of the artifacts is an ingest. Add it to the inputs.")
        places = self._index.places
        return fetch_images(places[row] for row in self._shown[indices])

    def images(self, indices: np.ndarray) -> Iterator[bytes | Exception]:
        """Encoded images of shown rows, in ascending order, as they are read; or what went wrong."""
        rows = self._shown[indices]
        assert np.all(np.diff(rows) > 0), "images are read in ascending order"
        if self._index is None:
            raise ValueError("Images are wanted, but none of the artifacts is an ingest. Add it to the inputs.")
        if "image" in self._index.names:
            return self._copies(self._index, rows.tolist())
        places = self._index.places
        return fetch_images(places[row] for row in rows)

    def pixels(self, indices: np.ndarray, depth: int = 64) -> Iterator[np.ndarray | Exception]:
        """Decoded images of shown rows, in ascending order, `depth` ahead of their use; or what went wrong."""
        for view in self.views(indices, {"pixels": np.asarray}, depth=depth):
            yield view if isinstance(view, Exception) else view["pixels"]

    def views(
        self, indices: np.ndarray, views: Mapping[str, View], *, depth: int, threads: int = 4
    ) -> Iterator[dict[str, np.ndarray] | Exception]:
        """What each view makes of the decoded images of shown rows, in threads and ahead, as `pixels` comes."""
        return ahead(partial(_viewed, views), self.images(indices), threads=threads, depth=depth)

    def largest(self, indices: np.ndarray) -> int | None:
        """Bytes of the largest decoded image of some shown rows; None where the index has copies, or does not say."""
        if not len(indices) or "image" in self.names or not {"width", "height"} <= self.names:
            return None
        sizes = self.stored(["width", "height"], indices)
        return max(3 * (w or 0) * (h or 0) for w, h in zip(sizes["width"], sizes["height"], strict=True))

    def _copies(self, index: "_Sidecar", rows: list[int]) -> Iterator[bytes | Exception]:
        for row, image in zip(rows, read_rows(index.url, "image", rows), strict=True):
            if image is None and self.states[row] != ACCEPTED:  # copies are made of accepted rows only
                yield from fetch_images([index.places[row]])
            else:
                yield image if image is not None else ValueError("there is no image")

    def _load(self, names: Sequence[str]) -> dict[str, pa.Array]:
        wanted: dict[int, list[str]] = {}
        for name in set(names) - self._loaded.keys():
            holders = [number for number, table in enumerate(self._tables) if name.removesuffix("?") in table.names]
            if not holders and name.endswith("?"):
                self._loaded[name] = pa.nulls(len(self.sample_ids), pa.string())
                continue
            if not holders:
                known = sorted(self.names | set(VIRTUAL))
                raise ValueError(f"There is no column {name!r} in the inputs; there are {', '.join(known)}.")
            wanted.setdefault(holders[-1], []).append(name)
        for number, its_names in wanted.items():
            self._loaded |= self._tables[number].read(its_names)
        return {name: self._loaded[name] for name in names}


class _Sidecar:
    """One artifact's file of a shard, its rows put into the order of the join."""

    def __init__(self, artifact: str, name: str) -> None:
        self._artifact, self.url = artifact, shard_url(artifact, name)
        self._order: pa.Array | None = None
        with storage.open_read(self.url) as file, pq.ParquetFile(file) as parquet:
            check_plain(parquet.schema_arrow, self.url)
            self.names = set(parquet.schema_arrow.names)
            table = parquet.read(["sample_id", "state", "reason"], use_threads=False)
        self.sample_ids: list[str] = table["sample_id"].to_pylist()
        self.states: list[str] = table["state"].to_pylist()
        self.reasons: list[str | None] = table["reason"].to_pylist()

    def read(self, names: Sequence[str]) -> dict[str, pa.Array]:
        with storage.open_read(self.url) as file, pq.ParquetFile(file) as parquet:
            table = parquet.read([name.removesuffix("?") for name in names], use_threads=False)
        columns = {name: table[name.removesuffix("?")].combine_chunks() for name in names}
        return columns if self._order is None else {name: each.take(self._order) for name, each in columns.items()}

    def align(self, sample_ids: list[str]) -> None:
        if self.sample_ids == sample_ids:
            return
        position = {sample_id: row for row, sample_id in enumerate(self.sample_ids)}
        if len(position) != len(sample_ids) or any(sample_id not in position for sample_id in sample_ids):
            raise ValueError(f"{self.url} does not hold the rows of the artifact that it is joined with.")
        order = [position[sample_id] for sample_id in sample_ids]
        self.states, self.reasons = [self.states[row] for row in order], [self.reasons[row] for row in order]
        self.sample_ids, self._order = sample_ids, pa.array(order)

    @cached_property
    def places(self) -> list[Place]:
        """Where the rows' images lie; a corpus that was rendered into the artifact is named within it."""
        columns = self.read(["source", "offset", "length", "sha256"])
        rows = zip(*(column.to_pylist() for column in columns.values()), strict=True)
        return [Place(self._resolve(source), *rest) for source, *rest in rows]

    def _resolve(self, source: str | None) -> str:
        if not source or "://" in source or source.startswith("/"):
            return source or ""
        return storage.join(self._artifact, source)


def select_rows(
    reader: ShardReader, where: Where | None = None, where_reads: Sequence[str] = (), bucket: str | None = None
) -> np.ndarray:
    """The accepted rows that a condition on columns chooses, as ascending indices for `ShardReader.rows`.

    Where a column `bucket` is named, rows of one of its values come after those of another, by the value.
    """
    rows = np.arange(len(reader)) if where is None else np.flatnonzero(where(reader.columns(where_reads)))
    return rows if bucket is None else rows[np.argsort(_buckets(reader, bucket, rows), kind="stable")]


def count_rows(inputs: Sequence[str], where: Where | None = None, where_reads: Sequence[str] = ()) -> dict[str, int]:
    """How many rows of each shard `select_rows` would choose, by shard name."""

    def count(name: str) -> int:
        return len(select_rows(ShardReader(inputs, name), where, where_reads))

    names = joined_names(inputs)
    return dict(zip(names, ahead(count, names, threads=8, depth=32), strict=True))


def count_buckets(
    inputs: Sequence[str], bucket: str, where: Where | None = None, where_reads: Sequence[str] = ()
) -> dict[str, dict[str, int]]:
    """How many of the rows of each shard that `select_rows` would choose are of each value of a column."""

    def count(name: str) -> dict[str, int]:
        reader = ShardReader(inputs, name)
        return dict(Counter(_buckets(reader, bucket, select_rows(reader, where, where_reads)).tolist()))

    names = joined_names(inputs)
    return dict(zip(names, ahead(count, names, threads=8, depth=32), strict=True))


def _buckets(reader: ShardReader, bucket: str, rows: np.ndarray) -> np.ndarray:
    values = reader.columns([bucket])[bucket][rows]
    if missing := [row for row, value in zip(rows, values, strict=True) if value is None]:
        sample_id = reader.columns(["sample_id"])["sample_id"][missing[0]]
        raise ValueError(f"Sample {sample_id} of shard {reader.name} has no {bucket!r}, by which rows are trained on.")
    return values


def lost(sample_id: str, shard: str, error: Exception) -> OSError:
    """What is said where the image of a row cannot be had: it may lie where it is not to be reached just now."""
    return OSError(f"The image of sample {sample_id} of shard {shard} is lost: {error}.")


def _viewed(views: Mapping[str, View], image: bytes | Exception) -> dict[str, np.ndarray] | Exception:
    if isinstance(image, Exception):
        return image
    with clocked("decode"):
        try:
            pixels = decode(image)
        except ValueError as error:
            return error
        return {name: view(pixels) for name, view in views.items()}


def _is_numbers(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_primitive(kind.value_type)


def _as_list(column: pa.Array, rows: np.ndarray) -> list[Any]:
    if not _is_numbers(column.type):
        return column.take(pa.array(rows)).to_pylist()
    values, ends = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
    arrays = [values[start:stop] for start, stop in zip(ends[rows].tolist(), ends[rows + 1].tolist(), strict=True)]
    if column.null_count:
        there = column.is_valid().to_numpy(zero_copy_only=False)[rows].tolist()
        arrays = [array if valid else None for array, valid in zip(arrays, there, strict=True)]
    return arrays


def _as_array(column: pa.Array, rows: np.ndarray) -> np.ndarray:
    if _is_numbers(column.type):
        array = np.empty(len(rows), dtype=object)
        array[:] = _as_list(column, rows)
        return array
    return column.take(pa.array(rows)).to_numpy(zero_copy_only=False)
