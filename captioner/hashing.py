"""Two small signatures by which pictures that look alike are found: 64 bits of their shades, 16 of their colours."""

import numpy as np
from PIL import Image

SIDE = 32  # pixels of the grey copy
KEPT = 8  # frequencies in each direction
GRID = 4  # mean colours in each direction

# DCT-II as scipy has it: c_k = 2 sum_n x_n cos(pi k (2n + 1) / 2N).
_COSINES = 2 * np.cos(np.pi / (2 * SIDE) * np.outer(np.arange(KEPT), 2 * np.arange(SIDE) + 1))


def phash(pixels: np.ndarray) -> int:
    """The perceptual hash of (H, W, 3) uint8 pixels, 64 bits as a signed integer.

    A grey copy of 32x32 is transformed (DCT-II); the bits say which of the 8x8 lowest frequencies, row by row and the
    first in the highest bit, lie above their median: Zauner, Implementation and Benchmarking of Perceptual Image Hash
    Functions (2010), in the form of the package imagehash, whose bits these are. Copies of another size, encoding or
    brightness differ in few bits, unrelated pictures in 32 on average. It knows no colours, and little of drawings.
    """
    grey = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    frequencies = _COSINES @ np.asarray(grey, dtype=np.float64) @ _COSINES.T
    # Without rounding, the bits of a plain picture would be the noise of this machine's arithmetic.
    frequencies = np.round(frequencies, 3)
    bits = np.packbits(frequencies > np.median(frequencies))
    return int.from_bytes(bits.tobytes(), "big", signed=True)


def mean_colors(pixels: np.ndarray) -> bytes:
    """The mean colours of a 4x4 grid over (H, W, 3) uint8 pixels: 48 bytes, RGB by RGB in raster order."""
    return np.asarray(Image.fromarray(pixels).resize((GRID, GRID), Image.Resampling.BOX)).tobytes()
