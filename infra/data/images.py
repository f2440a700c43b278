"""Decode whatever encodes an image to (H, W, 3) uint8, and refuse with a reason what does not."""

import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from infra.data.fitting import Fit, Size, frame
from infra.data.formats import FORMATS, refusal_of, to_srgb

MAX_PIXELS = 2**26  # 8192 x 8192; a PNG of 100 kB can announce a thousand times that

MAX_SCANS = 100  # of a progressive JPEG: ten are usual, and 30 bytes make one that takes as long as the whole image
LARGE_PIXELS = 2**24  # 4096 x 4096
STRIP_PIXELS = 2**20

WHITE = (255, 255, 255)

# Threads decode side by side, but pictures that take half a gigabyte take turns; and in threads of their own, since
# the C library keeps what a thread has freed, for each thread that ever needed so much.
_large = Lock()


def decode(
    data: bytes, size: Size | None = None, background: tuple[int, int, int] = WHITE, fit: Fit = "stretch"
) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 RGB; ValueError with a short reason if it is not whole.

    EXIF rotation is applied, transparency is composited over `background`, the first frame stands for an animation,
    16-bit values keep their upper 8 bits (rounded), floats count from 0 to 1 if none is above 1, else to 255, colours
    that an ICC profile defines become sRGB. With `size` (height, width) the image comes to it by a Lanczos filter, as
    `fit` says (`infra/data/fitting.py`); borders have the colour of the background, too.
    """
    image = _identify(data)
    if image.width * image.height <= LARGE_PIXELS:
        return _decode(image, data, size, background, fit)
    with _large, ThreadPoolExecutor(1) as alone:
        return alone.submit(_decode, image, data, size, background, fit).result()


def pixels_of(picture: Any) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a Pillow image or an array, as `decode` has it of a file; ValueError if it is neither.

    An array is (H, W), (H, W, 1), (H, W, 3) or (H, W, 4). Its values count as those of files do: bytes, 16 bits, or
    floats from 0 to 1 if none is above 1, else to 255; other whole numbers from 0 to 255.
    """
    image = picture if isinstance(picture, Image.Image) else _image_of(picture)
    try:
        return np.array(_to_rgb(to_srgb(_upright(image)), WHITE))
    except Exception as error:  # a file is read only here
        raise ValueError(f"unusable image: {_message(error)}") from None


def _image_of(picture: Any) -> Image.Image:
    array = np.asarray(picture)
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)) or not array.size:
        found = f"an array of the shape {array.shape}" if array.ndim else f"of the type {type(picture).__name__}"
        raise ValueError(f"A picture is a Pillow image or an array (H, W, 3), but this is {found}.")
    if array.dtype.kind == "f":
        values = np.nan_to_num(array, nan=0.0, posinf=np.inf, neginf=0.0)
        values = values * (255 if values.max() <= 1 else 1)
    elif array.dtype == np.uint16:
        values = array / 257
    elif array.dtype.kind in "ui" and array.min() >= 0 and array.max() <= 255:
        values = array
    elif array.dtype.kind == "b":
        values = array * 255
    else:
        raise ValueError(f"The values of a picture are numbers from 0 to 255, but these are of the type {array.dtype}.")
    whole = np.round(np.clip(values, 0, 255)).astype(np.uint8)
    return Image.fromarray(whole[..., 0] if whole.shape[2:] == (1,) else whole)


def measure(data: bytes) -> tuple[int, int]:
    """(height, width) as `decode` would return it, from the header alone; ValueError as `decode`."""
    return _upright_size(_identify(data))


def ending_of(data: bytes) -> str:
    """What the name of an image file ends in, by its content: jpg, png, webp and so on; img if it is none."""
    try:
        kind = (_identify(data).format or "img").lower()
    except ValueError:
        return "img"
    return "jpg" if kind == "jpeg" else kind


def encode_png(array: np.ndarray, texts: Mapping[str, str] | None = None) -> bytes:
    """Encode (H, W, 3) uint8 pixels without loss; `texts` go along by keyword: ASCII as tEXt, others as iTXt."""
    assert array.dtype == np.uint8, array.dtype
    buffer, chunks = io.BytesIO(), PngInfo()
    for keyword, text in (texts or {}).items():
        (chunks.add_text if text.isascii() else chunks.add_itxt)(keyword, text.replace("\0", ""))
    Image.fromarray(array).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def _identify(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("empty image")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(refusal_of(data)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError("too many pixels") from None
    except Exception as error:  # Pillow's parsers raise all sorts on hostile bytes
        raise _refusal(data, error) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"too many pixels: {width}x{height}")
    if data[:2] == b"\xff\xd8" and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise ValueError(f"too many scans: {scans}")
    return image


def _decode(
    image: Image.Image, data: bytes, size: Size | None, background: tuple[int, int, int], fit: Fit
) -> np.ndarray:
    width, height = image.size
    _load(image, data, size, fit)
    try:
        source = (width, height) if _lies(image) else (height, width)  # of a JPEG that was drafted, too
        image = _to_rgb(to_srgb(_upright(image)), background)
        return np.array(image if size is None else frame(source, size, fit).picture(image, background))
    except Exception as error:
        raise ValueError(f"unusable image: {_message(error)}") from None


def _load(image: Image.Image, data: bytes, size: Size | None, fit: Fit) -> None:
    try:
        if size is not None and image.format == "JPEG" and image.mode in ("RGB", "L"):
            # Let the JPEG decoder drop resolution that the resize would: to no less than twice the longer side, so
            # that the Lanczos filter still has something to do and a rotation by EXIF does not matter.
            side = 2 * ceil(max(frame(_upright_size(image), size, fit).whole))
            image.draft(None, (side, side))
        image.load()
    except Exception as error:
        raise _refusal(data, error) from None


def _refusal(data: bytes, error: Exception) -> ValueError:
    truncated = isinstance(error, EOFError) or any(word in str(error).lower() for word in ("truncated", "incomplete"))
    # WebP's decoder does not say why, but the file's header says how long it ought to be.
    truncated |= data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    return ValueError("truncated image" if truncated else f"broken image: {_message(error)}")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a broken EXIF block does not spoil the pixels
        return 1


def _lies(image: Image.Image) -> bool:
    """Whether its sides change places when it is put upright."""
    return 5 <= _orientation(image) <= 8


def _upright_size(image: Image.Image) -> Size:
    width, height = image.size
    return (width, height) if _lies(image) else (height, width)


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if 2 <= _orientation(image) <= 8 else image


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The image as RGB, made a few rows at a time: what lies between takes several times its memory."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    unit = image.mode == "F" and not np.fmax.reduce(np.asarray(image), axis=None) > 1
    whole = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        whole.paste(_strip_to_rgb(strip, background, unit), (0, top))
    return whole


def _strip_to_rgb(image: Image.Image, background: tuple[int, int, int], unit: bool) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_array(np.asarray(image).astype(np.float32) / 257)
    if image.mode == "I":  # 32-bit in memory, but the files that come here hold 16 bits
        return _from_array(np.asarray(image).clip(0, 65535) / 257)
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=np.inf, neginf=0.0)
        return _from_array(values * (255 if unit else 1))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer).convert("RGB")
    return image.convert("RGB")


def _from_array(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(values.clip(0, 255)).astype(np.uint8)).convert("RGB")


def _message(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
