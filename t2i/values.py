"""Numbers of rows as the feed hands them over, to arrays that a model takes."""

from collections.abc import Sequence

import numpy as np


def as_floats(values: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of numbers as float32 (B, N); 16-bit whole numbers are the upper halves of floats, which is bfloat16."""
    stacked = np.stack(values)
    if stacked.dtype == np.uint16:
        return (stacked.astype(np.uint32) << 16).view(np.float32)
    return stacked.astype(np.float32)


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """Finite float32 numbers as bfloat16 in uint16, to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
