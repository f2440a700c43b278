"""Fetch encoded images by the places that an index noted: a range of a file, or a row of a Parquet file."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.data.ahead import ahead
from infra.data.clock import clocked
from infra.data.packed import PACKED, plain_copy
from infra.data.parquet import picture_in
from infra.data.plain import check_plain

SPAN_BYTES = 8 * 2**20  # neighbours are read together up to here: one request to S3 rather than hundreds
GAP_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Place:
    """Where an encoded image lies: bytes of `source`, or, for a source `file.parquet#column`, row number `offset`."""

    source: str
    offset: int
    length: int
    sha256: str | None  # None: the sample came without an image


def fetch_images(places: Iterable[Place]) -> Iterator[bytes | Exception]:
    """Yield each image's bytes, or what went wrong, in order; the places in one source have to ascend.

    A source that has changed since it was indexed is an error.
    """
    for (source, is_there), group in groupby(places, key=lambda place: (place.source, place.sha256 is not None)):
        if not is_there:
            yield from (ValueError("there is no image") for _ in group)
            continue
        if is_row(source):
            yield from _fetch_rows(source, list(group))
            continue
        if source.endswith(PACKED):
            yield from _fetch_unpacked(source, list(group))
            continue
        for span, images in ahead(lambda span: (span, _read(span)), _spans(group), threads=8, depth=8):
            for place, image in zip(span, images, strict=True):
                yield _checked(place, image)


def is_row(source: str) -> bool:
    """Whether a source is a column of a Parquet file, and not a range of bytes."""
    return "#" in source and source.rsplit("#", 1)[0].lower().endswith(".parquet")


def _checked(place: Place, image: bytes | Exception) -> bytes | Exception:
    if isinstance(image, bytes) and hashlib.sha256(image).hexdigest() != place.sha256:
        return ValueError(f"{place.source} has changed since it was ingested")
    return image


def _spans(places: Iterable[Place]) -> Iterator[list[Place]]:
    span: list[Place] = []
    for place in places:
        if span:
            gap = place.offset - (span[-1].offset + span[-1].length)
            if not 0 <= gap <= GAP_BYTES or place.offset + place.length - span[0].offset > SPAN_BYTES:
                yield span
                span = []
        span.append(place)
    if span:
        yield span


def _read(span: list[Place]) -> Sequence[bytes | Exception]:
    source, start = span[0].source, span[0].offset
    try:
        with clocked("read"):
            data = storage.read_bytes(source, start, span[-1].offset + span[-1].length - start)
    except storage.UnavailableError:
        raise  # no fault of these rows
    except Exception as error:  # whatever else a file system raises becomes the state of these rows
        return [error] * len(span)
    return [data[place.offset - start : place.offset - start + place.length] for place in span]


def _fetch_unpacked(source: str, places: list[Place]) -> Iterator[bytes | Exception]:
    """Pictures of a packed tar, which is unpacked once for all of them."""

    def images() -> Iterator[bytes]:
        with plain_copy(source) as (file, _):
            for place in places:
                file.seek(place.offset)
                yield file.read(place.length)

    return _each(places, images())


def _fetch_rows(source: str, places: list[Place]) -> Iterator[bytes | Exception]:
    url, column = source.rsplit("#", 1)
    rows = read_rows(url, column, [place.offset for place in places])
    return _each(places, (image or b"" for image in rows))


def _each(places: list[Place], images: Iterator[bytes]) -> Iterator[bytes | Exception]:
    """The images of places, and from where their file fails on its error in the place of each."""
    done = 0
    try:
        for image in images:
            yield _checked(places[done], image)
            done += 1
    except storage.UnavailableError:
        raise
    except Exception as error:
        for _ in places[done:]:
            yield error


def read_rows(url: str, column: str, rows: Sequence[int]) -> Iterator[bytes | None]:
    """Binary values of a Parquet column (plain, or `bytes` of a struct) at ascending rows; each page is read once."""
    with storage.open_read(url) as file, pq.ParquetFile(file) as parquet:
        check_plain(pa.schema([parquet.schema_arrow.field(column)]), url)
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        for group, wanted in groupby(rows, key=lambda row: int(np.searchsorted(starts, row, side="right")) - 1):
            at = int(starts[group])
            left = deque(wanted)
            for batch in parquet.iter_batches(32, row_groups=[group], columns=[column]):
                while left and left[0] < at + len(batch):
                    value = picture_in(batch.column(0)[left.popleft() - at].as_py())
                    yield value if isinstance(value, bytes) else None
                at += len(batch)
                if not left:
                    break
