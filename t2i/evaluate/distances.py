"""How far two sets of pictures are apart, by the features (N, D) that some extractor sees in them."""

from collections.abc import Sequence

import numpy as np

from t2i.evaluate import intervals
from t2i.evaluate.intervals import SEED, Estimate

BLOCK = 2048  # rows whose kernel is held at a time


def frechet(mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians, means (D,) and covariances (D, D) (arXiv 1706.08500, equation 6).

    |m - m'|² + Tr(C + C' - 2 (C C')^½). The last trace is that of (C^½ C' C^½)^½, whose eigenvalues are real and at
    least 0 even where both are singular.
    """
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other_covariance @ root), 0)).sum()
    apart = ((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other_covariance) - 2 * shared
    return max(0.0, float(apart))  # rounding can leave less than nothing between two equal sets


def frechet_distance(features: np.ndarray, others: np.ndarray) -> float:
    """FID: `frechet` of the Gaussians with the means and the (unbiased) covariances of two sets of features.

    Biased upward, the more so the fewer rows there are (arXiv 1911.07023): compare only sets of equal size.
    """
    sets = _checked(features, others)
    moments = [(rows.mean(0), np.cov(rows, rowvar=False).reshape(rows.shape[1], -1)) for rows in sets]
    return frechet(*moments[0], *moments[1])


def fid(features: np.ndarray, others: np.ndarray, resamples: int = 200, seed: int = SEED) -> Estimate:
    """`frechet_distance`, and its interval over the rows of both sets."""
    return intervals.of_sets(frechet_distance, *_checked(features, others), resamples=resamples, seed=seed)


def kernel_distance(
    features: np.ndarray, others: np.ndarray, subsets: int = 0, size: int = 1000, seed: int = SEED
) -> float:
    """KID: the unbiased squared MMD by the kernel k(x, y) = (x·y / D + 1)³ (arXiv 1801.01401, section 4).

    Of all pairs of rows or, as published figures are, the mean over `subsets` of `size` rows, drawn without replacement
    by the seed. About 0, and often a little below, for two sets of one distribution.
    """
    sets = _checked(features, others)
    if not subsets:
        return float(_mmd(sets, [np.ones((1, len(rows))) for rows in sets])[0])
    rng, size = np.random.default_rng(seed), min(size, *map(len, sets))
    some = [[rows[rng.permutation(len(rows))[:size]] for rows in sets] for _ in range(subsets)]
    return float(np.mean([kernel_distance(mine, theirs) for mine, theirs in some]))


def kid(features: np.ndarray, others: np.ndarray, resamples: int = 200, seed: int = SEED) -> Estimate:
    """`kernel_distance` of all pairs, and its interval over the rows of both sets."""
    sets = _checked(features, others)
    counts = [
        np.stack([np.bincount(drawn, minlength=len(rows)) for drawn in intervals.draws(len(rows), resamples, seed + n)])
        for n, rows in enumerate(sets)
    ]
    return Estimate(kernel_distance(*sets), intervals.between(_mmd(sets, counts)), min(map(len, sets)))


def _mmd(sets: Sequence[np.ndarray], counts: Sequence[np.ndarray]) -> np.ndarray:
    """(R,) estimates: in that of line r each row of set s stands `counts[s][r, row]` times.

    A row makes no pair with itself nor with a copy of itself, so that drawing rows anew biases nothing.
    """
    value = -2 * _summed(*sets, *counts) / (counts[0].sum(1) * counts[1].sum(1))
    for rows, count in zip(sets, counts, strict=True):
        same = count.astype(np.float64) ** 2
        itself = ((rows**2).sum(1) / rows.shape[1] + 1) ** 3
        value += (_summed(rows, rows, count, count) - same @ itself) / (count.sum(1) ** 2 - same.sum(1))
    return value


def _summed(rows: np.ndarray, others: np.ndarray, counts: np.ndarray, other_counts: np.ndarray) -> np.ndarray:
    """(R,) sums of the kernel over all pairs of rows, each as often as it is counted."""
    total = np.zeros(len(counts))
    for start in range(0, len(rows), BLOCK):
        kernel = (rows[start : start + BLOCK] @ others.T / rows.shape[1] + 1) ** 3
        total += ((counts[:, start : start + BLOCK] @ kernel) * other_counts).sum(1)
    return total


def inception_score(probabilities: np.ndarray) -> float:
    """exp of the mean KL(p(y|x) || p(y)) (arXiv 1606.03498): 1 where all pictures look alike, up to the classes C.

    `probabilities` (N, C), rows that sum to 1, are of any classifier. Of all rows at once: published figures are means
    over ten parts, which are a little lower.
    """
    each = np.asarray(probabilities, np.float64)
    if each.ndim != 2 or not len(each) or (each < 0).any() or not np.allclose(each.sum(1), 1, atol=1e-4):
        raise ValueError(f"Probabilities are rows of at least 0 that sum to 1; found an array {each.shape}.")
    entropies = [-(p * np.log(np.where(p > 0, p, 1))).sum(-1).mean() for p in (each, each.mean(0))]
    return float(np.exp(entropies[1] - entropies[0]))


def _checked(features: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64; ValueError unless they are (N, D) and (M, D), finite, of at least two rows each."""
    sets = np.asarray(features, np.float64), np.asarray(others, np.float64)
    if any(rows.ndim != 2 or len(rows) < 2 for rows in sets) or sets[0].shape[1] != sets[1].shape[1]:
        shapes = " and ".join(str(rows.shape) for rows in sets)
        raise ValueError(f"A distance needs two sets of features (N, D), at least two rows each; found {shapes}.")
    if not all(np.isfinite(rows).all() for rows in sets):
        raise ValueError("Some features are not finite numbers: the extractor, or a picture, is broken.")
    return sets
