"""Requests in the words of OpenAI's chat API, which endpoints and vLLM take alike."""

import base64
import io
from typing import Any, Literal

import numpy as np
from PIL import Image

Encoding = Literal["jpeg", "png"]
QUALITY = 90  # of JPEG; 4:4:4 colour, so that small coloured text stays legible


def data_uri(image: np.ndarray, max_side: int, encoding: Encoding) -> str:
    """An image (H, W, 3) uint8 as a `data:` URI, shrunk (Lanczos) until no side is longer than `max_side` pixels.

    That bounds its size: a PNG has little more than 4 * max_side^2 characters, a JPEG far fewer.
    """
    picture = Image.fromarray(image)
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if encoding == "jpeg":
        picture.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    else:
        picture.save(buffer, "PNG")
    return f"data:image/{encoding};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def messages(prompt: str, uri: str) -> list[dict[str, Any]]:
    """The conversation that asks for a caption: one turn of the user, the picture first."""
    picture = {"type": "image_url", "image_url": {"url": uri}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": prompt}]}]
