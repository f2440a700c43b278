"""Which file of a sample is its picture, and which are parts of it: masks, depths, edges and the like."""

import re
from collections.abc import Iterable

IMAGE_ENDINGS = (
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "heic", "heif", "jxl", "bmp", "tif", "tiff", "gif",
)  # fmt: skip
# What the middle of `dog.seg.png` says of a picture that is never the sample's own.
PARTS = frozenset(
    [
        *("mask", "masks", "masklabel", "seg", "segm", "segmentation", "panoptic", "semantic"),
        *("matte", "trimap", "alpha", "depth", "disparity", "normal", "normals"),
        *("pose", "openpose", "keypoints", "control", "conditioning", "hint", "edge", "edges"),
        *("canny", "hed", "lineart", "scribble", "sketch", "thumb", "thumbnail", "preview"),
    ]
)  # fmt: skip
_OWN = frozenset(["image", "img", "picture", "pic", "photo", "rgb", "main", "input", "original", "full"])
_WORD = re.compile(r"[a-z]+")


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image's does."""
    return name.rsplit(".", 1)[-1].lower() in IMAGE_ENDINGS if "." in name else False


def is_part(ending: str) -> bool:
    """Whether `seg.png`, of `dog.seg.png`, is a part of a picture, and never the picture."""
    return not PARTS.isdisjoint(_WORD.findall(ending.rsplit(".", 1)[0].lower())) if "." in ending else False


def main_picture(endings: Iterable[str], named: str | None = None) -> str | None:
    """The ending of the sample's picture: `named`, else a plain one in the order of IMAGE_ENDINGS, else by its name.

    Among `1.jpg`, `image.png`, `seg.png` that is `image.png`: one that calls itself the picture, then the first that is
    no part. None where there is no picture.
    """
    images = [ending for ending in endings if is_image(f".{ending}")]
    if named:
        return next((ending for ending in images if ending.lower() == named.lower().lstrip(".")), None)
    plain = {ending.lower(): ending for ending in reversed(images)}
    if found := next((plain[ending] for ending in IMAGE_ENDINGS if ending in plain), None):
        return found
    others = [ending for ending in images if "." in ending and not is_part(ending)]
    own = [ending for ending in others if not _OWN.isdisjoint(_WORD.findall(ending.rsplit(".", 1)[0].lower()))]
    return (own or others or [None])[0]


def base_of(stem: str, stems: set[str]) -> str | None:
    """Of which picture beside it `dog.seg` or `dog_mask` is a part: `dog`, if there is one."""
    folder, _, name = stem.rpartition("/")
    for place in [match.start() for match in re.finditer(r"[._-]", name)]:
        base = f"{folder}/{name[:place]}" if folder else name[:place]
        if base in stems and is_part(f"{name[place + 1 :]}.x"):
            return base
    return None
