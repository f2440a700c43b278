"""Decode whatever encodes an image to (H, W, 3) uint8, and refuse with a reason what does not."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 2**26  # 8192 x 8192; a PNG of 100 kB can announce a thousand times that

WHITE = (255, 255, 255)


def decode(data: bytes, size: tuple[int, int] | None = None, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 RGB; ValueError with a short reason if it is not whole.

    EXIF rotation is applied, transparency is composited over `background`, the first frame stands for an animation,
    16-bit values keep their upper 8 bits (rounded), floats count from 0 to 1 if none is above 1, else to 255. With
    `size` (height, width) the image is stretched to it by a Lanczos filter, whatever its aspect ratio was.
    """
    image = _load(data, size)
    try:
        image = _to_rgb(_upright(image), background)
        if size is not None and image.size != (size[1], size[0]):
            image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
        return np.array(image)
    except Exception as error:
        raise ValueError(f"unusable image: {_message(error)}") from None


def measure(data: bytes) -> tuple[int, int]:
    """(height, width) as `decode` would return it, from the header alone; ValueError as `decode`."""
    image = _identify(data)
    width, height = image.size
    return (width, height) if _orientation(image) >= 5 else (height, width)


def encode_png(array: np.ndarray) -> bytes:
    """Encode (H, W, 3) uint8 pixels without loss."""
    assert array.dtype == np.uint8, array.dtype
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def _identify(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("empty image")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError("too many pixels") from None
    except Exception as error:  # Pillow's parsers raise all sorts on hostile bytes
        raise _refusal(data, error) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"too many pixels: {width}x{height}")
    return image


def _load(data: bytes, size: tuple[int, int] | None) -> Image.Image:
    image = _identify(data)
    try:
        if size is not None and image.format == "JPEG" and image.mode in ("RGB", "L"):
            # Let the JPEG decoder drop resolution that the resize would: to no less than twice the longer side, so
            # that the Lanczos filter still has something to do and a rotation by EXIF does not matter.
            image.draft(None, (2 * max(size), 2 * max(size)))
        image.load()
    except Exception as error:
        raise _refusal(data, error) from None
    return image


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


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if 2 <= _orientation(image) <= 8 else image


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_array(np.asarray(image).astype(np.float32) / 257)
    if image.mode == "I":  # 32-bit in memory, but the files that come here hold 16 bits
        return _from_array(np.asarray(image).clip(0, 65535) / 257)
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=np.inf, neginf=0.0)
        return _from_array(values * (255 if values.max() <= 1 else 1))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer).convert("RGB")
    return image.convert("RGB")


def _from_array(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(values.clip(0, 255)).astype(np.uint8)).convert("RGB")


def _message(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
