"""Bootstrap intervals: how far a score may lie from what other prompts of the same kind would give.

Percentile bootstrap (Efron and Tibshirani 1993, chapter 13) of 95 %: the rows of a score, a prompt each, are drawn anew
with replacement, always the same draws of a fixed seed, and the score is computed of each draw.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0

Interval = tuple[float, float]


class Estimate(NamedTuple):
    """A score, its interval, and of how many rows it is."""

    value: float
    interval: Interval
    n: int

    def named(self, name: str) -> dict[str, float | int | Interval]:
        """The three as they stand in a table of scores: `name`, `name_interval`, `name_n`."""
        return {name: self.value, f"{name}_interval": self.interval, f"{name}_n": self.n}


def draws(rows: int, resamples: int = RESAMPLES, seed: int = SEED) -> Iterator[np.ndarray]:
    """`resamples` times the numbers (rows,) of rows that were drawn with replacement; ValueError for no rows."""
    if rows < 1:
        raise ValueError("An interval needs at least one row.")
    rng = np.random.default_rng([seed, rows])
    for _ in range(resamples):
        yield rng.integers(rows, size=rows)


def mean(values: ArrayLike) -> Estimate:
    """The mean of one number a row. Of a single row nothing is known of the spread: the interval is infinite."""
    each = np.asarray(values, np.float64)
    means = [each[drawn].mean() for drawn in draws(len(each))]
    interval = between(means) if len(each) > 1 else (-np.inf, np.inf)
    return Estimate(float(each.mean()), interval, len(each))


def share(right: ArrayLike, of: ArrayLike | None = None) -> Estimate:
    """Pooled share sum(right) / sum(of) in [0, 1]; row i has `right[i]` of `of[i]`, or of 1. Rows of 0 do not count.

    Where all rows agree, no draw can differ from them. At most a part u = 1 - 0.025^(1/n) of other rows then differs
    (Clopper and Pearson 1934), and the interval is that of these rows being all wrong or all right.
    """
    hits = np.asarray(right, np.float64)
    trials = np.ones_like(hits) if of is None else np.asarray(of, np.float64)
    hits, trials = hits[trials > 0], trials[trials > 0]
    pooled = [hits[drawn].sum() / trials[drawn].sum() for drawn in draws(len(hits))]
    value = float(hits.sum() / trials.sum())
    interval = between(pooled)
    if np.allclose(hits, value * trials):
        other = 1 - ((1 - LEVEL) / 2) ** (1 / len(hits))
        interval = (value * (1 - other), value * (1 - other) + other)
    return Estimate(value, interval, len(hits))


def difference(ours: ArrayLike, theirs: ArrayLike, of: ArrayLike = 1.0, their_of: ArrayLike | None = None) -> Estimate:
    """Our mean, or pooled share, less theirs, on the same prompts: row i of both is drawn together.

    What makes a prompt hard for both falls out, so the interval is narrower than those of two scores apart. Where it
    holds no 0, the two differ. `their_of` is `of` where it is not given. ValueError where the rows do not pair.
    """
    first, second = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"Paired scores are of the same prompts: found {len(first)} rows and {len(second)}.")
    first_of, second_of = (
        np.broadcast_to(np.asarray(each, np.float64), first.shape)
        for each in (of, of if their_of is None else their_of)
    )
    asked = (first_of > 0) & (second_of > 0)
    sums = np.stack([first, first_of, second, second_of])[:, asked]

    def apart(drawn: np.ndarray | slice) -> float:
        top, bottom, other_top, other_bottom = sums[:, drawn].sum(1)
        return float(top / bottom - other_top / other_bottom)

    apart_drawn = [apart(drawn) for drawn in draws(sums.shape[1])]
    interval = between(apart_drawn) if sums.shape[1] > 1 else (-np.inf, np.inf)
    return Estimate(apart(slice(None)), interval, sums.shape[1])


def of_sets(statistic: Callable[..., float], *sets: np.ndarray, resamples: int = 200, seed: int = SEED) -> Estimate:
    """A statistic of whole sets of rows, such as a distance; each set's rows are drawn anew by themselves.

    A draw repeats rows and lacks others, which moves such a statistic to one side. So the interval is what draws spread
    about their mean, put about the value. `n` is of the smallest set.
    """
    value = float(statistic(*sets))
    drawn = zip(*(draws(len(rows), resamples, seed + number) for number, rows in enumerate(sets)), strict=True)
    values = np.array([statistic(*(rows[pick] for rows, pick in zip(sets, picks, strict=True))) for picks in drawn])
    low, high = between(values - values.mean())
    return Estimate(value, (value + low, value + high), min(map(len, sets)))


def between(values: ArrayLike) -> Interval:
    """The middle 95 % of values."""
    low, high = np.quantile(np.asarray(values, np.float64), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
