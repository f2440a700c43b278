"""What readers yield: one sample of a corpus as its files give it, or why there is none."""

from dataclasses import dataclass, field
from typing import Any

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
CAPTION_NAMES = ("caption", "text", "txt", "alt_text", "alt", "description")  # of columns and fields, in this order
MAX_IMAGE_BYTES = 2**28
MAX_TEXT_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Source:
    """One shard of a corpus: a tar, a Parquet file, or a group of files of a folder.

    `name` is its path within the corpus, or the folder's for a group of files; it is part of every sample id.
    """

    kind: str
    name: str
    url: str
    size: int
    tag: str
    column: str | None = None  # of images, where the user named it
    caption_column: str | None = None


@dataclass(kw_only=True)
class Sample:
    """One sample, not yet judged: its encoded image and texts as bytes or str, and where the image lies.

    A sample that cannot be used at all comes with a `state` and a `reason`.
    """

    key: str
    occurrence: int = 0  # of the same key within its shard
    image: bytes | None = field(default=None, repr=False)
    caption: bytes | str | None = None
    meta: bytes | str | dict[str, Any] | None = None
    source: str | None = None
    offset: int = 0
    length: int = 0
    state: str | None = None
    reason: str | None = None


def split_caption(fields: dict[str, Any], caption_name: str | None = None) -> tuple[Any, dict[str, Any]]:
    """The caption among the fields of a record, and the other fields."""
    names = [caption_name] if caption_name else CAPTION_NAMES
    lowered = {name.lower(): name for name in fields}
    found = next((lowered[name.lower()] for name in names if name.lower() in lowered), None)
    return fields.get(found) if found else None, {name: value for name, value in fields.items() if name != found}
