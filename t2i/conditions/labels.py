"""One of some classes: a label as a vector."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from t2i.nn.weights import begins, normal
from t2i.protocol import Batch, Draw, Space, Told


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """A class of the row, by its name; a row without one, or with another, is told the null."""

    name: str = "label"
    column: str = "class_label"
    labels: tuple[str, ...] = ()  # none: those of the rows that are trained on
    drop: float | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of labels."""
        return (self.column,)

    def rows(self, folder: str) -> "LabelRows":
        """It keeps nothing."""
        return LabelRows(self.name, self.column, self.labels)

    def build(self, width: int, space: Space) -> "Label":
        """A vector of `width`."""
        if not self.labels:
            raise ValueError(f"The condition '{self.name}' has no labels to tell apart.")
        return Label(self, width)


@dataclass(frozen=True)
class LabelRows:
    """Labels to their places (B,) int64 under the condition's name; what is not among them is the number after."""

    name: str
    column: str
    labels: tuple[str, ...]

    def __call__(self, rows: Mapping[str, list], draw: Draw | None) -> dict[str, np.ndarray]:
        place = {label: number for number, label in enumerate(self.labels)}
        return {self.name: np.array([place.get(label, len(place)) for label in rows[self.column]], np.int64)}


class Label(nn.Module):
    """Places (B,) to vectors (B, D); the null is one more place."""

    says = frozenset({"vector"})
    length = 0
    channels = 0

    def __init__(self, config: LabelConfig, width: int) -> None:
        super().__init__()
        self.name, self._null = config.name, len(config.labels)
        self.vectors = begins(nn.Embedding(len(config.labels) + 1, width), weight=normal(0.02))

    def load(self, folder: str) -> None:
        """It keeps nothing but its weights."""

    def forward(self, batch: Batch, dropped: torch.Tensor) -> Told:
        return Told(vector=self.vectors(batch[self.name].masked_fill(dropped, self._null)))
