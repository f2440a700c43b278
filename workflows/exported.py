"""One shard of an export: its samples as they came with the new captions beside them, for a trainer, or a table."""

import hashlib
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from operator import ne
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage, strict
from infra.data.images import ending_of
from infra.data.originals import Original, fits_webdataset, read_originals
from infra.data.readers import read_entries_of
from infra.data.samples import Source
from infra.data.shards import ShardReader
from infra.data.stage import ACCEPTED, FAILED, describe_error
from workflows.exported_rows import ALT, CAPTION, SOURCE, table_of, told_of
from workflows.ingest import make_sample_id

DATA, NAMES = "data", "names"  # the folders of what is written, and of whose it was
METADATA = "metadata.jsonl"  # a row's file, text and all else, where `datasets` looks for it
ENDINGS = {"webdataset": ".tar", "parquet": ".parquet", "folder": ""}  # of a shard
ONCE = "1_"  # before the name of a shard that is a folder: how often an epoch of sd-scripts shall read it
FILE = "export"  # where a shard's ledger says what was written
ROWS = 64  # of a row group with images in it


@dataclass(frozen=True, kw_only=True)
class ExportWork:
    """Writes `data/<shard>.tar`, `.parquet` or the folder `data/1_<shard>`, and returns the states of the shard's rows.

    Beside a tar `names/<shard>.parquet` says of each key in it whose it is; in a table, and in a folder's
    `metadata.jsonl`, columns do. The metadata of what is returned say what was written. A row whose image is no longer
    what was ingested is failed, and left out.
    """

    inputs: tuple[str, ...]  # an ingest, captions, perhaps a mixture
    sources: dict[str, Source]
    out: str
    format: str
    only: str
    with_images: bool
    prefix: str
    several: bool = False  # whether the index has pictures of several alt texts
    as_text: str = ""  # the style that is the one text beside each picture; none: a tar has all styles' files

    def setup(self) -> None:
        """Nothing is loaded."""

    def __call__(self, name: str) -> pa.Table:
        """All rows, in the order of the corpus."""
        reader = ShardReader(self.inputs, name, every=True)
        chosen = self._chosen(reader)
        further: Counter[str] = Counter({"not_chosen": len(reader) - len(chosen)})
        write = {"webdataset": self._write_tar, "parquet": self._write_table, "folder": self._write_folder}[self.format]
        files: dict[str, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory(prefix="rescribe-") as folder:
            shard = f"{name}{ENDINGS[self.format]}" if ENDINGS[self.format] else f"{ONCE}{name}"
            path, names = os.path.join(folder, shard), self._names(reader)
            if keys := write(path, reader, chosen, names, further):
                whose = names.take(list(keys)).append_column("exported_key", pa.array(list(keys.values())))
                first, last = whose["source_name"][0].as_py(), whose["source_name"][-1].as_py()
                if self.format == "webdataset":
                    if self.as_text:  # nothing else of the row is in the tar
                        told = table_of(reader, np.array(list(keys)), names, self.several, self.as_text)
                        whose = told.append_column("exported_key", whose["exported_key"])
                    pq.write_table(whose, table := os.path.join(folder, f"{name}.parquet"))
                    files[f"{NAMES}/{name}.parquet"] = {"rows": len(keys)} | self._put(table, NAMES)
                    further["renamed"] = sum(map(ne, keys.values(), whose["key"].to_pylist()))
                file = {"rows": len(keys), "source": first if first == last else f"{first} to {last}"}
                if self.format == "folder":
                    parts = {each: self._put(os.path.join(path, each), f"{DATA}/{shard}") for each in os.listdir(path)}
                    files |= {f"{DATA}/{shard}/{each}": parts[each] for each in sorted(parts)}
                    files[f"{DATA}/{shard}/{METADATA}"] |= file
                else:
                    files[f"{DATA}/{shard}"] = file | self._put(path, DATA)
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
        told, whose = told_of(reader, self.several), names.select(SOURCE).to_pylist()
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
                for ending, data in self._files(original, told[row] | whose[row]).items():
                    _add(tar, f"{key}.{ending}", data)
        for row in sorted(wanted - keys.keys()):
            if hashes[row] is None:
                further["without_image"] += 1
            else:
                self._lose(reader, row, ValueError(f"{source.name} has changed since it was ingested"), further)
        return keys

    def _files(self, original: Original, told: dict[str, Any]) -> dict[str, bytes]:
        """The files of a sample as they came, and the new ones; or its picture and one text, alike for all samples."""
        if self.as_text:
            assert original.image is not None
            text = told["captions"][self.as_text]["caption"]
            # `datasets` wants one ending in all samples; readers of pictures go by the bytes.
            return {"jpg": original.files[original.image], "txt": text.encode()}
        return original.files | self._new(original, told)

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

    def _write_folder(
        self, path: str, reader: ShardReader, chosen: np.ndarray, names: pa.Table, further: Counter[str]
    ) -> dict[int, str]:
        """The pictures of the chosen rows as they came, a text beside each, and a line of all that is told; their keys.

        Side by side, since trainers look into no further folder: `cats/1.png` is `cats_1.png`.
        """
        os.mkdir(path)
        keys: dict[int, str] = {}
        taken: set[str] = set()
        with open(os.path.join(path, METADATA), "w", encoding="utf-8") as lines:
            for rows, table in self._tables(reader, chosen, names, further):
                texts = {field.name for field in table.schema if pa.types.is_string(field.type)}
                for row, told in zip(rows.tolist(), table.to_pylist(), strict=True):
                    image = told.pop("image")
                    if image is None:
                        further["without_image"] += 1
                        continue
                    stem = told["key"].replace("/", "_")
                    plain = fits_webdataset(stem) and stem.casefold() not in taken
                    keys[row] = stem = stem if plain else told["sample_id"]
                    taken.add(stem.casefold())  # some systems do not tell capitals apart
                    name, text = f"{stem}.{ending_of(image['bytes'])}", told[f"{CAPTION}{self.as_text}"] or ""
                    Path(path, name).write_bytes(image["bytes"])
                    Path(path, f"{stem}.txt").write_text(text, encoding="utf-8")
                    # A text that is not there is "", for readers that take types from the first rows.
                    told |= {each: "" for each in texts if told[each] is None}
                    lines.write(strict.dumps({"file_name": name, "text": text, **told}, ensure_ascii=False) + "\n")
        return keys

    def _tables(
        self, reader: ShardReader, chosen: np.ndarray, names: pa.Table, further: Counter[str]
    ) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """The chosen rows, with images a few at a time."""
        if not (self.with_images or self.format == "folder"):
            if len(chosen):
                yield chosen, table_of(reader, chosen, names, self.several, self.as_text)
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
                table = table_of(reader, rows[good], names, self.several, self.as_text)
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


def _is_same(original: Original, digest: str | None) -> bool:
    return original.image is not None and hashlib.sha256(original.files[original.image]).hexdigest() == digest


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Without times and owners: the same rows make the same file."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, BytesIO(data))
