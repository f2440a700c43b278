"""Precision, recall, density and coverage: how drawn and real features lie in each other's neighbourhoods.

A neighbourhood is the open ball about a feature that reaches to the k-th nearest other of its own set. Precision and
recall are those of arXiv 1904.06991, density and coverage of arXiv 2002.09797.
"""

import numpy as np

from t2i.evaluate import intervals
from t2i.evaluate.intervals import Estimate

BLOCK = 1024  # real rows whose distances are held at a time


def manifold_scores(real: np.ndarray, drawn: np.ndarray, k: int = 5) -> dict[str, Estimate]:
    """The four of real (N, D) and drawn (M, D) features, each with its interval.

    `precision`: share of drawn ones within some real neighbourhood. `density`: how many real neighbourhoods hold a
    drawn one, over k; 1 is expected of real ones, and more is possible. `recall`: share of real ones within some drawn
    neighbourhood. `coverage`: share of real neighbourhoods that hold a drawn one. The intervals are over drawn rows
    for the first two and over real rows for the others, the neighbourhoods being as they are.
    """
    rows = neighbours(real, drawn, k)
    return {name: (intervals.mean if name == "density" else intervals.share)(each) for name, each in rows.items()}


def neighbours(real: np.ndarray, drawn: np.ndarray, k: int = 5) -> dict[str, np.ndarray]:
    """What `manifold_scores` takes the means of, a value a row: (M,) precision, density; (N,) recall, coverage."""
    real, drawn = np.asarray(real, np.float64), np.asarray(drawn, np.float64)
    if real.ndim != 2 or drawn.ndim != 2 or real.shape[1] != drawn.shape[1]:
        raise ValueError(f"Features are (N, D) and (M, D), but {real.shape} and {drawn.shape} were given.")
    if not 1 <= k < min(len(real), len(drawn)):
        raise ValueError(f"k is {k}: of {len(real)} and {len(drawn)} rows it is 1 to {min(len(real), len(drawn)) - 1}.")
    real_radii, drawn_radii = _radii(real, k), _radii(drawn, k)
    held = np.zeros(len(drawn))
    recall, coverage = np.zeros(len(real)), np.zeros(len(real))
    for start in range(0, len(real), BLOCK):
        part = slice(start, start + BLOCK)
        distances = _distances(real[part], drawn)
        within = distances < real_radii[part, None]
        held += within.sum(0)
        coverage[part] = within.any(1)
        recall[part] = (distances < drawn_radii).any(1)
    return {"precision": (held > 0).astype(float), "recall": recall, "density": held / k, "coverage": coverage}


def _radii(rows: np.ndarray, k: int) -> np.ndarray:
    """(N,) squared distances to the k-th nearest other row."""
    blocks = range(0, len(rows), BLOCK)
    return np.concatenate([np.partition(_distances(rows[at : at + BLOCK], rows), k, axis=1)[:, k] for at in blocks])


def _distances(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N, M) squared Euclidean distances."""
    return np.maximum((rows**2).sum(1)[:, None] + (others**2).sum(1) - 2 * rows @ others.T, 0)
