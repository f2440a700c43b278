"""The order of rows that differ in shape: a training step takes rows of one bucket, and an epoch has whole steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from infra.train.draw import permutation, uniforms
from infra.train.plan import Plan, Rows, in_windows


@dataclass(frozen=True)
class BucketPlan(Plan):
    """Every row once an epoch, in steps of one bucket; the last step of a bucket is filled up with rows of weight 0.

    An epoch has the sum of ceil(rows of a bucket / batch) steps; none straddles two. The steps of a bucket are spread
    over the epoch: each falls at a random time, drawn by (seed, epoch), of its own equal part of it. So what comes at
    step s is known without the steps before.

    Within a bucket rows come as in a `BatchPlan`: shards permuted, the same way for all buckets, and rows within
    windows of `window_shards` shards. All buckets come to a shard at about the same time, and steps that follow one
    another read the same window. A step reads some `window_shards` shards; where a window has fewer rows of a bucket
    than a batch, as many windows as hold a batch of them, of a rare bucket up to a shard a row.
    """

    counts: Sequence[Mapping[str, int]]  # usable rows of each shard by bucket
    batch: int
    seed: int
    window_shards: int

    def __post_init__(self) -> None:
        if not self.rows_per_epoch:
            raise ValueError("No row is left to train on: every row was rejected, failed or filtered out.")

    @property
    def rows_per_epoch(self) -> int:
        return int(self._rows.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Training steps in which every row is used once."""
        return int(self._steps.sum())

    @cached_property
    def buckets(self) -> list[str]:
        """Those that have rows, in the order in which `select_rows` puts them."""
        return sorted({name for count in self.counts for name, rows in count.items() if rows})

    @cached_property
    def _counts(self) -> np.ndarray:
        """(buckets, shards)"""
        return np.array([[count.get(name, 0) for count in self.counts] for name in self.buckets], dtype=np.int64)

    @cached_property
    def _before(self) -> np.ndarray:
        """(buckets, shards): the rows of a shard that `select_rows` puts before those of a bucket."""
        return np.cumsum(self._counts, axis=0) - self._counts

    @cached_property
    def _rows(self) -> np.ndarray:
        return self._counts.sum(axis=-1)

    @cached_property
    def _steps(self) -> np.ndarray:
        return -(-self._rows // self.batch)

    def steps(self, start: int, stop: int) -> Rows:
        """The rows of training steps [start, stop), in order, `batch` a step, with those of weight 0."""
        parts = []
        while start < stop:
            epoch, first = divmod(start, self.steps_per_epoch)
            last = min(first + stop - start, self.steps_per_epoch)
            parts.append(self._of_epoch(epoch, first, last))
            start += last - first
        return Rows.joined(parts)

    def rows(self, start: int, stop: int) -> int:
        """All of whole epochs, and those of the steps before and after them."""
        return self._before_step(stop) - self._before_step(start) if stop > start else 0

    def _before_step(self, step: int) -> int:
        epoch, last = divmod(step, self.steps_per_epoch)
        bucket, number = self.of_steps(epoch, 0, last)
        return epoch * self.rows_per_epoch + int(np.minimum(self.batch, self._rows[bucket] - number * self.batch).sum())

    def of_steps(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of each of steps [start, stop) of an epoch, and which of its bucket's steps it is.

        By any time of the epoch, which lasts from 0 to 1, a bucket has had its share of its steps, or one fewer or
        more: so only steps near to these have to be looked at.
        """
        near = len(self.buckets) + 1
        times = np.array([start - near, stop + near]) / self.steps_per_epoch
        first, last = np.floor(times[:, None] * self._steps).astype(np.int64).clip(0, self._steps)
        last = np.minimum(last + 1, self._steps)
        bucket = np.repeat(np.arange(len(self.buckets)), last - first)
        number = np.concatenate([np.arange(*part) for part in zip(first, last, strict=True)])
        keys = (bucket.astype(np.uint64) << np.uint64(40)) | number.astype(np.uint64)
        drawn = uniforms(self.seed, np.full(len(keys), epoch), keys, "buckets")
        order = np.lexsort((bucket, (number + drawn) / self._steps[bucket]))  # stable: a bucket's steps keep theirs
        order = order[start - first.sum() : stop - first.sum()]
        return bucket[order], number[order]

    def _of_epoch(self, epoch: int, start: int, stop: int) -> Rows:
        buckets, numbers = self.of_steps(epoch, start, stop)
        order = permutation(len(self.counts), self.seed, epoch)
        shards, rows = np.empty((2, stop - start, self.batch), dtype=np.int64)
        weights = np.empty((stop - start, self.batch), dtype=np.float32)
        for bucket in np.unique(buckets).tolist():
            places = np.flatnonzero(buckets == bucket)
            first = int(numbers[places[0]]) * self.batch
            last = min(first + len(places) * self.batch, int(self._rows[bucket]))
            shard, row = in_windows(
                self._counts[bucket][order], self.window_shards, first, last,
                lambda size, window, bucket=bucket: permutation(size, self.seed, epoch, window, bucket),
            )  # fmt: skip
            shard = order[shard]
            index = np.arange(len(places) * self.batch).reshape(-1, self.batch)
            there = index < last - first
            index = np.where(there, index, index[:, :1])  # what is filled up is filled up with the step's first row
            shards[places], weights[places] = shard[index], there
            rows[places] = (self._before[bucket][shard] + row)[index]
        return Rows(np.full(rows.size, epoch), shards.ravel(), rows.ravel(), weights.ravel())
