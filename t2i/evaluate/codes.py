"""How much of a codebook is used, and how evenly."""

import numpy as np

from t2i.evaluate import intervals
from t2i.evaluate.intervals import Estimate


def code_scores(codes: np.ndarray, size: int) -> dict[str, Estimate]:
    """`code_usage`: share of the `size` codes that occur; `code_perplexity`: exp of their entropy, from 1 to `size`.

    `codes` (N, ...) integers in [0, size), a picture a row; the intervals are over pictures.
    """
    rows = np.asarray(codes)
    if not rows.size or rows.min() < 0 or rows.max() >= size:
        raise ValueError(f"Codes lie within [0, {size}); found {rows.size} of them.")
    return {
        "code_usage": intervals.of_sets(lambda drawn: float((_counts(drawn, size) > 0).mean()), rows),
        "code_perplexity": intervals.of_sets(lambda drawn: perplexity(_counts(drawn, size)), rows),
    }


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy, in nats, of how often each code occurs."""
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _counts(codes: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(codes.reshape(-1), minlength=size)
