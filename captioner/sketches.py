"""Counts over streams of any length in bounded memory: how many things are distinct, and which are frequent."""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from hashlib import blake2b

_HASHES = 2**64


class Distinct:
    """How many distinct texts were added: exact up to `size` of them, then within about 1 / sqrt(size).

    Keeps the `size` smallest hashes (Bar-Yossef et al., RANDOM 2002; estimate of Beyer et al., SIGMOD 2007, eq. 2).
    What it says depends on the set of texts alone, not on their order or how they were divided and merged.
    """

    def __init__(self, size: int = 2**16) -> None:
        assert size >= 2, size
        self.size = size
        self._hashes: set[int] = set()
        self._bound = _HASHES  # no hash from here on is among the smallest; none was left out while it is this

    def add(self, texts: Iterable[str]) -> None:
        """Add texts; those that were there already change nothing."""
        for text in texts:
            value = int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
            if value < self._bound:
                self._hashes.add(value)
                if len(self._hashes) >= 2 * self.size:
                    self._prune()

    def merge(self, other: "Distinct") -> None:
        """Add all that `other` was given."""
        assert self.size == other.size, (self.size, other.size)
        self._hashes |= other._hashes
        self._bound = min(self._bound, other._bound)
        self._prune()

    def estimate(self) -> float:
        """The number of distinct texts; a whole number where it is exact."""
        self._prune()
        if self._bound == _HASHES:
            return float(len(self._hashes))
        return (self.size - 1) * (_HASHES / self._bound)

    def _prune(self) -> None:
        if len(self._hashes) > self.size:
            smallest = heapq.nsmallest(self.size, self._hashes)
            self._hashes, self._bound = set(smallest), smallest[-1]


class Frequent:
    """The most frequent texts: exact up to `size` distinct ones, then each count too low by `undercount` at most.

    The summary of Misra and Gries (1982), merged as in Agarwal et al. ("Mergeable summaries", PODS 2012): `undercount`
    is at most the number of texts over `size` + 1. What it says is a function of the texts and their order.
    """

    def __init__(self, size: int = 2**16) -> None:
        assert size >= 1, size
        self.size, self.undercount = size, 0
        self._counts: Counter[str] = Counter()

    def add(self, counts: Mapping[str, int]) -> None:
        """Add texts with how often they occurred."""
        self._counts.update(counts)
        if len(self._counts) >= 2 * self.size:
            self._prune()

    def merge(self, other: "Frequent") -> None:
        """Add all that `other` was given."""
        assert self.size == other.size, (self.size, other.size)
        self._counts.update(other._counts)
        self.undercount += other.undercount
        self._prune()

    def top(self, most: int) -> list[tuple[str, int]]:
        """The `most` most frequent texts with their counts; of equals, the first of the alphabet."""
        return heapq.nsmallest(most, self._counts.items(), key=lambda entry: (-entry[1], entry[0]))

    def _prune(self) -> None:
        if len(self._counts) > self.size:
            cut = heapq.nlargest(self.size + 1, self._counts.values())[-1]
            self._counts = Counter({text: count - cut for text, count in self._counts.items() if count > cut})
            self.undercount += cut
