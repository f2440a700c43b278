"""A layout: boxes and what is in them, a token each (LDM's layouts, arXiv 2112.10752, section 4.3)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from t2i.nn.weights import begins, normal
from t2i.protocol import Batch, Draw, Space, Told

OCTAVES = 6  # of sines and cosines of a box's sides


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """The columns `boxes` (left, top, right, bottom, as shares of the sides) and `box_classes` of a row."""

    name: str = "layout"
    classes: tuple[str, ...] = ()  # none: those of the rows that are trained on
    boxes: int = 16  # of a row, at most: the largest
    drop: float | None = None

    def __post_init__(self) -> None:
        if self.boxes < 1:
            raise ValueError(f"A layout has room for at least one box, but boxes is {self.boxes}.")

    @property
    def reads(self) -> tuple[str, ...]:
        """Boxes and their classes, as ingest writes them."""
        return ("boxes", "box_classes")

    def rows(self, folder: str) -> "LayoutRows":
        """It keeps nothing."""
        return LayoutRows(self.name, self.classes, self.boxes)

    def build(self, width: int, space: Space) -> "Layout":
        """Tokens of `width`."""
        return Layout(self, width)


@dataclass(frozen=True)
class LayoutRows:
    """`<name>` (B, n, 4) float32 boxes and `<name>_class` (B, n) int64: 0 for none, 1 for an unknown class, 2 on.

    n is the most boxes of a row of the batch. Of more boxes than there is room for, the largest are kept.
    """

    name: str
    classes: tuple[str, ...]
    boxes: int

    def __call__(self, rows: Mapping[str, list], draw: Draw | None) -> dict[str, np.ndarray]:
        known = {name: number for number, name in enumerate(self.classes, start=2)}
        kept = [self._largest(each) for each in rows["boxes"]]
        most = max((len(places) for _, places in kept), default=0)
        boxes, classes = np.zeros((len(kept), most, 4), np.float32), np.zeros((len(kept), most), np.int64)
        for row, ((its_boxes, places), names) in enumerate(zip(kept, rows["box_classes"], strict=True)):
            boxes[row, : len(places)] = its_boxes
            told = [names[place] if names else None for place in places]
            classes[row, : len(places)] = [1 if name is None else known.get(name, 1) for name in told]
        return {self.name: boxes, f"{self.name}_class": classes}

    def _largest(self, boxes: np.ndarray | list | None) -> tuple[np.ndarray, list[int]]:
        each = np.array([list(box) for box in boxes] if boxes is not None else [], np.float32).reshape(-1, 4)
        areas = (each[:, 2] - each[:, 0]) * (each[:, 3] - each[:, 1])
        places = sorted(np.argsort(-areas, kind="stable")[: self.boxes].tolist())
        return each[places], places


class Layout(nn.Module):
    """Boxes to tokens (B, 1 + n, D): first one that says whether there is a layout at all; the null is that alone."""

    says = frozenset({"tokens", "seen"})
    channels = 0

    def __init__(self, config: LayoutConfig, width: int) -> None:
        super().__init__()
        self.name, self.length = config.name, 1 + config.boxes
        self.classes = begins(nn.Embedding(len(config.classes) + 2, width), weight=normal(0.5))
        self.sides = nn.Linear(4 * 2 * OCTAVES, width)
        self.first = begins(nn.Embedding(2, width), weight=normal(0.5))

    def load(self, folder: str) -> None:
        """It keeps nothing but its weights."""

    def forward(self, batch: Batch, dropped: torch.Tensor) -> Told:
        boxes_BN4, classes_BN = batch[self.name], batch[f"{self.name}_class"]
        angles = boxes_BN4[..., None] * (math.pi * 2.0 ** torch.arange(OCTAVES, device=boxes_BN4.device))
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(2)
        tokens = self.classes(classes_BN) + self.sides(waves.to(self.sides.weight.dtype))
        first = self.first((~dropped).long())[:, None]
        seen = (classes_BN > 0) & ~dropped[:, None]
        return Told(
            tokens=torch.cat([first, tokens], dim=1),
            seen=torch.cat([torch.ones_like(dropped)[:, None], seen], dim=1),
        )
