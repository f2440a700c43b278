"""One shard of an export: the files of its samples as they came with the new captions beside them, or a table."""

import hashlib
import json
import math
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner.provenance import PROVENANCE
from infra import storage
from infra.data.originals import Original, fits_webdataset, read_originals
from infra.data.readers import read_entries_of
from infra.data.samples import Source
from infra.data.shards import ShardReader
from infra.data.stage import ACCEPTED, FAILED, describe_error
from workflows.ingest import make_sample_id

DATA, FILE = "data", "export"  # the folder of what is written, and where a shard's ledger says what that was
CAPTION, ALT = "caption_", "alt"
INDEX = ("key", "width", "height", "sha256", "split", "meta")
MIXED = ("keep", "keep_reason")
TEXTS = ("caption", "flag", "keep_reason")
ROWS = 64  # of a row group with images in it
# The types of columns that a shard without an accepted row may not know.
TYPES = {"tries": pa.int64(), "attempt": pa.int64(), "weight": pa.float32(), "logp": pa.float64()}
TYPES |= {"match": pa.float64(), "clip": pa.float64(), "clip_cut": pa.bool_(), "keep": pa.bool_()}


@dataclass(frozen=True, kw_only=True)
class ExportWork:
    """Writes `data/<shard>.tar` or `.parquet` at once, and returns the states of the shard's rows.

    The table's metadata say what was written. A row whose image is no longer what was ingested is failed, and left out.
    """

    inputs: tuple[str, ...]  # an ingest, captions, perhaps a mixture
    sources: dict[str, Source]
    out: str
    format: str
    only: str
    with_images: bool
    prefix: str

    def setup(self) -> None:
        """Nothing is loaded."""

    def __call__(self, name: str) -> pa.Table:
        """All rows, in the order of the corpus."""
        reader = ShardReader(self.inputs, name, every=True)
        chosen = self._chosen(reader)
        further: Counter[str] = Counter({"not_chosen": len(reader) - len(chosen)})
        ending, write = ("tar", self._write_tar) if self.format == "webdataset" else ("parquet", self._write_table)
        file: dict[str, Any] | None = None
        with tempfile.TemporaryDirectory(prefix="rescribe-") as folder:
            path = os.path.join(folder, f"{name}.{ending}")
            if rows := write(path, reader, chosen, further):
                file = {"rows": rows, **storage.digest(path)}
                storage.upload(path, storage.join(self.out, DATA, f"{name}.{ending}"))
        told = {"name": f"{name}.{ending}", "file": file, "further": further}
        columns = {"sample_id": reader.sample_ids, "state": reader.states, "reason": reader.reasons}
        table = pa.table({column: pa.array(values, pa.string()) for column, values in columns.items()})
        return table.replace_schema_metadata({FILE: json.dumps(told)})

    def _chosen(self, reader: ShardReader) -> np.ndarray:
        """The rows that are wanted, ascending."""
        if self.only == "all":
            return np.arange(len(reader))
        accepted = np.array([state == ACCEPTED for state in reader.states], dtype=bool)
        if self.only == "kept":
            accepted &= reader.columns(["keep"])["keep"] == True  # noqa: E712 -- None where it was not judged
        return np.flatnonzero(accepted)

    def _write_tar(self, path: str, reader: ShardReader, chosen: np.ndarray, further: Counter[str]) -> int:
        """The samples of the chosen rows in the order of the corpus; how many there are."""
        source, wanted = self.sources[reader.name], set(chosen.tolist())
        place = {sample_id: row for row, sample_id in enumerate(reader.sample_ids)}
        told = _told(reader)
        hashes, keys = reader.columns(["sha256"])["sha256"], reader.columns(["key"])["key"]
        entries = read_entries_of(self.inputs[0], reader.name) if source.kind == "folder" else None
        taken: set[str] = set()
        found: set[int] = set()
        with tarfile.open(path, "w", encoding="utf-8") as tar:
            for original in read_originals(source, entries):
                row = place.get(make_sample_id(source.name, original.key, original.occurrence))
                if row is None or row not in wanted or not _is_same(original, hashes[row]):
                    continue
                found.add(row)
                key = keys[row] if fits_webdataset(keys[row]) and keys[row] not in taken else reader.sample_ids[row]
                taken.add(key)
                for ending, data in (original.files | self._new(original, told[row])).items():
                    _add(tar, f"{key}.{ending}", data)
        for row in sorted(wanted - found):
            if hashes[row] is None:
                further["without_image"] += 1
            else:
                self._lose(reader, row, ValueError(f"{source.name} has changed since it was ingested"), further)
        return len(found)

    def _new(self, original: Original, told: dict[str, Any]) -> dict[str, bytes]:
        """The new files of a sample."""
        before = f"{self.prefix}." if self.prefix else ""
        texts = {style: each["caption"] for style, each in told["captions"].items() if style != ALT}
        new = {f"{before}{style}.txt": text.encode() for style, text in texts.items() if text}
        new[f"{before}captions.json"] = json.dumps(told, ensure_ascii=False).encode()
        if there := sorted(new.keys() & {ending.lower() for ending in original.files}):
            raise ValueError(
                f"The corpus has files .{there[0]} of its own; give --prefix with a word to tell ours apart"
            )
        return new

    def _write_table(self, path: str, reader: ShardReader, chosen: np.ndarray, further: Counter[str]) -> int:
        """The chosen rows as Parquet; how many there are."""
        writer, rows = None, 0
        try:
            for table in self._tables(reader, chosen, further):
                writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
                writer.write_table(table)
                rows += table.num_rows
        finally:
            if writer:
                writer.close()
        return rows

    def _tables(self, reader: ShardReader, chosen: np.ndarray, further: Counter[str]) -> Iterator[pa.Table]:
        """The chosen rows, with images a few at a time."""
        if not self.with_images:
            if len(chosen):
                yield _table(reader, chosen)
            return
        for start in range(0, len(chosen), ROWS):
            rows = chosen[start : start + ROWS]
            images = list(reader.originals(rows))
            for row, image in zip(rows, images, strict=True):
                if isinstance(image, Exception) and reader.states[row] == ACCEPTED:
                    self._lose(reader, row, image, further)
            good = [n for n, image in enumerate(images) if isinstance(image, bytes) or self.only == "all"]
            if good:
                files = [images[n] if isinstance(images[n], bytes) else None for n in good]
                values = [image and {"bytes": image, "path": None} for image in files]
                kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
                table = _table(reader, rows[good])
                table = table.append_column("image", pa.array(values, kind))
                # By which `datasets` knows that the column is one of images.
                features = {"info": {"features": {"image": {"_type": "Image"}}}}
                yield table.replace_schema_metadata({"huggingface": json.dumps(features)})

    def _lose(self, reader: ShardReader, row: int, error: Exception, further: Counter[str]) -> None:
        reader.states[row], reader.reasons[row] = FAILED, describe_error("export", error)
        further["lost"] += 1


def styles_of(columns: set[str]) -> list[str]:
    """The styles that columns hold captions of, the alt text apart."""
    return sorted(name.removeprefix(CAPTION) for name in columns if name.startswith(CAPTION) and name != CAPTION + ALT)


def _kind_of(column: str, styles: list[str]) -> tuple[str, str] | None:
    """`logp_short` is of the kind logp and the style short; None for a column of no style."""
    fitting = [style for style in styles if column.endswith(f"_{style}")]
    style = max(fitting, key=len, default="")
    return (column.removesuffix(f"_{style}"), style) if style else None


def _columns(reader: ShardReader) -> list[str]:
    """What is told of a row, in the order of a reader's interest."""
    styles = [ALT, *styles_of(reader.names)]
    kinds = ["caption", "weight", "flag", "logp", "match", "clip", "clip_cut", "tries", "attempt", PROVENANCE]
    wanted = [f"{kind}_{style}" for kind in kinds for style in styles]
    return [name for name in (*INDEX, *MIXED, *wanted) if name in reader.names]


def _table(reader: ShardReader, rows: np.ndarray) -> pa.Table:
    ids = {"sample_id": reader.sample_ids, "state": reader.states, "reason": reader.reasons}
    table = pa.table({name: pa.array([values[row] for row in rows], pa.string()) for name, values in ids.items()})
    stored = reader.table(_columns(reader), rows)
    styles = [ALT, *styles_of(reader.names)]
    for name in stored.column_names:
        kind = (_kind_of(name, styles) or (name, ""))[0]
        column = stored[name]
        table = table.append_column(
            name, column.cast(TYPES.get(kind, pa.string())) if pa.types.is_null(column.type) else column
        )
    return table


def _told(reader: ShardReader) -> list[dict[str, Any]]:
    """For each row what `captions.json` says: its id, its state, and of each caption all that is known.

    A text that is not there is "", for readers that take the type of a field from the first rows that they meet.
    """
    styles = [ALT, *styles_of(reader.names)]
    names = [name for name in _columns(reader) if name in MIXED or _kind_of(name, styles)]
    stored = reader.stored(names, np.arange(len(reader)))
    told = []
    for row, sample_id in enumerate(reader.sample_ids):
        said: dict[str, Any] = {
            "sample_id": sample_id,
            "state": reader.states[row],
            "reason": reader.reasons[row] or "",
        }
        captions: dict[str, dict[str, Any]] = {style: {} for style in styles}
        for name in names:
            kind, style = _kind_of(name, styles) or (name, "")
            value = _plain(stored[name][row])
            if kind == PROVENANCE:
                value = json.loads(value) if value else None
            elif kind in TEXTS:
                value = value or ""
            (captions[style] if style else said)[kind] = value
        told.append(said | {"captions": captions})
    return told


def _plain(value: Any) -> Any:
    """JSON knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_same(original: Original, digest: str | None) -> bool:
    return original.image is not None and hashlib.sha256(original.files[original.image]).hexdigest() == digest


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Without times and owners: the same rows make the same file."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, BytesIO(data))
