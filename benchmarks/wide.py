"""How many bytes, in how many requests, does an epoch read of a wide column, with side files and without?

    python -m benchmarks.wide
    python -m benchmarks.wide --only features --worlds 64

Writes an artifact of random bytes twice, once as `commit` writes it and once with the values inside of the Parquet
files, as all lay before there were side files; and reads an epoch of each as the feed's tasks of W workers do, without
Ray, chunk by chunk, each worker as a process of its own would. Counted is what goes through `infra.storage`, by range
(`requests`, `wide`) and through files (`parquet`, in which the narrow columns come, too): on S3 a request is a GET.
`held` is the most that Python and NumPy had allocated at a time, without Arrow, and without what a batch is made of.
Prints one JSON object a line.
"""

import json
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import tyro

from infra import storage
from infra.data import wide
from infra.data.ledger import commit
from infra.data.shards import count_rows
from infra.train import prepare
from infra.train.feed import CHUNK_BYTES, Feed
from infra.train.plan import BatchPlan
from infra.train.task import Update

NEVER = 2**62


@dataclass(frozen=True)
class Kind:
    """A wide column: shards, rows of each, bytes of a value, and of what a row of a batch is then."""

    shards: int
    rows: int
    size: int
    made: int


KINDS = {
    "copies": Kind(shards=16, rows=512, size=24_000, made=3 * 256 * 256),  # pictures of 256x256
    "latents": Kind(shards=16, rows=512, size=8_192, made=8_192),  # 4 channels of 32x32, bfloat16
    "features": Kind(shards=4, rows=32, size=1_200_000, made=1_200_000),  # 300 tokens of 2,000, bfloat16
}


@dataclass(frozen=True, kw_only=True)
class Config:
    only: Literal["all", "copies", "latents", "features"] = "all"
    worlds: tuple[int, ...] = (1, 8, 64)
    layouts: tuple[Literal["before", "after"], ...] = ("before", "after")
    batch: int = 128
    window_shards: int = 16


@dataclass(frozen=True)
class Lengths:
    """A task that reads a column and keeps the sizes of its values."""

    reads: tuple[str, ...] = ("values",)
    where_reads: tuple[str, ...] = ("split",)
    bucket: str | None = None
    whole_weights: bool = False

    def where(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        return columns["split"] == "train"

    def updates(self) -> list[Update]:
        return []

    def picks(self, rows: dict[str, list], draw: Any) -> dict[str, list[str | None]]:
        return {}

    def collate(self, rows: dict[str, list], draw: Any) -> dict[str, np.ndarray]:
        (name,) = self.reads
        return {"lengths": np.array([memoryview(value).nbytes for value in rows[name]])}

    def export(self, modules: dict[str, Any], folder: str) -> None: ...


@dataclass
class Counts:
    requests: int = 0
    wide: int = 0
    parquet: int = 0


class _File:
    """A file whose bytes are counted as they are read."""

    def __init__(self, file: Any, counts: Counts) -> None:
        self._file, self._counts = file, counts

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._counts.parquet += len(data)
        return data


@contextmanager
def counted() -> Iterator[Counts]:
    """What is read through `infra.storage` meanwhile."""
    counts, read_bytes, open_read = Counts(), storage.read_bytes, storage.open_read

    def read(url: str, offset: int = 0, length: int | None = None) -> bytes:
        data = read_bytes(url, offset, length)
        counts.requests, counts.wide = counts.requests + 1, counts.wide + len(data)
        return data

    storage.read_bytes, storage.open_read = read, lambda url: _File(open_read(url), counts)  # type: ignore[assignment]
    try:
        yield counts
    finally:
        storage.read_bytes, storage.open_read = read_bytes, open_read


def write(folder: str, name: str, kind: Kind, least: int) -> None:
    """Shards of random values: `image` of bytes with an index, or `values` of numbers of two bytes."""
    generator, usual = np.random.default_rng(0), wide.LEAST
    wide.LEAST = least
    for shard in range(kind.shards):
        ids = [f"{shard * kind.rows + row:016x}" for row in range(kind.rows)]
        columns: dict[str, Any] = {"sample_id": ids, "state": ["accepted"] * kind.rows, "split": ["train"] * kind.rows}
        columns["reason"] = pa.nulls(kind.rows, pa.string())
        if name == "copies":
            sizes = generator.integers(kind.size // 2, kind.size * 3 // 2, kind.rows)
            columns |= {"offset": [0] * kind.rows, "image": [generator.bytes(size) for size in sizes]}
        else:
            numbers = [generator.integers(0, 2**16, kind.size // 2, np.uint16) for _ in range(kind.rows)]
            columns["values"] = pa.array(numbers)
        commit(folder, f"{shard:06d}", pa.table(columns))
    wide.LEAST = usual


def epoch(folder: str, name: str, kind: Kind, world: int, config: Config) -> tuple[int, Counts]:
    """The bytes of an epoch's values, and what was read for them by all workers."""
    task = Lengths(reads=("image",) if name == "copies" else ("values",))
    counts = count_rows([folder], task.where, task.where_reads)
    plan = BatchPlan(list(counts.values()), config.batch, 0, config.window_shards)
    steps, share, size = plan.rows_per_epoch // config.batch, -(-config.batch // world), 0
    length = max(1, CHUNK_BYTES // (kind.made * share))
    with counted() as found:
        for rank in range(world):
            feed = Feed(task, [folder], list(counts), plan, steps, rank, world, share, 1)
            work = prepare.Prepare(task, [folder], 0, feed.rows, 0, feed.key)
            for chunk in feed.chunks(0, steps, length):
                size += sum(int(batch["lengths"].sum()) for batch in work.batches(chunk))
            prepare._OPEN.clear()  # as another process has none open
    return size, found


def main(config: Config) -> None:
    for name, kind in KINDS.items():
        if config.only not in ("all", name):
            continue
        with tempfile.TemporaryDirectory() as place:
            for layout in config.layouts:
                folder = f"{place}/{layout}"
                write(folder, name, kind, wide.LEAST if layout == "after" else NEVER)
                for world in config.worlds:
                    began = time.perf_counter()
                    size, found = epoch(folder, name, kind, world, config)
                    seconds = time.perf_counter() - began
                    rows = kind.shards * kind.rows
                    told = {"column": name, "layout": layout, "world": world, "rows": rows, "bytes": size}
                    told |= {"read_to_needed": round((found.wide or found.parquet) / size, 3)}
                    told |= {"requests": found.requests, "requests_a_row": round(found.requests / rows, 3)}
                    told |= {"narrow_bytes": found.parquet if found.wide else None, "seconds": round(seconds, 1)}
                    print(json.dumps(told), flush=True)
        if config.only in ("all", "features") and name == "features":
            print(json.dumps(held(kind, config)), flush=True)


def held(kind: Kind, config: Config) -> dict[str, Any]:
    """The most memory of Python and NumPy in an epoch of one worker, after the bytes that its steps have."""
    with tempfile.TemporaryDirectory() as folder:
        write(folder, "features", kind, wide.LEAST)
        few = Config(batch=32, window_shards=config.window_shards)
        tracemalloc.start()
        size, _ = epoch(folder, "features", kind, 1, few)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return {
        "column": "features",
        "rows_a_step": few.batch,
        "bytes": size,
        "held": peak,
        "may_hold": 1.2 * prepare.WIDE_BYTES,
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
