"""Read Parquet files whose rows carry an encoded image, or its path, and its caption."""

import base64
import binascii
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.data.fields import split_captions
from infra.data.pictures import is_image
from infra.data.plain import check_plain, is_plain
from infra.data.samples import MAX_IMAGE_BYTES, Sample, Source
from infra.data.stage import FAILED, REJECTED

IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", "images")
PATH_NAMES = ("image", "image_path", "img_path", "file_name", "filename", "filepath", "file_path", "path", "img", "jpg")
URL_NAMES = ("url", "image_url", "img_url", "url_link", "image_link")
KEY_NAMES = ("__key__", "key", "id", "uid", "file_name", "filename")
# What pictures begin with: JPEG, PNG, WebP, GIF, BMP, TIFF.
MARKS = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
META_NAMES = ("json", "meta", "metadata")
DOWNLOAD = "Fetch the pictures first, for example with img2dataset, and give what it writes"


def read_parquet(source: Source) -> Iterator[Sample]:
    """Yield the rows of a Parquet file; one that breaks off in the middle yields a failed sample for the rest.

    Columns of types that are not plain data are passed over.
    """
    name, url = source.name or "file", source.url
    done = rows = 0
    try:
        with storage.open_read(url) as file, pq.ParquetFile(file) as parquet:
            rows = parquet.metadata.num_rows
            schema = parquet.schema_arrow
            column = source.column or image_column(url, schema)
            names = [field.name for field in schema if is_plain(field.type)]
            if column not in names:
                check_plain(schema, url)
            seen: Counter[str] = Counter()
            for batch in parquet.iter_batches(64, columns=names if len(names) < len(schema) else None):
                for record in batch.to_pylist():
                    yield _read_row(record, source, column, done, seen)
                    done += 1
    except (FileNotFoundError, PermissionError, storage.UnavailableError):
        raise
    except Exception as error:  # pyarrow raises all sorts on broken files
        reason = f"damaged file: {rows - done} rows of {rows} are lost: {' '.join(str(error).split())[:200]}"
        yield Sample(key=f"{name}#damaged", state=FAILED, reason=reason)
        return
    if not rows:
        yield Sample(key=f"{name}#empty", state=REJECTED, reason="the file holds no rows")


def image_column(url: str, schema: pa.Schema, paths: bool = True) -> str:
    """The column of pictures, by name and type: encoded, or with `paths` as text; ValueError if there is none."""
    lowered = {field.name.lower(): field for field in schema}
    for name in IMAGE_NAMES:
        if name in lowered and _is_encoded(lowered[name].type):
            return lowered[name].name
    for name in PATH_NAMES if paths else ():
        if name in lowered and is_text(lowered[name].type):
            return lowered[name].name
    if found := next((lowered[name].name for name in URL_NAMES if name in lowered), None):
        raise ValueError(f"{url} holds addresses of pictures, in the column {found}, and no pictures. {DOWNLOAD}.")
    raise ValueError(
        f"{url} has no column of encoded images: there are {', '.join(schema.names)}. Name it with --image-column."
    )


def check_column(url: str, schema: pa.Schema, column: str) -> None:
    """ValueError where a column is not there, or can hold no pictures."""
    if column not in schema.names:
        raise ValueError(f"{url} has no column {column!r}: there are {', '.join(schema.names)}.")
    kind = schema.field(column).type
    if not _is_encoded(kind) and not is_text(kind):
        raise ValueError(
            f"The column {column!r} of {url} holds {kind}, and no pictures: those are bytes, "
            "{bytes, path}, lists of these, base64, or paths."
        )


def check_values(url: str, column: str, values: list[Any]) -> None:
    """ValueError where values of a column are addresses, which nobody fetches here."""
    found = map(picture_in, values)
    if any(isinstance(each, str) and each.startswith(("http://", "https://")) for each in found):
        raise ValueError(f"{url} holds addresses of pictures, in the column {column}, and no pictures. {DOWNLOAD}.")


def picture_in(value: Any) -> bytes | str | None:
    """What a value of an image column holds: the encoded picture, or its path or address; None where it is empty.

    A list gives its first picture; texts are base64 (or a data: address) where they can be, else paths.
    """
    if isinstance(value, list):
        return next((found for each in value if (found := picture_in(each))), None)
    if isinstance(value, dict):
        return value.get("bytes") or picture_in(value.get("path"))
    if isinstance(value, bytes):
        return value or None
    if not isinstance(value, str) or not value.strip():
        return None
    text = value.partition(";base64,")[2] if value.startswith("data:") else value.strip()
    if not is_image(text[-16:]):
        try:
            data = base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error):
            return value.strip()
        if len(text) > 64 or data.startswith(MARKS):  # a short text of letters alone may be a path, too
            return data
    return value.strip()


def _is_encoded(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):  # Hugging Face writes {bytes, path}
        return kind.get_field_index("bytes") >= 0
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_encoded(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether values of a type are texts, or lists of texts."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _read_row(record: dict[str, Any], source: Source, column: str, row: int, seen: Counter[str]) -> Sample:
    value = record.pop(column)
    parts = {name: picture_in(record.pop(name)) for name in source.parts if name in record}
    path = next((each["path"] for each in (value if isinstance(value, list) else [value]) if _has_path(each)), None)
    image = picture_in(value)
    named = path or (image if isinstance(image, str) else None)
    keys = (str(record[name]) for name in KEY_NAMES if record.get(name) is not None)
    key = next(keys, os.path.splitext(named)[0] if named else f"{row:09d}")
    captions, rest = split_captions(record, source.caption_column)
    meta = _meta(rest)
    if source.caption_field:
        captions = split_captions(meta or {}, source.caption_field)[0] or captions
    sample = Sample(key=key, occurrence=seen[key], captions=captions, meta=meta)
    sample.source, sample.offset = f"{source.url}#{column}", row
    seen[key] += 1
    if isinstance(image, str):
        _read_path(sample, source, image, alone=isinstance(value, str))
    elif image is None:
        sample.state, sample.reason = REJECTED, "no image: the field is empty"
    elif len(image) > MAX_IMAGE_BYTES:
        sample.state, sample.reason = REJECTED, f"image file too large: {len(image)} bytes"
    else:
        sample.image, sample.length = image, len(image)
    sample.parts = {name: part for name, part in parts.items() if isinstance(part, bytes)}
    if isinstance(value, list):
        sample.others = [f"{number}" for number, each in enumerate(value[1:], start=1) if picture_in(each)]
    return sample


def _has_path(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("path"), str) and bool(value["path"])


def _read_path(sample: Sample, source: Source, path: str, alone: bool) -> None:
    """The picture that a row names by its path, relative to the table or to the corpus; it lies within the corpus."""
    sample.state, before = REJECTED, "no image: " if alone else "no image: its bytes are null, and "
    if "://" in path and not path.startswith(source.root or "?"):
        sample.reason = f"{before}{path} is an address. {DOWNLOAD}"
        return
    folder, way = source.url.rpartition("/")[0], path.replace("\\", "/")
    root = source.root or folder
    for place in dict.fromkeys(posixpath.normpath(posixpath.join(base, way)) for base in (folder, root)):
        place = place.replace(":/", "://", 1) if "://" in folder else place
        inside = place.startswith(root.rstrip("/") + "/")
        if storage.is_local(place):
            inside = inside and os.path.realpath(place).startswith(os.path.realpath(root).rstrip("/") + "/")
        if inside and storage.exists(place):
            sample.image = storage.read_bytes(place, 0, MAX_IMAGE_BYTES + 1)
            sample.source, sample.offset, sample.length = place, 0, len(sample.image)
            sample.state = None
            if sample.length > MAX_IMAGE_BYTES:
                sample.state, sample.reason = REJECTED, f"image file too large: more than {MAX_IMAGE_BYTES} bytes"
            return
    sample.reason = f"{before}{path} is no file of the corpus"


def _meta(rest: dict[str, Any]) -> dict[str, Any] | None:
    """The other fields; those of a JSON column among them count as fields of the row."""
    for name in META_NAMES:
        value = rest.get(name)
        try:
            inner = json.loads(value) if isinstance(value, str | bytes) else value
        except (ValueError, RecursionError):
            continue
        if isinstance(inner, dict):
            rest = {key: each for key, each in rest.items() if key != name} | inner
            break
    return _plain(rest)


def _plain(fields: dict[str, Any]) -> dict[str, Any] | None:
    """The fields that JSON can hold; the others (times, bytes) as text, or left out."""
    kept = {name: value for name, value in fields.items() if value is not None and not isinstance(value, bytes)}
    return json.loads(json.dumps(kept, default=str)) if kept else None
