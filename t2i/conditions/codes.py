"""Codes of another tokenizer as tokens: an encoded picture, such as a segmentation map's."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from t2i.nn.weights import begins, normal
from t2i.protocol import Batch, Draw, Space, Told


@dataclass(frozen=True, kw_only=True)
class CodesConfig:
    """A column of `places` codes a row, each below `codes`."""

    name: str = "codes"
    column: str  # not that of the codes that the prior draws
    codes: int
    places: int
    drop: float | None = None

    def __post_init__(self) -> None:
        if min(self.codes, self.places) < 1:
            raise ValueError(f"Codes have places, and there is at least one code: {self}.")

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of codes."""
        return (self.column,)

    def rows(self, folder: str) -> "CodesRows":
        """It keeps nothing."""
        return CodesRows(self.name, self.column, self.places)

    def build(self, width: int, space: Space) -> "Codes":
        """Tokens of `width`."""
        return Codes(self, width)


@dataclass(frozen=True)
class CodesRows:
    """Codes (B, places) int64 under the condition's name."""

    name: str
    column: str
    places: int

    def __call__(self, rows: Mapping[str, list], draw: Draw | None) -> dict[str, np.ndarray]:
        codes = np.stack(rows[self.column]).astype(np.int64).reshape(len(rows[self.column]), -1)
        if codes.shape[1] != self.places:
            raise ValueError(f"'{self.column}' holds {codes.shape[1]} codes a row, but {self.places} were said.")
        return {self.name: codes}


class Codes(nn.Module):
    """Codes (B, S), or (B, h, w), to tokens (B, S, D), a vector a code and a place; the null is one more code."""

    says = frozenset({"tokens", "seen"})
    channels = 0

    def __init__(self, config: CodesConfig, width: int) -> None:
        super().__init__()
        self.name, self.length, self._null = config.name, config.places, config.codes
        self.codes = begins(nn.Embedding(config.codes + 1, width), weight=normal(0.5))
        self.places = begins(nn.Embedding(config.places, width), weight=normal(0.5))

    def load(self, folder: str) -> None:
        """It keeps nothing but its weights."""

    def forward(self, batch: Batch, dropped: torch.Tensor) -> Told:
        codes_BS = batch[self.name].flatten(1).masked_fill(dropped[:, None], self._null)
        tokens = self.codes(codes_BS) + self.places.weight
        return Told(tokens=tokens, seen=tokens.new_ones(tokens.shape[:2], dtype=torch.bool))
