"""How a picture comes to the square that CLIP sees: as transformers' CLIPImageProcessor does it, but in 8 bits.

It is scaled by `MEAN` and `STD`, of a channel in [0, 1], where it is looked at, so that a quarter of the bytes travels.
"""

from typing import Any, Literal

import numpy as np

from t2i.pixels import resized

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

Fit = Literal["crop", "stretch"]


def fitted(pixels: np.ndarray, side: int, fit: Fit) -> np.ndarray:
    """(side, side, 3) uint8 of (H, W, 3) uint8: its middle, the shorter side brought to `side`, or all, stretched."""
    if fit == "stretch":
        return resized(pixels, (side, side))
    height, width = pixels.shape[:2]
    longer = int(side * max(height, width) / min(height, width))
    pixels = resized(pixels, (side, longer) if height <= width else (longer, side))
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


def processor(side: int, fit: Fit) -> Any:
    """The same as transformers' users find it beside a model."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # needs no torchvision

    square = {"height": side, "width": side}
    if fit == "stretch":
        return CLIPImageProcessorPil(size=square, do_center_crop=False, crop_size=square)
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
