"""Numbers of rows as the feed hands them over, to arrays that a model takes."""

from collections.abc import Sequence

import numpy as np


def as_floats(values: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of numbers as float32 (B, N); 16-bit whole numbers are the upper halves of floats, which is bfloat16."""
    stacked = np.stack(values)
    if stacked.dtype == np.uint16:
        return (stacked.astype(np.uint32) << 16).view(np.float32)
    return stacked.astype(np.float32)


def deviation_column(column: str) -> str:
    """Where the deviations of values lie whose means are in a column."""
    return f"{column}_deviation"
