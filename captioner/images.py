"""Pictures as the captioner sees them: one function for training and for captioning."""

from collections.abc import Sequence

import numpy as np
from PIL import Image


def fit_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The (H, W, 3) uint8 image stretched to `size` (height, width) by bicubic interpolation.

    Stretching, not cropping, is what BLIP was trained with: nothing that a caption may name is cut off.
    """
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def fit_images(images: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Each of the images as `fit_image` has it: (B, H, W, 3) uint8."""
    return np.stack([fit_image(image, size) for image in images])
