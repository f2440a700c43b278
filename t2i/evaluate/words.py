"""Word overlap: how much of a caption a reference caption supports."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np


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
    """Mean `precision`, `recall` and `f1` over captions, `exact` (the same words in the same order), and `n`."""
    each = word_rows(captions, references)
    return {name: float(np.mean(rows)) if len(rows) else 0.0 for name, rows in each.items()} | {"n": len(captions)}


def word_rows(captions: Sequence[str | None], references: Sequence[str]) -> dict[str, list[float]]:
    """What `word_scores` takes the means of, a value a caption. A missing caption (None) scores as an empty one."""
    pairs = [(caption or "", reference) for caption, reference in zip(captions, references, strict=True)]
    shared = [overlap(*pair) for pair in pairs]
    rows = {name: [each[number] for each in shared] for number, name in enumerate(("precision", "recall", "f1"))}
    return rows | {"exact": [float(tokens(caption) == tokens(reference)) for caption, reference in pairs]}
