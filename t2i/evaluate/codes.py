"""How much of a codebook is used, and how evenly."""

from collections.abc import Sequence

import numpy as np

from t2i.evaluate import intervals
from t2i.evaluate.intervals import Estimate


def code_scores(codes: Sequence[np.ndarray], size: int) -> dict[str, Estimate]:
    """`code_usage`: share of the `size` codes that occur; `code_perplexity`: exp of their entropy, from 1 to `size`.

    `codes` are integers in [0, size), an array of any shape a picture; the intervals are over pictures.
    """
    rows = [np.asarray(each).reshape(-1) for each in codes]
    every = np.concatenate(rows) if rows else np.zeros(0, int)
    if not every.size or every.min() < 0 or every.max() >= size:
        raise ValueError(f"Codes lie within [0, {size}), at least one of them; found {every.size} that do not all.")

    def counts(pictures: np.ndarray) -> np.ndarray:
        return np.bincount(np.concatenate([rows[number] for number in pictures]), minlength=size)

    numbers = np.arange(len(rows))
    return {
        "code_usage": intervals.of_sets(lambda drawn: float((counts(drawn) > 0).mean()), numbers),
        "code_perplexity": intervals.of_sets(lambda drawn: perplexity(counts(drawn)), numbers),
    }


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy, in nats, of how often each code occurs."""
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
