"""Numbers of a row as a vector, such as the embedding of a picture, or values that a prior drew."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from t2i.nn.weights import begins, constant
from t2i.protocol import Batch, Draw, Space, Told
from t2i.values import as_floats


@dataclass(frozen=True, kw_only=True)
class VectorConfig:
    """A column of `size` numbers a row; `tokens` says it as so many tokens, too (DALL-E 2's decoder: four)."""

    name: str = "vector"
    column: str = "embedding"
    size: int
    tokens: int = 0
    drop: float | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or self.tokens < 0:
            raise ValueError(f"A vector has at least one number, and no negative number of tokens: {self}.")

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of numbers."""
        return (self.column,)

    def rows(self, folder: str) -> "VectorRows":
        """It keeps nothing."""
        return VectorRows(self.name, self.column, self.size)

    def build(self, width: int, space: Space) -> "Vector":
        """A vector of `width`, and tokens."""
        return Vector(self, width)


@dataclass(frozen=True)
class VectorRows:
    """Numbers (B, size) float32 under the condition's name."""

    name: str
    column: str
    size: int

    def __call__(self, rows: Mapping[str, list], draw: Draw | None) -> dict[str, np.ndarray]:
        numbers = as_floats(rows[self.column])
        if numbers.shape[1:] != (self.size,):
            raise ValueError(f"'{self.column}' holds {numbers.shape[1:]} numbers a row, but {self.size} were said.")
        return {self.name: numbers}


class Vector(nn.Module):
    """Numbers (B, N) to a vector (B, D) and, where wanted, tokens (B, S, D); the null is learned, from zero on."""

    channels = 0

    def __init__(self, config: VectorConfig, width: int) -> None:
        super().__init__()
        self.name, self.length = config.name, config.tokens
        self.says = frozenset({"vector", "tokens", "seen"} if config.tokens else {"vector"})
        self._width = width
        self.null = nn.Parameter(torch.zeros(config.size))
        begins(self, null=constant(0.0))
        self.project = nn.Linear(config.size, width * (1 + config.tokens))

    def load(self, folder: str) -> None:
        """It keeps nothing but its weights."""

    def forward(self, batch: Batch, dropped: torch.Tensor) -> Told:
        numbers = torch.where(dropped[:, None], self.null, batch[self.name].to(self.null.dtype))
        vector, *tokens = self.project(numbers).split(self._width, dim=1)
        if not tokens:
            return Told(vector=vector)
        told = torch.stack(tokens, dim=1)
        return Told(vector=vector, tokens=told, seen=told.new_ones(told.shape[:2], dtype=torch.bool))
