"""Columns of Arrow as NumPy has them: numbers as numbers, lists of numbers as arrays, the rest as objects."""

from typing import Any

import numpy as np
import pyarrow as pa


def as_list(column: pa.Array, rows: np.ndarray) -> list[Any]:
    """Values of some rows; lists of numbers come as arrays."""
    if not is_numbers(column.type):
        return column.take(pa.array(rows)).to_pylist()
    values, ends = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
    arrays = [values[start:stop] for start, stop in zip(ends[rows].tolist(), ends[rows + 1].tolist(), strict=True)]
    if column.null_count:
        there = column.is_valid().to_numpy(zero_copy_only=False)[rows].tolist()
        arrays = [array if valid else None for array, valid in zip(arrays, there, strict=True)]
    return arrays


def as_array(column: pa.Array, rows: np.ndarray) -> np.ndarray:
    """Values of some rows as one array, of objects where they are no numbers."""
    if is_numbers(column.type):
        return objects(as_list(column, rows))
    return column.take(pa.array(rows)).to_numpy(zero_copy_only=False)


def objects(values: list[Any]) -> np.ndarray:
    """An array of what NumPy is not to look into."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def is_numbers(kind: pa.DataType) -> bool:
    """Whether a type is of lists of numbers."""
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_primitive(kind.value_type)
