"""Read Parquet files whose rows carry an encoded image and its caption."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.data.plain import check_plain, is_plain
from infra.data.samples import MAX_IMAGE_BYTES, Sample, split_caption
from infra.data.stage import FAILED, REJECTED

IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
KEY_NAMES = ("__key__", "key", "id", "uid", "file_name", "filename")
META_NAMES = ("json", "meta", "metadata")


def read_parquet(name: str, url: str, column: str | None = None, caption_column: str | None = None) -> Iterator[Sample]:
    """Yield the rows of a Parquet file; one that breaks off in the middle yields a failed sample for the rest.

    Columns of types that are not plain data are passed over.
    """
    done = rows = 0
    try:
        with storage.open_read(url) as file, pq.ParquetFile(file) as parquet:
            rows = parquet.metadata.num_rows
            schema = parquet.schema_arrow
            column = column or image_column(url, schema)
            names = [field.name for field in schema if is_plain(field.type)]
            if column not in names:
                check_plain(schema, url)
            seen: Counter[str] = Counter()
            for batch in parquet.iter_batches(64, columns=names if len(names) < len(schema) else None):
                for record in batch.to_pylist():
                    yield _read_row(record, f"{url}#{column}", column, caption_column, done, seen)
                    done += 1
    except (FileNotFoundError, PermissionError, storage.UnavailableError):
        raise
    except Exception as error:  # pyarrow raises all sorts on broken files
        reason = f"damaged file: {rows - done} rows of {rows} are lost: {' '.join(str(error).split())[:200]}"
        yield Sample(key=f"{name}#damaged", state=FAILED, reason=reason)
        return
    if not rows:
        yield Sample(key=f"{name}#empty", state=REJECTED, reason="the file holds no rows")


def image_column(url: str, schema: pa.Schema) -> str:
    """The column that holds encoded images, by its name and type; ValueError if there is none."""
    lowered = {field.name.lower(): field for field in schema}
    for name in IMAGE_NAMES:
        if name in lowered and _is_encoded(lowered[name].type):
            return lowered[name].name
    raise ValueError(
        f"{url} has no column of encoded images: there are {', '.join(schema.names)}. Name it with image_column."
    )


def _is_encoded(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):  # Hugging Face writes {bytes, path}
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _read_row(
    record: dict[str, Any], source: str, column: str, caption_column: str | None, row: int, seen: Counter[str]
) -> Sample:
    image = record.pop(column)
    image = image.get("bytes") if isinstance(image, dict) else image
    key = next((str(record[name]) for name in KEY_NAMES if record.get(name) is not None), f"{row:09d}")
    caption, rest = split_caption(record, caption_column)
    meta = next((rest[name] for name in META_NAMES if rest.get(name) is not None), None)
    sample = Sample(key=key, occurrence=seen[key], caption=caption, source=source, offset=row)
    seen[key] += 1
    if not image:
        sample.state, sample.reason = REJECTED, "no image: the field is empty"
        return sample
    if len(image) > MAX_IMAGE_BYTES:
        sample.state, sample.reason = REJECTED, f"image file too large: {len(image)} bytes"
        return sample
    sample.image, sample.length = image, len(image)
    sample.meta = meta if isinstance(meta, str | bytes | dict) else _plain(rest)
    return sample


def _plain(fields: dict[str, Any]) -> dict[str, Any] | None:
    """The fields that JSON can hold; the others (times, bytes) as text, or left out."""
    kept = {name: value for name, value in fields.items() if value is not None and not isinstance(value, bytes)}
    return json.loads(json.dumps(kept, default=str)) if kept else None
