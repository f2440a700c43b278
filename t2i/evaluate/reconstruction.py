"""Reconstruction error: how far a tokenizer's pictures are from the originals."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from t2i.evaluate import intervals
from t2i.evaluate.intervals import Estimate

LEAST_SIDE = 6  # pixels: SSIM's window reaches 5 beyond the border, where it sees the image reflected
PERFECT = 100.0  # dB that stand for no error at all


def mean_squared_error(image: np.ndarray, other: np.ndarray) -> float:
    """Mean squared difference of two (H, W, 3) uint8 images, the full range being 1: 0 is equal, 1 black on white."""
    _demand_equal(image, other)
    difference = (image.astype(np.float64) - other.astype(np.float64)) / 255
    return float(np.mean(difference**2))


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a `mean_squared_error`; infinite where there is none."""
    return -10 * math.log10(error) if error > 0 else math.inf


def ssim(image: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity of two (H, W, 3) uint8 images, in [-1, 1]: 1 is equal (Wang et al. 2004, by torchmetrics).

    Mean over colours and places of what a Gaussian window of 11x11 pixels, sigma 1.5, sees; at the borders it sees the
    image reflected. Other libraries leave the borders out. ValueError for images with a side below 6 pixels.
    """
    import torch  # slow to import: `plan` does without
    from torchmetrics.functional.image import structural_similarity_index_measure

    _demand_equal(image, other)
    if min(image.shape[:2]) < LEAST_SIDE:
        raise ValueError(f"SSIM needs sides of at least {LEAST_SIDE} pixels, but the image is {image.shape}.")
    first, second = (torch.from_numpy(each.astype(np.float64)).permute(2, 0, 1)[None] for each in (image, other))
    similar: Any = structural_similarity_index_measure(first, second, data_range=255.0)
    return float(similar)


def reconstruction_scores(images: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> dict[str, Any]:
    """`mse` over all pixels, its `psnr` in dB, `ssim`, each with its 95 % interval (`_interval`), and `n`.

    Images are (H, W, 3) uint8 and may differ in size. PSNR is of the pooled error, not the mean of each image's own:
    that one is infinite as soon as one image is perfect. SSIM is the mean over images, where all are large enough.
    """
    pairs = list(zip(images, others, strict=True))
    if not pairs:
        return {"mse": 0.0, "psnr": 0.0, "n": 0}
    sizes = np.array([image.size for image in images], float)
    error = intervals.share([mean_squared_error(*pair) * size for pair, size in zip(pairs, sizes, strict=True)], sizes)
    high, value, low = (min(psnr(each), PERFECT) for each in (error.interval[0], error.value, error.interval[1]))
    scores: dict[str, Any] = {
        "mse": error.value,
        "mse_interval": error.interval,
        "psnr": value,
        "psnr_interval": (low, high),
        "n": len(pairs),
    }
    if min(min(image.shape[:2]) for image in images) >= LEAST_SIDE:
        similar: Estimate = intervals.mean([ssim(*pair) for pair in pairs])
        scores |= {"ssim": similar.value, "ssim_interval": similar.interval}
    return scores


def _demand_equal(image: np.ndarray, other: np.ndarray) -> None:
    if image.shape != other.shape:
        raise ValueError(f"Images differ in size: {image.shape} and {other.shape}.")
