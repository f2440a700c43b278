"""One shard of an export: the files of its samples as they came with the new captions beside them, or a table."""

import hashlib
import json
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from operator import ne
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner.provenance import PROVENANCE
from infra import storage, strict
from infra.data.images import ending_of
from infra.data.originals import Original, fits_webdataset, read_originals
from infra.data.readers import read_entries_of
from infra.data.samples import Source
from infra.data.shards import ShardReader
from infra.data.stage import ACCEPTED, FAILED, describe_error
from workflows.ingest import make_sample_id

DATA, NAMES = "data", "names"  # the folders of what is written, and of whose it was
FILE = "export"  # where a shard's ledger says what was written
CAPTION, ALT = "caption_", "alt"
INDEX = ("alt_fault", "width", "height", "sha256", "split", "split_fault", "meta", "meta_fault")
ALTS = "captions_alt"  # all texts that a picture came with, where a corpus has several of one
SCORES = {"weight": "weights_alt", "logp": "logps_alt", "match": "matches_alt", "clip": "clips_alt"}  # of each of these
MIXED = ("keep", "keep_reason")
TEXTS = ("caption", "flag", "keep_reason")
SOURCE = ("source_name", "key")  # the file within the corpus that a sample came in, and its key there
ROWS = 64  # of a row group with images in it
# The types of columns that a shard without an accepted row may not know.
TYPES = {"tries": pa.int64(), "attempt": pa.int64(), "weight": pa.float32(), "logp": pa.float64()}
TYPES |= {"match": pa.float64(), "clip": pa.float64(), "clip_cut": pa.bool_(), "keep": pa.bool_()}


@dataclass(frozen=True, kw_only=True)
class ExportWork:
    """Writes `data/<shard>.tar` or `.parquet` at once, and returns the states of the shard's rows.

    Beside a tar `names/<shard>.parquet` says of each key in it whose it is; in a table of rows columns do. The metadata
    of what is returned say what was written. A row whose image is no longer what was ingested is failed, and left out.
    """

    inputs: tuple[str, ...]  # an ingest, captions, perhaps a mixture
    sources: dict[str, Source]
    out: str
    format: str
    only: str
    with_images: bool
    prefix: str
    several: bool = False  # whether the index has pictures of several alt texts

    def setup(self) -> None:
        """Nothing is loaded."""

    def __call__(self, name: str) -> pa.Table:
        """All rows, in the order of the corpus."""
        reader = ShardReader(self.inputs, name, every=True)
        chosen = self._chosen(reader)
        further: Counter[str] = Counter({"not_chosen": len(reader) - len(chosen)})
        ending, write = ("tar", self._write_tar) if self.format == "webdataset" else ("parquet", self._write_table)
        files: dict[str, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory(prefix="rescribe-") as folder:
            path = os.path.join(folder, f"{name}.{ending}")
            names = self._names(reader)
            if keys := write(path, reader, chosen, names, further):
                whose = names.take(list(keys)).append_column("exported_key", pa.array(list(keys.values())))
                first, last = whose["source_name"][0].as_py(), whose["source_name"][-1].as_py()
                if ending == "tar":
                    pq.write_table(whose, table := os.path.join(folder, f"{name}.parquet"))
                    files[f"{NAMES}/{name}.parquet"] = {"rows": len(keys)} | self._put(table, NAMES)
                    further["renamed"] = sum(map(ne, keys.values(), whose["key"].to_pylist()))
                file = {"rows": len(keys), "source": first if first == last else f"{first} to {last}"}
                files[f"{DATA}/{name}.{ending}"] = file | self._put(path, DATA)
        told = {"files": files, "further": further}
        columns = {"sample_id": reader.sample_ids, "state": reader.states, "reason": reader.reasons}
        table = pa.table({column: pa.array(values, pa.string()) for column, values in columns.items()})
        return table.replace_schema_metadata({FILE: strict.dumps(told)})

    def _put(self, path: str, folder: str) -> dict[str, Any]:
        """Size and hash of a file that now lies in a folder of the export."""
        storage.upload(path, storage.join(self.out, folder, storage.name(path)))
        return storage.digest(path)

    def _names(self, reader: ShardReader) -> pa.Table:
        """Whose each row is: its sample id, and by which name and key the corpus has it."""
        source, columns = self.sources[reader.name], reader.columns(["key", "source"])
        names = [source.name] * len(reader)
        if source.kind == "folder":
            within, paths = source.url.rstrip("/") + "/", columns["source"]
            # A row without a picture has no file, and a link may lead out of the corpus: keys are paths, too.
            names = [
                path.removeprefix(within) if path and path.startswith(within) else key
                for path, key in zip(paths, columns["key"], strict=True)
            ]
        values = {"sample_id": reader.sample_ids, "source_name": names, "key": columns["key"].tolist()}
        return pa.table({name: pa.array(each, pa.string()) for name, each in values.items()})

    def _chosen(self, reader: ShardReader) -> np.ndarray:
        """The rows that are wanted, ascending."""
        if self.only == "all":
            return np.arange(len(reader))
        accepted = np.array([state == ACCEPTED for state in reader.states], dtype=bool)
        if self.only == "kept":
            accepted &= reader.columns(["keep"])["keep"] == True  # noqa: E712 -- None where it was not judged
        return np.flatnonzero(accepted)

    def _write_tar(
        self, path: str, reader: ShardReader, chosen: np.ndarray, names: pa.Table, further: Counter[str]
    ) -> dict[int, str]:
        """The samples of the chosen rows in the order of the corpus; the key of each row."""
        source, wanted = self.sources[reader.name], set(chosen.tolist())
        place = {sample_id: row for row, sample_id in enumerate(reader.sample_ids)}
        told, whose = _told(reader, self.several), names.select(SOURCE).to_pylist()
        hashes = reader.columns(["sha256"])["sha256"]
        entries = read_entries_of(self.inputs[0], reader.name) if source.kind == "folder" else None
        keys: dict[int, str] = {}
        taken: set[str] = set()
        with tarfile.open(path, "w", encoding="utf-8") as tar:
            for original in read_originals(source, entries):
                row = place.get(make_sample_id(source.name, original.key, original.occurrence))
                if row is None or row not in wanted or not _is_same(original, hashes[row]):
                    continue
                key = whose[row]["key"]
                key = key if fits_webdataset(key) and key not in taken else reader.sample_ids[row]
                keys[row] = key
                taken.add(key)
                for ending, data in (original.files | self._new(original, told[row] | whose[row])).items():
                    _add(tar, f"{key}.{ending}", data)
        for row in sorted(wanted - keys.keys()):
            if hashes[row] is None:
                further["without_image"] += 1
            else:
                self._lose(reader, row, ValueError(f"{source.name} has changed since it was ingested"), further)
        return keys

    def _new(self, original: Original, told: dict[str, Any]) -> dict[str, bytes]:
        """The new files of a sample."""
        before = f"{self.prefix}." if self.prefix else ""
        texts = {style: each["caption"] for style, each in told["captions"].items() if style != ALT}
        new = {f"{before}{style}.txt": text.encode() for style, text in texts.items() if text}
        new[f"{before}captions.json"] = strict.dumps(told, ensure_ascii=False).encode()
        if there := sorted(new.keys() & {ending.lower() for ending in original.files}):
            raise ValueError(
                f"The corpus has files .{there[0]} of its own; give --prefix with a word to tell ours apart"
            )
        return new

    def _write_table(
        self, path: str, reader: ShardReader, chosen: np.ndarray, names: pa.Table, further: Counter[str]
    ) -> dict[int, str]:
        """The chosen rows as Parquet; the key of each row."""
        writer, keys = None, names["key"].to_pylist()
        written: dict[int, str] = {}
        try:
            for rows, table in self._tables(reader, chosen, names, further):
                writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
                writer.write_table(table)
                written |= {row: keys[row] for row in rows.tolist()}
        finally:
            if writer:
                writer.close()
        return written

    def _tables(
        self, reader: ShardReader, chosen: np.ndarray, names: pa.Table, further: Counter[str]
    ) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """The chosen rows, with images a few at a time."""
        if not self.with_images:
            if len(chosen):
                yield chosen, _table(reader, chosen, names, self.several)
            return
        for start in range(0, len(chosen), ROWS):
            rows = chosen[start : start + ROWS]
            images = list(reader.originals(rows))
            for row, image in zip(rows, images, strict=True):
                if isinstance(image, Exception) and reader.states[row] == ACCEPTED:
                    self._lose(reader, row, image, further)
            good = [n for n, image in enumerate(images) if isinstance(image, bytes) or self.only == "all"]
            if good:
                keys = names["key"].take(rows[good]).to_pylist()
                values = [_image(images[n], key) for n, key in zip(good, keys, strict=True)]
                kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
                table = _table(reader, rows[good], names, self.several)
                table = table.append_column("image", pa.array(values, kind))
                # By which `datasets` knows that the column is one of images.
                features = {"info": {"features": {"image": {"_type": "Image"}}}}
                yield rows[good], table.replace_schema_metadata({"huggingface": strict.dumps(features)})

    def _lose(self, reader: ShardReader, row: int, error: Exception, further: Counter[str]) -> None:
        reader.states[row], reader.reasons[row] = FAILED, describe_error("export", error)
        further["lost"] += 1


def _image(image: bytes | Exception, key: str) -> dict[str, Any] | None:
    """As `datasets` stores it, with a name."""
    return {"bytes": image, "path": f"{key}.{ending_of(image)}"} if isinstance(image, bytes) else None


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


def _table(reader: ShardReader, rows: np.ndarray, names: pa.Table, several: bool) -> pa.Table:
    ids = {"sample_id": reader.sample_ids, "state": reader.states, "reason": reader.reasons}
    table = pa.table({name: pa.array([values[row] for row in rows], pa.string()) for name, values in ids.items()})
    for name in SOURCE:
        table = table.append_column(name, names[name].take(rows))
    if several:
        types = {ALTS: pa.string()} | {name: TYPES[kind] for kind, name in SCORES.items()}
        for name, values in _alts(reader, rows).items():
            table = table.append_column(name, pa.array(values, pa.list_(types[name])))
    stored = reader.table(_columns(reader), rows)
    styles = [ALT, *styles_of(reader.names)]
    for name in stored.column_names:
        kind = (_kind_of(name, styles) or (name, ""))[0]
        column = stored[name]
        if name == "meta":  # others may have written NaN
            column = pa.array([text and strict.restated(text) for text in column.to_pylist()], pa.string())
        table = table.append_column(
            name, column.cast(TYPES.get(kind, pa.string())) if pa.types.is_null(column.type) else column
        )
    return table


def scores_of(columns: set[str]) -> dict[str, str]:
    """Where scores of all texts that a picture came with are written, by the columns that have those of the first."""
    return {f"{kind}_{ALT}": name for kind, name in SCORES.items() if f"{kind}_{ALT}" in columns}


def _alts(reader: ShardReader, rows: np.ndarray) -> dict[str, list[list[Any]]]:
    """All texts that each row's picture came with, in order, and as many of each score; null where there is none."""

    def listed(first: str, every: str) -> list[list[Any]]:
        table = reader.table([first, every + "?"], rows)
        pairs = zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
        return [[one] if each is None else each for one, each in pairs]

    texts = [[] if each in ([None], [""]) else each for each in listed(CAPTION + ALT, ALTS)]
    told: dict[str, list[list[Any]]] = {ALTS: texts}
    for first, every in scores_of(reader.names).items():
        pairs = zip(texts, listed(first, every), strict=True)
        told[every] = [(values + [None] * len(own))[: len(own)] for own, values in pairs]
    return told


def _told(reader: ShardReader, several: bool) -> list[dict[str, Any]]:
    """For each row what `captions.json` says: its id, its state, and of each caption all that is known.

    A text that is not there is "", for readers that take the type of a field from the first rows that they meet.
    """
    styles = [ALT, *styles_of(reader.names)]
    names = [name for name in _columns(reader) if name in MIXED or _kind_of(name, styles)]
    stored = reader.stored(names, np.arange(len(reader)))
    alts, told = _alts(reader, np.arange(len(reader))) if several else {}, []
    for row, sample_id in enumerate(reader.sample_ids):
        said: dict[str, Any] = {
            "sample_id": sample_id,
            "state": reader.states[row],
            "reason": reader.reasons[row] or "",
        }
        captions: dict[str, dict[str, Any]] = {style: {} for style in styles}
        for name in names:
            kind, style = _kind_of(name, styles) or (name, "")
            value = stored[name][row]
            if kind == PROVENANCE:
                value = json.loads(value) if value else None
            elif kind in TEXTS:
                value = value or ""
            (captions[style] if style else said)[kind] = value
        told.append(said | {"captions": captions} | {name: each[row] for name, each in alts.items()})
    return told


def _is_same(original: Original, digest: str | None) -> bool:
    return original.image is not None and hashlib.sha256(original.files[original.image]).hexdigest() == digest


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Without times and owners: the same rows make the same file."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, BytesIO(data))
