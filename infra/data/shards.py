"""Read one shard's columns out of several artifacts, joined by sample id."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from infra.data import wide
from infra.data.ahead import ahead
from infra.data.clock import clocked
from infra.data.columns import as_array, as_list, objects
from infra.data.encoded import fetch_images, read_rows
from infra.data.images import decode
from infra.data.sidecar import FOLDER as FOLDER
from infra.data.sidecar import Sidecar
from infra.data.sidecar import shard_names as shard_names
from infra.data.sidecar import shard_url as shard_url
from infra.data.stage import ACCEPTED

VIRTUAL = ("image", "pixels")
OPTIONAL = {"optional": "true"}  # metadata of a field that only those shards have in which a row needs it

Where = Callable[[dict[str, np.ndarray]], np.ndarray]
View = Callable[[np.ndarray], np.ndarray]  # of (H, W, 3) uint8 pixels, what a model sees of them


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
    from the source), `pixels` is it decoded, (H, W, 3) uint8. Columns are read whole and kept, but for wide ones, of
    which those rows are read that are asked for.
    """

    def __init__(self, inputs: Sequence[str], name: str, every: bool = False) -> None:
        self.name = name
        self._tables = [Sidecar(artifact, name) for artifact in inputs]
        # An ingest says the order, so that images are read as they lie; pictures that were drawn lie in a column alone.
        held = [table for mark in ("offset", "image") for table in self._tables if mark in table.names]
        self._index = next(iter(held), None)
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
        self._kept: dict[str, pa.Array] = {}  # small images, of the index
        self._wide: dict[tuple[int, str], wide.Column] = {}

    def __len__(self) -> int:
        """How many rows are shown."""
        return len(self._shown)

    @property
    def names(self) -> set[str]:
        """The stored columns of all the artifacts."""
        return set[str]().union(*(table.names for table in self._tables))

    def columns(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Whole columns of the shown rows as arrays: numbers as numbers, texts and lists as objects."""
        asked = self._asked(names, np.arange(len(self)))
        values = dict(zip(asked, map(objects, wide.fetch(list(asked.values()))), strict=True))
        narrow = self._load([name for name in names if name not in asked])
        return {name: values[name] if name in asked else as_array(narrow[name], self._shown) for name in names}

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
        asked, rows = self._asked(names, indices), self._shown[indices]
        values = dict(zip(asked, wide.fetch(list(asked.values())), strict=True))
        narrow = self._load([name for name in names if name not in asked])
        return {name: values[name] if name in asked else as_list(narrow[name], rows) for name in names}

    def table(self, names: Sequence[str], indices: np.ndarray) -> pa.Table:
        """Stored columns at some of the shown rows, of the types that they are stored in."""
        asked, taken = self._asked(names, indices), pa.array(self._shown[indices])
        columns = dict(zip(asked, wide.fetch(list(asked.values())), strict=True))
        columns = {name: pa.array(values, asked[name].column.side.kind) for name, values in columns.items()}
        narrow = self._load([name for name in names if name not in asked])
        return pa.table({name: columns[name] if name in asked else narrow[name].take(taken) for name in names})

    def ask(self, name: str, indices: np.ndarray) -> wide.Ask | None:
        """What `wide.fetch` takes for a column at some of the shown rows; None where it does not lie in a side file.

        `image` is one where ingest made copies that do.
        """
        number = self._holder(name) if name != "image" else self._copied
        column = None if number is None else self._apart(number, name)
        return None if column is None else wide.Ask(column, self._shown[indices])

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
            return self._copies(self._index, rows)
        places = self._index.places
        return fetch_images(places[row] for row in rows)

    def pixels(self, indices: np.ndarray, depth: int = 64, whole: bool = False) -> Iterator[np.ndarray | Exception]:
        """Decoded images of shown rows, in ascending order, `depth` ahead of their use; or what went wrong."""
        for view in self.views(indices, {"pixels": np.asarray}, depth=depth, whole=whole):
            yield view if isinstance(view, Exception) else view["pixels"]

    def views(
        self, indices: np.ndarray, views: Mapping[str, View], *, depth: int, threads: int = 4, whole: bool = False
    ) -> Iterator[dict[str, np.ndarray] | Exception]:
        """What each view makes of the decoded images of shown rows, in threads and ahead, as `pixels` comes.

        `whole` images are those of the corpus, where the index has smaller copies, too.
        """
        images = self.originals(indices) if whole else self.images(indices)
        return ahead(partial(_viewed, views), images, threads=threads, depth=depth)

    def largest(self, indices: np.ndarray, whole: bool = False) -> int | None:
        """Bytes of the largest decoded image of some shown rows; None where they are copies, or nobody says."""
        if not len(indices) or ("image" in self.names and not whole) or not {"width", "height"} <= self.names:
            return None
        sizes = self.stored(["width", "height"], indices)
        return max(3 * (w or 0) * (h or 0) for w, h in zip(sizes["width"], sizes["height"], strict=True))

    def _copies(self, index: "Sidecar", rows: np.ndarray) -> Iterator[bytes | Exception]:
        for row, image in zip(rows.tolist(), self._copies_of(index, rows), strict=True):
            if image is None and self.states[row] != ACCEPTED and "offset" in index.names:  # of these are no copies
                yield from fetch_images([index.places[row]])
            else:
                yield image if image is not None else ValueError("there is no image")

    def _copies_of(self, index: "Sidecar", rows: np.ndarray) -> Iterator[Any]:
        if self._copied is not None and (column := self._apart(self._copied, "image")):
            return column.stream(rows)
        if not index.has_small_images:  # as it lay before there were side files
            return read_rows(index.url, "image", rows.tolist())
        if "image" not in self._kept:
            self._kept |= index.read(["image"])
        return iter(as_list(self._kept["image"], rows))

    @property
    def _copied(self) -> int | None:
        """The place of the index, where it has copies of the images."""
        if self._index is None or "image" not in self._index.names:
            return None
        return self._tables.index(self._index)

    def _holder(self, name: str) -> int | None:
        """The place of the artifact that a column comes from; None for a marked one that none has."""
        plain = name.removesuffix("?")
        holders = [number for number, table in enumerate(self._tables) if plain in table.names]
        if not holders and plain == name:
            known = sorted(self.names | set(VIRTUAL))
            raise ValueError(f"There is no column {name!r} in the inputs; there are {', '.join(known)}.")
        return holders[-1] if holders else None

    def _apart(self, number: int, name: str) -> wide.Column | None:
        """A column of an artifact that lies in a side file."""
        name = name.removesuffix("?")
        if name in self._tables[number].sides and (number, name) not in self._wide:
            self._wide[number, name] = self._tables[number].apart(name)
        return self._wide.get((number, name))

    def _asked(self, names: Sequence[str], indices: np.ndarray) -> dict[str, wide.Ask]:
        """Those of some stored columns that lie in side files."""
        rows = self._shown[indices]
        held = {name: number for name in names if (number := self._holder(name)) is not None}
        columns = {name: self._apart(number, name) for name, number in held.items()}
        return {name: wide.Ask(column, rows) for name, column in columns.items() if column is not None}

    def _load(self, names: Sequence[str]) -> dict[str, pa.Array]:
        wanted: dict[int, list[str]] = {}
        for name in set(names) - self._loaded.keys():
            number = self._holder(name)
            if number is None:
                self._loaded[name] = pa.nulls(len(self.sample_ids), pa.string())
            else:
                wanted.setdefault(number, []).append(name)
        for number, its_names in wanted.items():
            self._loaded |= self._tables[number].read(its_names)
        return {name: self._loaded[name] for name in names}


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
