"""What readers yield: one sample of a corpus as its files give it, or why there is none."""

from dataclasses import dataclass, field, fields
from typing import Any

MAX_IMAGE_BYTES = 2**28
MAX_TEXT_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a user names what is not found by itself; all that a corpus's files say is read by it."""

    image_column: str | None = None  # of Parquet
    caption_column: str | None = None  # of Parquet and tables, or a path into it: meta.captions
    file_column: str | None = None  # of tables: what names the pictures
    caption_field: str | None = None  # of JSON beside a picture, or a path into it
    image_part: str | None = None  # the ending of the picture, where a sample has several: rgb.png
    encoding: str = ""  # of texts that are not UTF-8
    follow_links: bool = False  # symbolic links that leave the corpus
    parts: tuple[str, ...] = ()  # endings (seg.png) or columns of what is read beside the picture


NAMED = tuple(each.name for each in fields(Reading) if each.name != "parts")  # what users name as options


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
    caption_field: str | None = None
    image_part: str | None = None
    encoding: str = ""
    parts: tuple[str, ...] = ()
    root: str = ""  # the corpus's folder, which paths within a source may not leave


@dataclass(kw_only=True)
class Sample:
    """One sample, not yet judged: its encoded image and texts as bytes or str, and where the image lies.

    A sample whose picture cannot be used at all comes with a `state` and a `reason`; `fault` is what its reader has to
    say against its texts.
    """

    key: str
    occurrence: int = 0  # of the same key within its shard
    image: bytes | None = field(default=None, repr=False)
    captions: list[Any] = field(default_factory=list)  # bytes or str, in order; what is neither is no caption
    meta: bytes | str | dict[str, Any] | None = None
    source: str | None = None
    offset: int = 0
    length: int = 0
    state: str | None = None
    reason: str | None = None
    fault: str | None = None
    others: list[str] = field(default_factory=list)  # its further pictures, by their endings
    parts: dict[str, bytes] = field(default_factory=dict, repr=False)  # what was asked for beside it, by ending

    @property
    def caption(self) -> Any:
        """The first caption."""
        return self.captions[0] if self.captions else None
