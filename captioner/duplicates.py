"""Find, for each picture of a corpus, the first one that it repeats, among millions and without comparing all."""

from collections.abc import Iterator
from itertools import combinations, pairwise
from math import comb

import numpy as np

MAX_DISTANCE = 16  # bits; unrelated pictures differ in 32 on average, and hardly ever in fewer
BITS = 64
PART = 2**15  # pairs that are looked at together


def find_equal(digests: np.ndarray) -> np.ndarray:
    """The first row with the same digest, for each row of (N, words): (N,) int64, itself where it is the first.

    Sorting takes O(N log N) time; memory is some 40 bytes a row.
    """
    order = np.lexsort(digests.T)  # stable: equals keep their order
    ordered = digests[order]
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = np.any(ordered[1:] != ordered[:-1], axis=1)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


def find_near(hashes: np.ndarray, colors: np.ndarray, distance: int, tolerance: int) -> np.ndarray:
    """The first row that looks like each row: (N,) int64, itself where there is none before it.

    Rows look alike if their hashes, (N,) uint64, differ in at most `distance` bits, and their mean colours, (N, bytes)
    uint8, in at most `tolerance` anywhere. The answer is exact. It need not be transitive: of three rows in a chain,
    the second repeats the first and the third the second.

    Two hashes at most d bits apart agree on at least k of d + k blocks of bits, so that it is enough to compare rows
    that agree on some k of them (Manku et al., Detecting Near-Duplicates for Web Crawling, WWW 2007): C(d+k, k) sorts
    of N keys, and as many times N^2 / 2^(1 + 64 k / (d+k)) pairs if hashes are spread evenly. k is chosen to make this
    small: near to N log N for the distances of use. M pictures with nearly one hash, such as blank ones, take M^2.
    Memory is some 60 bytes a row besides the arguments, however many rows are alike.
    """
    assert 0 <= distance <= MAX_DISTANCE, distance
    first = np.arange(len(hashes))
    for mask in _masks(len(hashes), distance):
        keys = hashes & mask
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        lag, places = 1, np.flatnonzero(keys[1:] == keys[:-1])
        while len(places):
            for start in range(0, len(places), PART):
                part = places[start : start + PART]
                _compare(order[part], order[part + lag], first, hashes, colors, distance, tolerance)
            lag += 1
            places = places[places + lag < len(keys)]
            places = places[keys[places + lag] == keys[places]]
    return first


def _compare(
    early: np.ndarray,
    late: np.ndarray,
    first: np.ndarray,
    hashes: np.ndarray,
    colors: np.ndarray,
    distance: int,
    tolerance: int,
) -> None:
    """Note the pairs that are alike in `first`; no row comes twice in `late`."""
    near = (np.bitwise_count(hashes[early] ^ hashes[late]) <= distance) & (early < first[late])
    early, late = early[near], late[near]
    one, other = colors[early], colors[late]
    alike = (np.maximum(one, other) - np.minimum(one, other)).max(axis=1, initial=0) <= tolerance
    first[late[alike]] = early[alike]


def _masks(rows: int, distance: int) -> Iterator[np.uint64]:
    """The bits of every choice of k of d + k blocks."""
    kept = min(range(1, 9), key=lambda kept: _cost(rows, distance, kept))
    blocks = distance + kept
    edges = [BITS * block // blocks for block in range(blocks + 1)]
    masks = [(1 << end) - (1 << start) for start, end in pairwise(edges)]
    for chosen in combinations(masks, kept):
        yield np.uint64(sum(chosen))


def _cost(rows: int, distance: int, kept: int) -> float:
    """Rows and pairs to be handled, roughly; a row of a sort counts for ten pairs."""
    return comb(distance + kept, kept) * (10 * rows + rows**2 / 2 ** (1 + BITS * kept / (distance + kept)))
