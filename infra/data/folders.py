"""Read folders of image files with their texts beside them, or in a JSONL or CSV table."""

import csv
import io
import json
import posixpath
from collections import Counter
from collections.abc import Iterator
from typing import Any

from infra import storage
from infra.data.ahead import ahead
from infra.data.samples import IMAGE_ENDINGS, MAX_IMAGE_BYTES, MAX_TEXT_BYTES, Sample, split_caption
from infra.data.stage import FAILED, REJECTED

TEXT_ENDINGS = {"txt": "text", "json": "json"}  # and what an entry calls them
TABLE_ENDINGS = ("jsonl", "csv")
FILE_NAMES = ("file_name", "filename", "image", "file", "path")

Entry = dict[
    str, Any
]  # key, occurrence and, where there are such: image, length, text, json (addresses), fields, reason


def list_entries(files: list[storage.File], root: str, caption_column: str | None = None) -> list[Entry]:
    """Pair images with their texts, sorted by path: one entry a sample, also where one of the two is missing.

    A table (`metadata.jsonl`, `captions.csv`: columns `file_name` and a caption, others become metadata) speaks for the
    images it names, relative to itself; a text of the same name (`dog.txt`, `dog.json`) for its image.
    """
    by_path = {file.url.removeprefix(root).lstrip("/"): file for file in files}
    images = [path for path in by_path if _ending(path) in IMAGE_ENDINGS]
    rows, entries = _read_tables({path: file.url for path, file in by_path.items() if _ending(path) in TABLE_ENDINGS})
    beside: dict[str, dict[str, str]] = {}
    for path, file in by_path.items():
        if _ending(path) in TEXT_ENDINGS:
            texts = beside.setdefault(_stem(path), {})
            texts[TEXT_ENDINGS[_ending(path)]] = file.url
            if file.size > MAX_TEXT_BYTES:
                texts["reason"] = f"text file too large: {file.size} bytes"
    for path in images:
        entry = {"key": _stem(path), "image": by_path[path].url, "length": by_path[path].size}
        if path in rows:
            entries += [entry | {"fields": row, "caption_column": caption_column} for row in rows[path]]
        else:
            entries.append(entry | beside.get(_stem(path), {}))
    for path in images:
        rows.pop(path, None)
        beside.pop(_stem(path), None)
    entries += [
        {"key": stem, "reason": f"no image: there is only {', '.join(sorted({*t} - {'reason'}))}"}
        for stem, t in beside.items()
    ]
    entries += [{"key": path, "reason": "no image: the table names a file that is not there"} for path in rows]
    entries.sort(key=lambda entry: entry["key"])
    seen: Counter[str] = Counter()
    for entry in entries:
        entry["occurrence"] = seen[entry["key"]]
        seen[entry["key"]] += 1
    return entries


def read_entries(entries: list[Entry]) -> Iterator[Sample]:
    """Yield the samples of a group of entries, a few images in memory at a time."""
    return ahead(_read_entry, entries, threads=8, depth=16)


def _read_entry(entry: Entry) -> Sample:
    sample = Sample(key=entry["key"], occurrence=entry["occurrence"])
    if "reason" in entry or entry["length"] > MAX_IMAGE_BYTES:
        sample.state = REJECTED
        sample.reason = entry.get("reason") or f"image file too large: {entry['length']} bytes"
        return sample
    try:
        sample.image = storage.read_bytes(entry["image"])
        sample.source, sample.length = entry["image"], len(sample.image)
        if fields := entry.get("fields"):
            sample.caption, sample.meta = split_caption(fields, entry["caption_column"])
        if "json" in entry:
            sample.meta = storage.read_bytes(entry["json"])
        if "text" in entry:
            sample.caption = storage.read_bytes(entry["text"])
    except storage.UnavailableError:
        raise
    except OSError as error:
        sample.state, sample.reason = FAILED, f"unreadable file: {error}"
    return sample


def _read_tables(tables: dict[str, str]) -> tuple[dict[str, list[dict[str, Any]]], list[Entry]]:
    """The rows of all tables by the image's path, and an entry for each row that names none."""
    rows: dict[str, list[dict[str, Any]]] = {}
    broken: list[Entry] = []
    for path, url in tables.items():
        for number, row in enumerate(_read_table(url), start=1):
            name = next((row[field] for field in FILE_NAMES if isinstance(row.get(field), str)), None)
            if name is None:
                broken.append({"key": f"{path}:{number}", "reason": row.get("") or "broken row: it names no file"})
            else:
                rows.setdefault(posixpath.normpath(posixpath.join(posixpath.dirname(path), name)), []).append(row)
    return rows, broken


def _read_table(url: str) -> Iterator[dict[str, Any]]:
    """The rows of a table as dicts; a row that cannot be read has its reason under the empty name."""
    data = storage.read_bytes(url)
    if _ending(url) == "csv":
        yield from _read_csv(url, data)
        return
    for line in data.splitlines():
        try:
            row = json.loads(line) if line.strip() else {"": "broken row: an empty line"}
            yield row if isinstance(row, dict) else {"": "broken row: not a JSON object"}
        except (ValueError, RecursionError):  # not JSON, or not UTF-8
            yield {"": "broken row: not JSON"}


def _read_csv(url: str, data: bytes) -> Iterator[dict[str, Any]]:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{url} is UTF-16 text, and not UTF-8. Save the table as UTF-8.")
    # What is not UTF-8 becomes lone surrogates: a file name finds its file by them, a caption is refused for them.
    table = csv.DictReader(io.StringIO(data.decode("utf-8-sig", errors="surrogateescape"), newline=""))
    try:
        _ = table.fieldnames  # which reads the first line
    except csv.Error as error:
        raise ValueError(f"{url} is not a readable CSV table: {error}.") from None
    while True:
        try:
            row = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            yield {"": f"broken row: {error}"}
        else:
            yield {name: value for name, value in row.items() if name and isinstance(value, str)}


def _ending(path: str) -> str:
    return storage.name(path).rsplit(".", 1)[-1].lower()


def _stem(path: str) -> str:
    return path.rsplit(".", 1)[0]
