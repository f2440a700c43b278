"""Which image formats are read, what else a file is by its first bytes, and colours as sRGB means them."""

import io
from contextlib import suppress
from functools import lru_cache
from importlib import import_module

from PIL import Image, ImageCms

# Formats that Pillow may be without: what it calls them, and how to have them, which are extras of this project.
_OPTIONAL = {
    "HEIC": ("HEIF", "; pip install 'rescribe[heic]'"),
    "JPEG XL": ("JXL", "; pip install 'rescribe[jxl]'"),
    "AVIF": ("AVIF", ", which this Pillow was built without"),
}


def _readable() -> tuple[str, ...]:
    Image.init()
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    with suppress(ImportError):
        import_module("pillow_jxl")
    wanted = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JXL")
    return tuple(name for name in wanted if name in Image.OPEN)


FORMATS = _readable()


def refusal_of(data: bytes) -> str:
    """Why bytes that no reader knows are no picture, by what they begin with."""
    kind = kind_of(data)
    if kind in _OPTIONAL:
        name, advice = _OPTIONAL[kind]
        return f"broken image: {kind}" if name in FORMATS else f"unread format: {kind}{advice}"
    return f"not an image: {kind}" if kind else "not an image"


def kind_of(data: bytes) -> str | None:
    """What a file is that is no image of a format read here, by its first bytes; None where that is not known."""
    if data[4:8] == b"ftyp":
        brands = data[8:40]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        return "HEIC" if b"hei" in brands or b"mif1" in brands else "a film"
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL"
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in head:
        return "SVG"
    if head.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if data.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, and `git lfs pull` fetches the file"
    names = {b"%PDF": "PDF", b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip file", b"{": "JSON", b"\x1aE\xdf\xa3": "a film"}
    return next((name for mark, name in names.items() if data.startswith(mark)), None)


def to_srgb(image: Image.Image) -> Image.Image:
    """The picture in sRGB, where a profile says that its values mean other colours; one that misfits is ignored."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return image
    transform = _transform(profile, image.mode)
    if transform is None:
        return image
    with suppress(ImageCms.PyCMSError, ValueError, OSError):
        converted = ImageCms.applyTransform(image, transform)
        return converted if converted is not None else image
    return image


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None for sRGB's own profile, of which there are many, and for one that is broken or of other channels."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in (ImageCms.getProfileDescription(opened) or "").lower():
            return None
        target = "RGBA" if mode == "RGBA" else "RGB"
        return ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, target)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
