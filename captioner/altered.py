"""Texts that are right but for one word: the hardest wrong partners a picture can have."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Self

Line = Sequence[int]
"""A text's tokens between the token that opens it and [SEP], these two included."""


class Alternatives:
    """Which tokens stand between the same two neighbours in the captions of a corpus.

    It knows no grammar: what is said where another word is said is, as a rule, of its kind, and one of a picture's
    words for another of its kind makes a text that is wrong, as CREPE's atomic foils are (arXiv 2212.07796) and the
    swapped texts that NegCLIP is trained against (arXiv 2210.01936). Words that also stand side by side, such as
    "large" and "red", are of different kinds and may be true together, so neither stands in for the other.
    """

    def __init__(self, contexts: dict[tuple[int, int], dict[int, int]], beside: set[tuple[int, int]]) -> None:
        self._contexts, self._beside = contexts, beside

    @classmethod
    def count(cls, lines: Iterable[Line], barred: Collection[int] = (), limit: int = 200_000) -> Self:
        """Those of the most frequent `limit` places between two neighbours; `barred` tokens are put in nowhere."""
        contexts: dict[tuple[int, int], Counter[int]] = {}
        beside: set[tuple[int, int]] = set()
        for line in lines:
            beside.update(pairwise(line))
            for left, token, right in zip(line, line[1:], line[2:], strict=False):
                if token not in barred:
                    contexts.setdefault((left, right), Counter())[token] += 1
        several = [place for place, tokens in contexts.items() if len(tokens) > 1]
        several.sort(key=lambda place: (-contexts[place].total(), place))
        return cls({place: dict(sorted(contexts[place].items())) for place in several[:limit]}, beside)

    def of(self, left: int, token: int, right: int) -> dict[int, int]:
        """What may stand for `token` between these neighbours, and how often it was seen there."""
        found = self._contexts.get((left, right), {})
        if token not in found:  # a barred one, or a text unlike the corpus
            return {}
        return {
            other: count
            for other, count in found.items()
            if other != token and (token, other) not in self._beside and (other, token) not in self._beside
        }

    def alter(self, line: Line, place: float, word: float, right: Collection[Line] = ()) -> list[int] | None:
        """The text with one token replaced, never one of the texts in `right`; None where there is none such.

        `place` and `word`, uniforms in [0, 1), choose where, among all places that have alternatives, and by what, as
        often as it was seen there.
        """
        true = {tuple(text) for text in right}
        choices: list[tuple[int, dict[int, int]]] = []
        for at in range(1, len(line) - 1):
            found = self.of(*line[at - 1 : at + 2])
            found = {other: n for other, n in found.items() if (*line[:at], other, *line[at + 1 :]) not in true}
            if found:
                choices.append((at, found))
        if not choices:
            return None
        at, found = choices[int(place * len(choices))]
        seen = list(accumulate(found.values()))
        other = list(found)[bisect_right(seen, word * seen[-1])]
        return [*line[:at], other, *line[at + 1 :]]
