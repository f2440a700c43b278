"""Reconstruction error: how far a tokenizer's pictures are from the originals."""

import math
from collections.abc import Sequence

import numpy as np


def mean_squared_error(image: np.ndarray, other: np.ndarray) -> float:
    """Mean squared difference of two (H, W, 3) uint8 images, the full range being 1: 0 is equal, 1 black on white."""
    if image.shape != other.shape:
        raise ValueError(f"Images differ in size: {image.shape} and {other.shape}.")
    difference = (image.astype(np.float64) - other.astype(np.float64)) / 255
    return float(np.mean(difference**2))


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a `mean_squared_error`; infinite where there is none."""
    return -10 * math.log10(error) if error > 0 else math.inf


def reconstruction_scores(images: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> dict[str, float]:
    """`mse` over all pixels, its `psnr` in dB, and `n`; images are (H, W, 3) uint8 and may differ in size.

    PSNR is of the pooled error, not the mean of each image's own: that one is infinite as soon as one image is perfect.
    """
    errors = [mean_squared_error(image, other) for image, other in zip(images, others, strict=True)]
    sizes = [image.size for image in images]
    error = sum(e * size for e, size in zip(errors, sizes, strict=True)) / max(1, sum(sizes))
    return {"mse": error, "psnr": min(psnr(error), 100.0) if errors else 0.0, "n": len(errors)}
