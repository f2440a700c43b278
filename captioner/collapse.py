"""How alike the captions of a corpus are: the habits that a text-to-image model would learn from them.

DALL-E 3 (Betker et al. 2023, on blending) warns of letter casing, final stops, lengths, and of beginning with "a" or
"an" every time: put these numbers of the alt texts and of each style side by side.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from typing import Any

from captioner.sketches import Distinct, Frequent
from captioner.words import words

EDGES = (1, 6, 11, 16, 21, 31, 41, 61, 81, 101, 151, 201)  # where a bin of the histogram begins, in words
LONGEST = 2000  # words; longer captions count as that long, in the histogram and its quantiles
TOP = 20
_STOPS = (".", "\u3002")
_CHUNK = 512  # captions


class Collapse:
    """What was counted over captions; of one size, however many there were.

    Habits and lengths are counted exactly. Distinct n-grams and captions are estimated by the smallest `size` hashes,
    frequent n-grams by `size` counters: both exact while no more than `size` are distinct (see `captioner.sketches`).
    """

    def __init__(self, size: int = 2**16) -> None:
        self.habits: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()  # words to captions
        self.grams: Counter[int] = Counter()  # n to n-grams said
        self.distinct = {n: Distinct(size) for n in (1, 2, 3)}
        self.captions = Distinct(size)
        self.openings, self.trigrams = Frequent(size), Frequent(size)

    def add(self, captions: Iterable[str | None]) -> None:
        """Count captions, which are read as they come, some hundreds at a time."""
        stream = iter(captions)
        while chunk := list(islice(stream, _CHUNK)):
            texts = [text.strip() for text in chunk if text and not text.isspace()]
            self.habits["blank"] += len(chunk) - len(texts)
            self._add(texts, [words(text) for text in texts])

    def _add(self, texts: Sequence[str], said: Sequence[Sequence[str]]) -> None:
        self.habits.update(
            {
                "count": len(texts),
                "words": sum(len(text.split()) for text in texts),
                "begins_with_article": sum(line[:1] in (["a"], ["an"]) for line in said),
                "begins_with_capital": sum(text[0].isupper() for text in texts),
                "lower_case": sum(text.islower() for text in texts),
                "final_stop": sum(text.endswith(_STOPS) for text in texts),
            }
        )
        self.lengths.update(min(len(text.split()), LONGEST) for text in texts)
        self.captions.add(texts)
        self.openings.add(Counter(" ".join(line[:2]) for line in said if len(line) > 1))
        for n, distinct in self.distinct.items():
            counts = Counter(
                " ".join(gram) for line in said for gram in zip(*(line[i:] for i in range(n)), strict=False)
            )
            self.grams[n] += counts.total()
            distinct.add(counts)
            if n == 3:
                self.trigrams.add(counts)

    def merge(self, other: "Collapse") -> None:
        """Count what `other` counted, as if it were added here; shards in one order give one result."""
        self.habits.update(other.habits)
        self.lengths.update(other.lengths)
        self.grams.update(other.grams)
        for n, distinct in self.distinct.items():
            distinct.merge(other.distinct[n])
        self.captions.merge(other.captions)
        self.openings.merge(other.openings)
        self.trigrams.merge(other.trigrams)

    def report(self) -> dict[str, Any]:
        """The statistics as plain data: shares are of the captions that are not blank, 0 where there is none.

        `distinct_<n>` is the share of n-grams that are distinct (Li et al., arXiv 1510.03055), which falls as a corpus
        grows: compare corpora of one size. `openings` are the most frequent first two words, `trigrams` the most
        frequent three; their counts may be too low by `undercount`.
        """
        count = self.habits["count"]
        shares = ("begins_with_article", "begins_with_capital", "lower_case", "final_stop")
        return {
            "count": count,
            "blank": self.habits["blank"],
            **{name: _ratio(self.habits[name], count) for name in shares},
            "words": {
                "mean": _ratio(self.habits["words"], count),
                "median": self._quantile(0.5),
                "p95": self._quantile(0.95),
                "histogram": self._histogram(),
            },
            "duplicates": max(0.0, 1 - self.captions.estimate() / count) if count else 0.0,
            **{f"distinct_{n}": min(1.0, _ratio(self.distinct[n].estimate(), self.grams[n])) for n in self.distinct},
            "openings": [list(entry) for entry in self.openings.top(TOP)],
            "trigrams": [list(entry) for entry in self.trigrams.top(TOP)],
            "undercount": {"openings": self.openings.undercount, "trigrams": self.trigrams.undercount},
        }

    def _quantile(self, q: float) -> int:
        """The least number of words that a share `q` of the captions does not exceed."""
        seen, wanted = 0, q * self.lengths.total()
        for length in sorted(self.lengths):
            seen += self.lengths[length]
            if seen >= wanted:
                return length
        return 0

    def _histogram(self) -> dict[str, int]:
        """Captions by words, in bins named by their bounds, such as "6-10"."""
        bins = {f"{low}-{high - 1}": range(low, high) for low, high in pairwise(EDGES)}
        bins[f"{EDGES[-1]}+"] = range(EDGES[-1], LONGEST + 1)
        return {name: sum(self.lengths[length] for length in lengths) for name, lengths in bins.items()}


def describe(captions: Iterable[str | None]) -> dict[str, Any]:
    """The statistics of `Collapse.report` over captions, which are read once; None and blank ones count as blank."""
    collapse = Collapse()
    collapse.add(captions)
    return collapse.report()


def merge(parts: Iterable[Collapse]) -> Collapse:
    """All parts as one, such as the shards of a corpus; the parts are left as they are."""
    whole = None
    for part in parts:
        whole = whole or Collapse(part.captions.size)
        whole.merge(part)
    return whole or Collapse()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
