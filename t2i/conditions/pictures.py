"""Pictures as planes beside x: a smaller one, a map, edges, or a picture with a hole.

Rows give uint8 (B, C, H, W) of the config's size; modules scale them to [-1, 1] and bring them to the space's rows and
columns. The null of planes is zeros.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from t2i.pixels import blurred, edges, eight_bits, resized, stacked
from t2i.protocol import Batch, Draw, Space, Told
from t2i.random import normals

Size = tuple[int, int]  # rows and columns


@dataclass(frozen=True, kw_only=True)
class SmallerConfig:
    """The picture itself at a smaller `size`, for super-resolution.

    In training it is corrupted by draw, so that what another prior drew is not too clean or too rough for this one:
    blurred by a deviation of up to `blur` of its own pixels (DALL-E 2), and noised: x <- sqrt(1 - a^2) x + a epsilon
    with a from U(0, noise), which the network is told beside the time (Imagen, arXiv 2205.11487, section 2.4). When
    pictures are drawn, a column `<name>_amount` (B,) says a; it is 0 where there is none.
    """

    name: str = "smaller"
    size: Size
    blur: float = 0.0
    noise: float = 0.0
    drop: float | None = 0.0

    def __post_init__(self) -> None:
        if min(self.size) < 1 or self.blur < 0 or not 0 <= self.noise <= 1:
            raise ValueError(f"A smaller picture has sides, a blur of at least 0, and a noise in [0, 1]: {self}.")

    @property
    def reads(self) -> tuple[str, ...]:
        """The picture."""
        return ("pixels",)

    def rows(self, folder: str) -> "SmallerRows":
        """It keeps nothing."""
        return SmallerRows(self)

    def build(self, width: int, space: Space) -> "Smaller":
        """Planes and, where it is noised, a vector of `width` that says how far."""
        return Smaller(self, width, space)


@dataclass(frozen=True, kw_only=True)
class MapConfig:
    """A column of PNG pictures that belong to the row: labels, each a plane, or numbers such as depth, or colours."""

    name: str = "map"
    column: str
    size: Size
    labels: int = 0  # values are labels below this number; 0: they are brightnesses
    channels: Literal[1, 3] = 1  # of brightnesses
    drop: float | None = None

    def __post_init__(self) -> None:
        if min(self.size) < 1 or not 0 <= self.labels <= 256:
            raise ValueError(f"A map has sides of at least 1, and at most 256 labels: {self}.")

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of maps."""
        return (self.column,)

    def rows(self, folder: str) -> "MapRows":
        """It keeps nothing."""
        return MapRows(self)

    def build(self, width: int, space: Space) -> "Planes":
        """A plane a label, or a channel; the last is 1 where the map is known."""
        return Planes(self.name, space, 1 + (self.labels or self.channels), self.labels, known=True)


@dataclass(frozen=True, kw_only=True)
class EdgesConfig:
    """The edges of the picture: where its brightness changes most, one pixel wide."""

    name: str = "edges"
    size: Size
    threshold: float = 0.2  # of a step in brightness that shows, as a share of black to white
    drop: float | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """The picture."""
        return ("pixels",)

    def rows(self, folder: str) -> "EdgesRows":
        """It keeps nothing."""
        return EdgesRows(self)

    def build(self, width: int, space: Space) -> "Planes":
        """One plane, and one that is 1 where edges were told."""
        return Planes(self.name, space, 2, known=True)


@dataclass(frozen=True, kw_only=True)
class HoleConfig:
    """The picture with a hole to be painted: three planes, grey in the hole, then the hole, 1 inside and -1 outside.

    In training a rectangle is cut out, of sides and at a place by draw, or with the chance `all` the whole picture.
    When pictures are drawn, the column `hole` says where: (H, W), true where it is to be painted.
    """

    name: str = "hole"
    size: Size
    all: float = 0.25
    drop: float | None = 0.0

    @property
    def reads(self) -> tuple[str, ...]:
        """The picture, and its hole where somebody said one."""
        return ("pixels", "hole?")

    def rows(self, folder: str) -> "HoleRows":
        """It keeps nothing."""
        return HoleRows(self)

    def build(self, width: int, space: Space) -> "Planes":
        """Four planes."""
        return Planes(self.name, space, 4)


@dataclass(frozen=True)
class SmallerRows:
    """Pictures (B, 3, h, w) under the condition's name, blurred by draw, and `<name>_chance` (B,) in [0, 1)."""

    config: SmallerConfig

    def __call__(self, rows: Mapping[str, list], draw: Draw | None) -> dict[str, np.ndarray]:
        name, pictures = self.config.name, [resized(each, self.config.size) for each in rows["pixels"]]
        if self.config.blur and draw is not None:
            amounts = draw(f"{name}/blur") * self.config.blur
            pictures = [blurred(each, amount) for each, amount in zip(pictures, amounts.tolist(), strict=True)]
        found = {name: stacked(pictures)}
        if self.config.noise and draw is not None:
            found[f"{name}_chance"] = draw(f"{name}/noise").astype(np.float32)
        return found


@dataclass(frozen=True)
class MapRows:
    """Maps (B, C + 1, h, w) under the condition's name; the last is 255 where the row has a map."""

    config: MapConfig

    def __call__(self, rows: Mapping[str, list], draw: Draw | None) -> dict[str, np.ndarray]:
        return {self.config.name: np.stack([self._one(each) for each in rows[self.config.column]])}

    def _one(self, data: bytes | None) -> np.ndarray:
        height, width = self.config.size
        channels = 1 if self.config.labels else self.config.channels
        if data is None:
            return np.zeros((channels + 1, height, width), np.uint8)
        with Image.open(BytesIO(data)) as image:
            if self.config.labels:
                values = np.asarray(image.resize((width, height), Image.Resampling.NEAREST))
                if values.ndim > 2:
                    raise ValueError(f"A map of '{self.config.column}' is to hold labels, but it holds colours.")
                if values.max(initial=0) >= self.config.labels:
                    raise ValueError(
                        f"A map of '{self.config.column}' is to hold labels below {self.config.labels}, but one has "
                        f"the value {values.max()}."
                    )
            else:
                values = np.asarray(eight_bits(image, channels).resize((width, height), Image.Resampling.BILINEAR))
        planes = values.astype(np.uint8).reshape(height, width, channels).transpose(2, 0, 1)
        return np.concatenate([planes, np.full((1, height, width), 255, np.uint8)])


@dataclass(frozen=True)
class EdgesRows:
    """Edges (B, 2, h, w) under the condition's name: 255 on an edge; and everywhere 255, since they are known."""

    config: EdgesConfig

    def __call__(self, rows: Mapping[str, list], draw: Draw | None) -> dict[str, np.ndarray]:
        found = [edges(resized(each, self.config.size), self.config.threshold) for each in rows["pixels"]]
        told = np.stack(found)[:, None]
        return {self.config.name: np.concatenate([told, np.full_like(told, 255)], axis=1)}


@dataclass(frozen=True)
class HoleRows:
    """Pictures with holes (B, 4, h, w) under the condition's name."""

    config: HoleConfig

    def __call__(self, rows: Mapping[str, list], draw: Draw | None) -> dict[str, np.ndarray]:
        told = rows.get("hole?", rows.get("hole", [None] * len(rows["pixels"])))
        if draw is None and any(each is None for each in told):
            raise ValueError(f"The condition '{self.config.name}' wants to be told where to paint: give a 'hole'.")
        drawn = self._drawn(draw) if draw is not None else told
        holes = [
            mine if each is None else resized(np.asarray(each, np.uint8) * 255, self.config.size, nearest=True) > 127
            for each, mine in zip(told, drawn, strict=True)
        ]
        found = []
        for pixels, hole in zip(rows["pixels"], holes, strict=True):
            picture = np.where(hole[..., None], 128, resized(pixels, self.config.size))
            found.append(np.concatenate([picture, hole[..., None] * 255], axis=2).astype(np.uint8))
        return {self.config.name: stacked(found)}

    def _drawn(self, draw: Draw) -> list[np.ndarray]:
        name, whole = self.config.name, draw(f"{self.config.name}/all") < self.config.all
        spans = []
        for axis, side in zip(("rows", "columns"), self.config.size, strict=True):
            length = np.ceil((0.25 + 0.5 * draw(f"{name}/{axis}")) * side).astype(int)
            first = (draw(f"{name}/{axis}/first") * (side - length + 1)).astype(int)
            places = np.arange(side)
            spans.append((places >= first[:, None]) & (places < (first + length)[:, None]) | whole[:, None])
        return list(spans[0][:, :, None] & spans[1][:, None, :])


class Planes(nn.Module):
    """uint8 (B, C, H, W) to planes (B, C', h, w) in [-1, 1]; with `labels`, the first channel becomes one a label.

    If `known`, the last channel says where (255) there is something to tell, and becomes 1 there; all is 0 elsewhere.
    """

    says = frozenset({"planes"})
    length = 0

    def __init__(self, name: str, space: Space, channels: int, labels: int = 0, known: bool = False) -> None:
        super().__init__()
        if len(space.shape) < 2:
            raise ValueError(f"Planes lie beside values with rows and columns, but a picture's values are {space}.")
        self.name, self.channels = name, channels
        self._size = (space.shape[-2], space.shape[-1])
        self._labels, self._known = labels, known

    def load(self, folder: str) -> None:
        """It keeps nothing."""

    def forward(self, batch: Batch, dropped: torch.Tensor) -> Told:
        return Told(planes=self._to_space(self._scaled(batch[self.name])) * ~dropped[:, None, None, None])

    def _scaled(self, pictures: torch.Tensor) -> torch.Tensor:
        if not self._known:
            return pictures.float() / 127.5 - 1
        there = pictures[:, -1:].float() / 255
        values = pictures[:, :-1].float() / 127.5 - 1
        if self._labels:
            values = functional.one_hot(pictures[:, 0].long(), self._labels).permute(0, 3, 1, 2).float()
        return torch.cat([values * there, there], dim=1)

    def _to_space(self, planes: torch.Tensor) -> torch.Tensor:
        """By means of areas where there are fewer places, by straight lines between pixels where there are more."""
        if planes.shape[-2:] == self._size:
            return planes
        if planes.shape[-2] >= self._size[0] and planes.shape[-1] >= self._size[1]:
            return functional.adaptive_avg_pool2d(planes, self._size)
        return functional.interpolate(planes, self._size, mode="bilinear", align_corners=False)


class Smaller(Planes):
    """A smaller picture as three planes, noised, and how far as a vector, from cosines and sines of the amount."""

    def __init__(self, config: SmallerConfig, width: int, space: Space) -> None:
        super().__init__(config.name, space, 3)
        self.config = config
        self.says = frozenset({"planes", "vector"} if config.noise else {"planes"})
        self.amount = nn.Linear(2 * 16, width) if config.noise else None

    def forward(self, batch: Batch, dropped: torch.Tensor) -> Told:
        planes, there = self._scaled(batch[self.name]), ~dropped[:, None, None, None]
        if self.amount is None:
            return Told(planes=self._to_space(planes) * there)
        a_B = self._amounts(batch)
        a_B111 = a_B[:, None, None, None]
        if bool((a_B > 0).any()):
            noise = normals(batch["noise_key"], planes.shape[1:], f"condition/{self.name}").to(planes.dtype)
            planes = (1 - a_B111**2).sqrt() * planes + a_B111 * noise
        angles = a_B[:, None] * 1000 * 10_000.0 ** -(torch.arange(16, device=a_B.device) / 16)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.amount.weight.dtype)
        return Told(planes=self._to_space(planes) * there, vector=self.amount(waves) * ~dropped[:, None])

    def _amounts(self, batch: Batch) -> torch.Tensor:
        """(B,): as it was drawn in training; when pictures are drawn, what is said, or none."""
        if (chance_B := batch.get(f"{self.name}_chance")) is not None:
            return chance_B * self.config.noise
        said_B = batch.get(f"{self.name}_amount")
        return batch[self.name].new_zeros(len(batch[self.name]), dtype=torch.float32) if said_B is None else said_B
