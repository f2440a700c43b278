"""Pictures as the captioner sees them: one function for training and for captioning."""

from collections.abc import Sequence

import numpy as np
from PIL import Image


def fit_images(images: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The (H, W, 3) uint8 images stretched to `size` (height, width) by bicubic interpolation: (B, H, W, 3) uint8.

    Stretching, not cropping, is what BLIP was trained with: nothing that a caption may name is cut off.
    """
    height, width = size
    fitted = [
        image
        if image.shape[:2] == (height, width)
        else np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        for image in images
    ]
    return np.stack(fitted)
