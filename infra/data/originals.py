"""The samples of a corpus as the files that they came in, to be written out again."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from infra import strict
from infra.data.folders import Entry
from infra.data.images import ending_of
from infra.data.pictures import main_picture
from infra.data.readers import read_source
from infra.data.samples import Sample, Source
from infra.data.tars import read_files

# What a WebDataset can hold as a key: its last part has no dot, for there the ending begins.
_KEY = re.compile(r"(?:[^/]+/)*[^/.]+")
# A key and an ending become a file's name where a tar is unpacked, also on systems where a backslash divides folders,
# and "C:" leads to another disk; names of more than 255 bytes cannot be unpacked.
_FOREIGN = re.compile(r"\\|^[A-Za-z]:")
LONGEST_KEY, LONGEST_ENDING = 150, 60  # bytes of a part


@dataclass(frozen=True, kw_only=True)
class Original:
    """The files of one sample, by their endings as they are written; `image` is the ending of its picture, if any."""

    key: str
    occurrence: int
    files: dict[str, bytes] = field(repr=False)
    image: str | None


def read_originals(source: Source, entries: list[Entry] | None = None) -> Iterator[Original]:
    """Yield the samples of one source in its order; OSError where it cannot be read.

    Those of tars and folders have the very bytes of their files, without those whose endings cannot be part of a name.
    Those of Parquet rows and of tables have files made of their fields: the picture as it is, its text as `txt` and the
    other fields as `json`.
    """
    if source.kind == "tar":
        for key, occurrence, every in read_files(source.url):
            files = {ending: data for ending, data in every.items() if _is_plain(ending, LONGEST_ENDING)}
            endings = {ending.lower(): ending for ending in files}
            picture = main_picture(endings, source.image_part)
            image = endings[picture] if picture else None
            yield Original(key=key, occurrence=occurrence, files=files, image=image)
        return
    for sample in read_source(source, entries):
        if sample.image is not None:
            yield _of_fields(sample, source.kind)


def fits_webdataset(key: str) -> bool:
    """Whether loaders of WebDataset would read a key back as it is, and who unpacks it gets a file below his folder."""
    return bool(_KEY.fullmatch(key)) and ".." not in key.split("/") and _is_plain(key, LONGEST_KEY)


def _is_plain(name: str, longest: int) -> bool:
    return (
        name.isprintable()  # so it is without lone surrogates, too
        and not _FOREIGN.search(name)
        and len(name.encode()) <= 8 * longest
        and all(len(part.encode()) <= longest for part in name.split("/"))
    )


def _of_fields(sample: Sample, kind: str) -> Original:
    assert sample.image is not None
    named = sample.source.rsplit(".", 1)[-1] if kind == "folder" and sample.source else ""
    image = named or ending_of(sample.image)
    files = {image: sample.image}
    if isinstance(sample.caption, bytes | str):
        files["txt"] = _bytes(sample.caption)
    if sample.meta is not None:
        told = sample.meta if isinstance(sample.meta, bytes | str) else strict.dumps(sample.meta)
        files["json"] = _bytes(strict.restated(told) if isinstance(told, str) else told)
    return Original(key=sample.key, occurrence=sample.occurrence, files=files, image=image)


def _bytes(text: bytes | str) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "replace")
