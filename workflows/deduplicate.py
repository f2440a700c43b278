"""Mark the rows of a corpus that repeat an earlier one: the same file, or a picture that looks the same."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from captioner.duplicates import MAX_DISTANCE, find_equal, find_near
from captioner.filters import Hash
from captioner.hashing import GRID
from infra.cluster import Cluster, connect
from infra.data.ahead import ahead
from infra.data.ledger import Ledger, commit, pending, total
from infra.data.run import run_stages
from infra.data.shards import ShardReader, joined_names
from infra.metrics import Report
from infra.store import Artifact, by_shard, step

EXACT, NEAR = "exact", "near"
COLUMNS = ("sha256", "phash", "colors")


@dataclass(frozen=True, kw_only=True)
class HashConfig:
    """How many images are hashed together."""

    batch: int = 128

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, but it is {self.batch}.")


@step(version=1, shards=by_shard)
def hash_images(config: HashConfig, images: Artifact, *, out: str, cluster: Cluster, report: Report) -> dict[str, Any]:
    """Write `phash` and `colors` of every image, by which those that look alike are found."""
    connect(cluster)
    return run_stages([Hash()], [images.path], out, batch_size=config.batch, actors=cluster.actors, report=report)


@dataclass(frozen=True, kw_only=True)
class DeduplicateConfig:
    """When two pictures are the same: of the same file, or within `distance` bits of hash and `tolerance` of colour.

    A distance of None finds files of the same bytes only. Of 4 bits, re-encoded and resized copies are found, and most
    that were cropped by a hair; more finds more, and takes more likenesses for copies, the more so among drawings.
    """

    distance: int | None = 4  # bits of 64
    tolerance: int = 32  # of 255, in the mean colours of a 4x4 grid: what a change of brightness by a tenth needs

    def __post_init__(self) -> None:
        if self.distance is not None and not 0 <= self.distance <= MAX_DISTANCE:
            raise ValueError(f"distance is None or from 0 to {MAX_DISTANCE} bits, but it is {self.distance}.")
        if not 0 <= self.tolerance <= 255:
            raise ValueError(f"tolerance is from 0 to 255, but it is {self.tolerance}.")


@step(version=1)
def deduplicate(
    config: DeduplicateConfig, images: Artifact, hashes: Artifact, *, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Write `duplicate_of`, the first row of the corpus that a row repeats, and `duplicate_kind`, exact or near.

    Both are None in a row that repeats none. Rows come in the order of the corpus: shards by name, then as they lie.
    The driver alone does it, in some 250 bytes of memory a row.
    """
    return mark_duplicates(config, (images.path, hashes.path), out, report)


def mark_duplicates(
    config: DeduplicateConfig, inputs: tuple[str, ...], out: str, report: Report | None = None
) -> dict[str, Any]:
    """Commit the verdicts on the rows of artifacts that have `sha256`, `phash` and `colors`; return the counts."""
    names = joined_names(inputs)
    kinds: Counter[str] = Counter()
    if names:
        found = _Found(config, inputs, names)
        left = set(pending(out, names))
        for done, name in enumerate(names, start=1):
            table = found.table(name)
            kinds.update(kind for kind in table["duplicate_kind"].to_pylist() if kind)
            if name in left:
                commit(out, name, table)
            if report:
                report(done, len(names), "shards")
    return total(Ledger(out).close().values()) | {"exact_duplicates": kinds[EXACT], "near_duplicates": kinds[NEAR]}


class _Found:
    """The duplicates of a corpus, found at once and told shard by shard."""

    def __init__(self, config: DeduplicateConfig, inputs: tuple[str, ...], names: list[str]) -> None:
        self._inputs = inputs
        read = list(ahead(lambda name: _read(inputs, name), names, threads=4, depth=8))
        ends = np.cumsum([len(ids) for ids, _, _, _ in read]).tolist()
        self._spans = dict(zip(names, pairwise([0, *ends]), strict=True))
        self._ids = pa.chunked_array([ids for ids, _, _, _ in read], pa.string())
        digests, hashes, colors = (np.concatenate(arrays) for arrays in zip(*(one[1:] for one in read), strict=True))
        del read
        self._first = find_equal(digests)
        self._exact = self._first < np.arange(len(self._first))
        if config.distance is not None:
            # A file that came before is no news: only the first of its rows can look like others.
            own = np.flatnonzero(~self._exact)
            self._first[own] = own[find_near(hashes[own], colors[own], config.distance, config.tolerance)]

    def table(self, name: str) -> pa.Table:
        """All rows of a shard; None in those that were rejected or failed before."""
        reader = ShardReader(self._inputs, name)
        start, end = self._spans[name]
        first, exact = self._first[start:end], self._exact[start:end]
        repeats = np.flatnonzero(first < np.arange(start, end))
        of: list[str | None] = [None] * len(reader.sample_ids)
        kinds: list[str | None] = [None] * len(reader.sample_ids)
        originals = self._ids.take(pa.array(first[repeats])).to_pylist()
        for row, original, is_exact in zip(reader.accepted[repeats], originals, exact[repeats], strict=True):
            of[row], kinds[row] = original, EXACT if is_exact else NEAR
        columns = {
            "sample_id": reader.sample_ids,
            "state": reader.states,
            "reason": reader.reasons,
            "duplicate_of": of,
            "duplicate_kind": kinds,
        }
        return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def _read(inputs: tuple[str, ...], name: str) -> tuple[pa.Array, np.ndarray, np.ndarray, np.ndarray]:
    """Of the accepted rows: sample ids, (N, 2) half digests, (N,) hashes, (N, 48) mean colours.

    Half of a SHA-256 is enough: among 2^40 files, two of one half are a matter of 2^-49.
    """
    reader = ShardReader(inputs, name)
    columns = reader.columns(COLUMNS)
    ids = pa.array([reader.sample_ids[row] for row in reader.accepted], pa.string())
    digests = b"".join(bytes.fromhex(digest)[:16] for digest in columns["sha256"])
    colors = np.frombuffer(b"".join(columns["colors"]), dtype=np.uint8).reshape(-1, 3 * GRID**2)
    hashes = columns["phash"].astype(np.int64).view(np.uint64)
    return ids, np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2), hashes, colors
