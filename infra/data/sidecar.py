"""One artifact's file of a shard: where it lies, its rows and their states, and the columns that it has."""

from collections.abc import Sequence
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.data import wide
from infra.data.encoded import Place
from infra.data.plain import check_plain

FOLDER = "shards"


def shard_url(artifact: str, name: str) -> str:
    """The file of one shard of an artifact."""
    return storage.join(artifact, FOLDER, f"{name}.parquet")


def shard_names(artifact: str) -> list[str]:
    """The shards that an artifact has, sorted."""
    names = storage.list_names(storage.join(artifact, FOLDER))
    return [name.removesuffix(".parquet") for name in names if name.endswith(".parquet")]


class Sidecar:
    """One artifact's file of a shard, its rows put into the order of the join."""

    def __init__(self, artifact: str, name: str) -> None:
        self._artifact, self.url = artifact, shard_url(artifact, name)
        self._order: pa.Array | None = None
        with storage.open_read(self.url) as file, pq.ParquetFile(file) as parquet:
            check_plain(parquet.schema_arrow, self.url)
            self.names = set(parquet.schema_arrow.names)
            self.sides = wide.sides(parquet.schema_arrow)
            self._image_size = _mean(parquet.metadata, "image")
            table = parquet.read(["sample_id", "state", "reason"], use_threads=False)
        self.sample_ids: list[str] = table["sample_id"].to_pylist()
        self.states: list[str] = table["state"].to_pylist()
        self.reasons: list[str | None] = table["reason"].to_pylist()

    def read(self, names: Sequence[str]) -> dict[str, pa.Array]:
        """Whole columns, as the Parquet file has them."""
        with storage.open_read(self.url) as file, pq.ParquetFile(file) as parquet:
            table = parquet.read([name.removesuffix("?") for name in names], use_threads=False)
        columns = {name: table[name.removesuffix("?")].combine_chunks() for name in names}
        return columns if self._order is None else {name: each.take(self._order) for name, each in columns.items()}

    def apart(self, name: str) -> wide.Column:
        """A wide column."""
        return wide.Column(self._artifact, name, self.sides[name], self.read([name])[name])

    @property
    def has_small_images(self) -> bool:
        """Whether its images take so few bytes a row that they are as well read whole."""
        return self._image_size < wide.LEAST

    def align(self, sample_ids: list[str]) -> None:
        """Put the rows into an order; ValueError where it has others."""
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


def _mean(metadata: pq.FileMetaData, name: str) -> float:
    """Bytes a row of a column of a Parquet file, before it is compressed; 0 where it is not there."""
    leaves = [number for number in range(metadata.num_columns) if metadata.schema.column(number).path == name]
    groups = map(metadata.row_group, range(metadata.num_row_groups)) if leaves else ()
    size = sum(group.column(leaf).total_uncompressed_size for group in groups for leaf in leaves)
    return size / max(1, metadata.num_rows)
