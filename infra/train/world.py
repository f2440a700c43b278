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


def rows(columns: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows of every worker, on every worker, in order of rank, and `first`: the place of this worker's first row.

    Every worker gives columns of the same shapes. Gradients do not pass.
    """
    count = len(next(iter(columns.values())))
    gathered = {"first": torch.tensor(rank() * count)}
    for name, column in columns.items():
        parts = [column.detach().contiguous()]
        if size() > 1:
            parts = [torch.empty_like(parts[0]) for _ in range(size())]
            dist.all_gather(parts, column.detach().contiguous())
        gathered[name] = torch.cat(parts)
    return gathered


def from_first(value: Any) -> Any:
    """The value of rank 0, on every worker."""
    return gather(value)[0]
