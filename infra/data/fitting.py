"""How a picture of any shape comes to a given size, and its maps, masks and boxes with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from PIL import Image

Size = tuple[int, int]  # (height, width) in pixels, of a picture that stands upright
Fit = Literal["stretch", "crop", "pad"]
"""`stretch` changes the aspect ratio, `crop` cuts off what is too much, half of it at each end, `pad` adds borders."""

MAX_SIDE = 8192


def check_fit(fit: Fit, size: Size | None, buckets: Sequence[Size]) -> None:
    """ValueError where pictures cannot come to one size, or to the nearest of some, in such a way."""
    if size is not None and buckets:
        raise ValueError("Pictures come to one image_size or to the nearest of some buckets: with buckets it is None.")
    if fit != "stretch" and size is None and not buckets:
        raise ValueError(f"fit={fit!r} says how pictures come to a size: give an image_size or buckets, too.")
    for one in (size, *buckets):
        if one is not None and not all(1 <= side <= MAX_SIDE for side in one):
            what = "A bucket" if buckets else "image_size"
            raise ValueError(f"{what} is (height, width), each from 1 to {MAX_SIDE}, but it is {tuple(one)}.")
    if twice := [bucket_name(one) for one in set(buckets) if list(buckets).count(one) > 1]:
        raise ValueError(f"Each bucket is given once, but {min(twice)} is given again.")


def bucket_name(size: Size) -> str:
    """As a column of an index has it: height x width, as 64x32."""
    return f"{size[0]}x{size[1]}"


def nearest(source: Size, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is nearest to the source's: by their quotient, as 2:1 is as far from 1:1 as 1:2 is.

    Of several that are as near, the one of fewest pixels, and of those the lowest. The order of `sizes` means nothing.
    """

    def distance(size: Size) -> tuple[Fraction, int, Size]:
        across, along = source[0] * size[1], source[1] * size[0]
        return Fraction(max(across, along), min(across, along)), size[0] * size[1], size

    return min(sizes, key=distance)


@dataclass(frozen=True)
class Frame:
    """Which part of a picture is shown where: what lies in `box` is resized to `inner` and put at `place` in `size`.

    All pairs are (height, width) or (top, left). `box` is (top, left, bottom, right) in pixels of `source`, and need
    not be whole; pixel i covers [i, i + 1).
    """

    source: Size
    box: tuple[float, float, float, float]
    inner: Size
    place: tuple[int, int]
    size: Size

    @property
    def whole(self) -> tuple[float, float]:
        """The size that the whole source has at the scale of what is shown."""
        top, left, bottom, right = self.box
        return self.inner[0] * self.source[0] / (bottom - top), self.inner[1] * self.source[1] / (right - left)

    def picture(self, image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
        """The picture, or a smaller copy of the same, resized by a Lanczos filter, on a ground of the colour `fill`."""
        top, left, bottom, right = self._box_in((image.height, image.width))
        size = (self.inner[1], self.inner[0])
        if image.size != size or (left, top, right, bottom) != (0, 0, *size):
            image = image.resize(size, Image.Resampling.LANCZOS, box=(left, top, right, bottom))
        if self.inner == self.size:
            return image
        ground = Image.new(image.mode, (self.size[1], self.size[0]), fill)
        ground.paste(image, (self.place[1], self.place[0]))
        return ground

    def map(self, values: np.ndarray, fill: float | bool = 0) -> np.ndarray:
        """A map or a mask of the picture, (H, W, ...) at any resolution, by the nearest value; borders hold `fill`."""
        top, left, bottom, right = self._box_in((values.shape[0], values.shape[1]))
        rows = _centres(top, bottom, self.inner[0], values.shape[0])
        columns = _centres(left, right, self.inner[1], values.shape[1])
        shown = values[rows[:, None], columns]
        if self.inner == self.size:
            return shown
        ground = np.full((*self.size, *values.shape[2:]), fill, dtype=values.dtype)
        y, x = self.place
        ground[y : y + self.inner[0], x : x + self.inner[1]] = shown
        return ground

    def boxes(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (N, 4) as (left, top, right, bottom) in pixels of the source, in pixels of `size`, float64.

        They are clipped to what is shown. Returns those that are left, (M, 4), and their numbers (M,) among the N: a
        box of which nothing is left, or which never held anything, is dropped.
        """
        top, left, bottom, right = self.box
        low, high = np.array([left, top] * 2), np.array([right, bottom] * 2)
        scale = np.array([self.inner[1] / (right - left), self.inner[0] / (bottom - top)] * 2)
        shown = (np.asarray(boxes, np.float64).reshape(-1, 4).clip(low, high) - low) * scale
        shown += np.array([self.place[1], self.place[0]] * 2)
        kept = np.flatnonzero((shown[:, 2] > shown[:, 0]) & (shown[:, 3] > shown[:, 1]))
        return shown[kept], kept

    def _box_in(self, actual: Size) -> tuple[float, float, float, float]:
        """The box in the pixels of a copy of the source that has another size."""
        sides = (0, 1, 0, 1)
        top, left, bottom, right = (
            min(edge * actual[side] / self.source[side], actual[side])
            for edge, side in zip(self.box, sides, strict=True)
        )
        return top, left, bottom, right


def frame(source: Size, size: Size, fit: Fit) -> Frame:
    """How a picture of the size `source` comes to `size`. One of the same aspect ratio is neither cut nor padded."""
    (h, w), (height, width) = source, size
    top = left = 0.0
    inner = size
    if fit == "crop":
        top = max(0.0, (h - w * height / width) / 2)
        left = max(0.0, (w - h * width / height) / 2)
    elif fit == "pad":
        inner = (min(height, _rounded(h * width, w)), min(width, _rounded(w * height, h)))
    place = ((height - inner[0]) // 2, (width - inner[1]) // 2)
    return Frame(source, (top, left, h - top, w - left), inner, place, size)


def _rounded(of: int, by: int) -> int:
    """The quotient, rounded, but no less than a pixel."""
    return max(1, (2 * of + by) // (2 * by))


def _centres(start: float, stop: float, count: int, most: int) -> np.ndarray:
    """The places that the centres of `count` equal parts of [start, stop] fall into."""
    centres = start + (np.arange(count) + 0.5) * ((stop - start) / count)
    return np.floor(centres).astype(np.int64).clip(0, most - 1)
