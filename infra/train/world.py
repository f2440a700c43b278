"""The few collectives that the loop needs; alone in one process they are identities."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    """The number of this worker, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many workers there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: torch.Tensor) -> torch.Tensor:
    """The element-wise sum over workers."""
    if size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather(value: Any) -> list[Any]:
    """The value of every worker, on every worker, in order of rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def tensors(value: torch.Tensor) -> list[torch.Tensor]:
    """The tensor of every worker, on every worker, in order of rank; all have one shape. Gradients do not pass."""
    value = value.detach().contiguous()
    if size() == 1:
        return [value]
    values = [torch.empty_like(value) for _ in range(size())]
    dist.all_gather(values, value)
    return values


def rows(*parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the rows of the global batch show of themselves, on every worker, in the order of the plan.

    Each of `parts` is a micro-batch of this worker: columns whose first axis is the row, by the same names everywhere.
    Their other axes may differ in length: they are padded at the end with 0, or False, up to the longest of all. Where
    `weight` is among the columns, rows of weight 0 are left out. A column of another length than `weight` is one of all
    rows together, as (1, ...), and stays. `first` (parts,) is where the rows of each part begin. Gradients do not pass.
    """
    shown = [_weighed(part) for part in parts]
    counts = torch.tensor([len(part.get("weight", next(iter(part.values())))) for part in shown])
    columns = {name: _joined([part[name].detach() for part in shown]) for name in shown[0]}
    shapes = torch.tensor([int(counts.sum()), *(length for column in columns.values() for length in column.shape)])
    shapes, place = torch.stack(tensors(shapes)), 1
    gathered = {"first": shapes[: rank(), 0].sum() + counts.cumsum(0) - counts}
    for name, column in columns.items():
        its = shapes[:, place : place + column.dim()]
        each = tensors(_padded(column, its.max(0).values.tolist()))
        gathered[name] = torch.cat([part[:count] for part, count in zip(each, its[:, 0].tolist(), strict=True)])
        place += column.dim()
    return gathered


def from_first(value: Any) -> Any:
    """The value of rank 0, on every worker."""
    return gather(value)[0]


def _weighed(part: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Columns without the rows of weight 0."""
    weight = part.get("weight")
    if weight is None:
        return dict(part)
    there = weight > 0
    return {name: column[there] if len(column) == len(weight) else column for name, column in part.items()}


def _joined(columns: list[torch.Tensor]) -> torch.Tensor:
    longest = [max(lengths) for lengths in zip(*(column.shape[1:] for column in columns), strict=True)]
    return torch.cat([_padded(column, [len(column), *longest]) for column in columns])


def _padded(column: torch.Tensor, shape: list[int]) -> torch.Tensor:
    if list(column.shape) == shape:
        return column
    padded = column.new_zeros(shape)
    padded[tuple(slice(length) for length in column.shape)] = column
    return padded
