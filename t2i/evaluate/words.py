"""Word overlap: how much of a caption a reference caption supports."""

import re
from collections import Counter
from collections.abc import Sequence


def tokens(text: str) -> list[str]:
    """Lower-case words and numbers; punctuation is dropped, hyphens and apostrophes split words."""
    return re.findall(r"[^\W_]+", text.lower())


def overlap(caption: str, reference: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of a caption's words as a multiset, as SQuAD scores answers (arXiv 1606.05250).

    Two texts without a word agree (1, 1, 1); a text with words and one without do not (0, 0, 0).
    """
    found, wanted = Counter(tokens(caption)), Counter(tokens(reference))
    if not found or not wanted:
        same = float(found == wanted)
        return same, same, same
    shared = (found & wanted).total()
    return shared / found.total(), shared / wanted.total(), 2 * shared / (found.total() + wanted.total())


def word_scores(captions: Sequence[str | None], references: Sequence[str]) -> dict[str, float]:
    """Mean `precision`, `recall` and `f1` over captions, `exact` (the same words in the same order), and `n`.

    A missing caption (None) scores as an empty one.
    """
    pairs = [(caption or "", reference) for caption, reference in zip(captions, references, strict=True)]
    count = len(pairs)
    totals = [sum(column) for column in zip(*(overlap(*pair) for pair in pairs), strict=True)] or [0.0, 0.0, 0.0]
    exact = sum(tokens(caption) == tokens(reference) for caption, reference in pairs)
    precision, recall, f1, exact = (total / count if count else 0.0 for total in (*totals, exact))
    return {"precision": precision, "recall": recall, "f1": f1, "exact": exact, "n": count}
