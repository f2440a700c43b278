"""Pictures as arrays: sizes, blur and edges. (H, W, 3) or (H, W) uint8."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image


def scale(images: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """From [-1, 1] to [0, 1], in which some published models see and say pictures."""
    return (images + 1) / 2


def from_unit(images: torch.Tensor) -> torch.Tensor:
    """From [0, 1] to [-1, 1]."""
    return images * 2 - 1


def to_pixels(images: torch.Tensor) -> list[np.ndarray]:
    """(B, 3, H, W) in [-1, 1] to (H, W, 3) uint8 arrays."""
    return list(((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())


def sheet(pictures: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """(H, W, 3) uint8 arrays side by side, row by row, with so many pixels of black between and around them."""
    height, width = (max(picture.shape[side] for picture in pictures) + gap for side in (0, 1))
    rows = -(-len(pictures) // columns)
    whole = np.zeros((rows * height + gap, columns * width + gap, 3), np.uint8)
    for number, picture in enumerate(pictures):
        top, left = gap + number // columns * height, gap + number % columns * width
        whole[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return whole


def patches(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """How many patches of so many pixels a side stand in a (height, width); ValueError where it does not divide."""
    rows, columns = (-(-side // patch) for side in size)
    if (rows * patch, columns * patch) != tuple(size):
        raise ValueError(
            f"Images of {size[0]}x{size[1]} do not divide into patches of {patch} pixels: give an image_size or "
            f"buckets that do, such as {rows * patch}x{columns * patch}."
        )
    return rows, columns


def resized(pixels: np.ndarray, size: tuple[int, int], nearest: bool = False) -> np.ndarray:
    """(H, W, 3) or (H, W) uint8 at a size (h, w); as it is, where it has that."""
    if pixels.shape[:2] == size:
        return pixels
    how = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC  # which takes means where it shrinks
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), how))


def eight_bits(image: Image.Image, channels: int) -> Any:
    """Grey or colours in 8 bits; numbers of 16 bits keep their upper half."""
    if image.mode in ("I;16", "I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def blurred(pixels: np.ndarray, deviation: float) -> np.ndarray:
    """(H, W, 3) uint8, blurred by a Gaussian of a deviation in pixels; the borders go on as they end."""
    if deviation < 0.1:
        return pixels
    reach = max(1, round(3 * deviation))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    weights /= weights.sum()
    values = np.pad(pixels.astype(np.float64), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    down = np.stack([values[place : place + pixels.shape[0]] for place in range(len(weights))])
    values = np.tensordot(weights, down, 1)
    across = np.stack([values[:, place : place + pixels.shape[1]] for place in range(len(weights))])
    values = np.tensordot(weights, across, 1)
    return np.rint(values).astype(np.uint8)


def edges(pixels: np.ndarray, threshold: float) -> np.ndarray:
    """(H, W) uint8: 255 on the crest of a change of brightness that is more than `threshold` in all.

    Of the steps of Canny (1986, doi 10.1109/TPAMI.1986.4767851): a blur, the gradient, and only its crests. A blurred
    step of size s has a gradient of about s / 4 where it is steepest.
    """
    grey = blurred(pixels, 1.0).astype(np.float64).mean(axis=2) / 255
    dy, dx = np.gradient(np.pad(grey, 1, mode="edge"))
    size = np.hypot(dx, dy)
    crest = np.zeros_like(grey, dtype=bool)
    inner = size[1:-1, 1:-1]
    turn = (np.round(np.arctan2(dy, dx)[1:-1, 1:-1] / (np.pi / 4)) % 4).astype(int)
    for number, (down, right) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = np.roll(size, (-down, -right), (0, 1))[1:-1, 1:-1]
        behind = np.roll(size, (down, right), (0, 1))[1:-1, 1:-1]
        crest |= (turn == number) & (inner > ahead) & (inner >= behind)
    return np.where(crest & (inner > threshold / 4), 255, 0).astype(np.uint8)


def stacked(pictures: list[np.ndarray]) -> np.ndarray:
    """(H, W, C) pictures as (B, C, H, W)."""
    return np.stack(pictures).transpose(0, 3, 1, 2)
