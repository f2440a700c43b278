"""The order of the rows: a pure map from a training step to the rows of its global batch, whoever computes them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from infra.train.draw import permutation


@dataclass(frozen=True)
class Rows:
    """Some rows in training order: `row[i]` among the usable rows of shard number `shard[i]`, in epoch `epoch[i]`."""

    epoch: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    weight: np.ndarray  # float32: 1, or 0 where a row stands again to fill a batch

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: np.ndarray) -> "Rows":
        return Rows(self.epoch[index], self.shard[index], self.row[index], self.weight[index])

    @staticmethod
    def joined(parts: "Sequence[Rows]") -> "Rows":
        """Some rows after others."""
        names = ("epoch", "shard", "row", "weight")
        return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class Plan(ABC):
    """The rows of the global batch of each training step, and how workers share them."""

    batch: int
    seed: int

    @property
    @abstractmethod
    def rows_per_epoch(self) -> int: ...

    @abstractmethod
    def steps(self, start: int, stop: int) -> Rows:
        """The rows of training steps [start, stop), in order: (stop - start) * batch of them."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> int:
        """How many rows of weight 1 steps [start, stop) have."""

    def share(self, start: int, stop: int, rank: int, world: int, padded: int) -> tuple[Rows, np.ndarray]:
        """What `rank` of `world` computes of steps [start, stop): its rows, `padded` a step, and weights (1 or 0).

        The global batch is cut into `world` runs of ceil(batch / world) rows; places left over hold a row at weight 0,
        one that is the rank's anyway where it has any, so that nothing is read for its sake.
        """
        size = -(-self.batch // world)
        assert padded >= size
        local = rank * size + np.arange(padded)
        mine = (np.arange(padded) < size) & (local < self.batch)
        index = (
            np.where(mine, local, min(rank * size, self.batch - 1))[None, :]
            + (np.arange(stop - start) * self.batch)[:, None]
        )
        picked = self.steps(start, stop)[index.ravel()]
        return picked, picked.weight * np.tile(mine.astype(np.float32), stop - start)


@dataclass(frozen=True)
class BatchPlan(Plan):
    """Every row once an epoch: shards permuted, then rows permuted within windows of `window_shards` shards.

    Training step s takes rows [s * batch, (s + 1) * batch) of the endless sequence of epochs; a batch may straddle two.
    Looking up a step costs the same at step 0 and at step 1,000,000: a permutation of the shards, and of the rows of
    the windows that it falls into. How far the order is from a full shuffle is measured by `benchmarks.shuffle`: where
    shards are mixed, any window trains as well; of a corpus sorted by class a batch sees at most some `window_shards`
    classes, and windows should be wide.
    """

    counts: Sequence[int]  # usable rows of each shard
    batch: int
    seed: int
    window_shards: int

    def __post_init__(self) -> None:
        if sum(self.counts) == 0:
            raise ValueError("No row is left to train on: every row was rejected, failed or filtered out.")

    @cached_property
    def rows_per_epoch(self) -> int:
        return int(self._counts.sum())

    @cached_property
    def _counts(self) -> np.ndarray:
        return np.asarray(self.counts, dtype=np.int64)

    def rows(self, start: int, stop: int) -> int:
        """Every step has a whole batch."""
        return max(0, stop - start) * self.batch

    def steps(self, start: int, stop: int) -> Rows:
        """The rows of training steps [start, stop), in order: (stop - start) * batch of them."""
        parts, position, end = [], start * self.batch, stop * self.batch
        while position < end:
            epoch, offset = divmod(position, self.rows_per_epoch)
            length = min(end - position, self.rows_per_epoch - offset)
            parts.append(self._of_epoch(epoch, offset, offset + length))
            position += length
        return Rows.joined(parts)

    def _of_epoch(self, epoch: int, start: int, stop: int) -> Rows:
        order = permutation(len(self.counts), self.seed, epoch)
        shard, row = in_windows(
            self._counts[order], self.window_shards, start, stop,
            lambda size, window: permutation(size, self.seed, epoch, window),
        )  # fmt: skip
        return Rows(np.full(len(row), epoch), order[shard], row, np.ones(len(row), np.float32))


def in_windows(
    counts: np.ndarray, window: int, start: int, stop: int, permute: Callable[[int, int], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Places [start, stop) of all rows of shards, as (shard, row): `window` shards after another, their rows permuted.

    `permute(size, number)` is the permutation of the rows of a window. Only windows that have some are made.
    """
    sizes = np.add.reduceat(counts, np.arange(0, len(counts), window))
    ends = np.cumsum(sizes)
    first, last = np.searchsorted(ends, [start, stop - 1], side="right")
    shards, rows = [], []
    for number in first + np.flatnonzero(sizes[first : last + 1]):
        count = counts[number * window : (number + 1) * window]
        shard = number * window + np.repeat(np.arange(len(count)), count)
        row = np.concatenate([np.arange(n) for n in count])
        shuffled = permute(len(row), int(number))
        shards.append(shard[shuffled])
        rows.append(row[shuffled])
    begin = int(ends[first - 1]) if first else 0
    cut = slice(start - begin, stop - begin)
    return np.concatenate(shards)[cut], np.concatenate(rows)[cut]
