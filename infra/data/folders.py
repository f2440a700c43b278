"""Read folders of image files, with their texts beside them or in tables."""

import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from infra import storage
from infra.data.ahead import ahead
from infra.data.fields import captions_of_json, split_captions
from infra.data.listing import Listing
from infra.data.pictures import base_of, is_image
from infra.data.samples import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, Reading, Sample
from infra.data.stage import FAILED, REJECTED
from infra.data.tables import TABLE_ENDINGS, NotATableError, Row, read_table

TEXTS = ("txt", "caption", "text")  # a text beside a picture, in this order
LONELY, OTHER, PART = "texts without a picture", "other files", "parts of pictures"
NO_TABLE, BROKEN = "tables that are not read", "broken rows of tables"

Entry = dict[str, Any]
"""One sample: key, occurrence and, where there are such: image, length, text, json (addresses), rows (the fields of
those rows of tables that name it), parts (addresses by ending), fault (of these), reason (why it has no picture)."""


def list_entries(found: Listing, reading: Reading) -> list[Entry]:
    """Pair images with their texts, sorted by path: one entry a picture, and one a table's row that has none.

    A table (`metadata.jsonl`, `captions.csv`) speaks for the pictures that it names; texts of the same name (`dog.txt`,
    `dog.caption`, `dog.json`) for theirs. What is used by no picture is passed over.
    """
    images = [path for path in found.files if is_image(path)]
    stems = {_stem(path) for path in images}
    parts = [path for path in images if base_of(_stem(path), stems - {_stem(path)})] if not reading.image_part else []
    urls = {path: found.files[path].url for path in parts}
    found.pass_over(PART, parts)
    images = [path for path in images if path in found.files]
    beside, used = _texts(found, images)
    for path, base in _parts_of(parts, stems, reading.parts):
        for image in (image for image in images if _stem(image) == base):
            beside.setdefault(image, {}).setdefault("parts", {})[path[len(base) + 1 :]] = urls[path]
    rows, broken = _tables(found, images, used, reading)
    entries: list[Entry] = []
    for path in images:
        entry: Entry = {"key": _stem(path), "image": found.files[path].url, "length": found.files[path].size}
        entry |= beside.get(path, {})
        if path in rows:
            entry["rows"] = [row.fields for row in rows[path] if row.fault is None]
            if faults := [row.fault for row in rows[path] if row.fault]:
                entry["fault"] = faults[0]  # which row it is stands in the log
        entries.append(entry)
    left = set(found.files).difference(images, used)
    found.pass_over(LONELY, sorted(path for path in left if _ending(path) in TEXTS))
    found.pass_over(OTHER, sorted(path for path in left if path in found.files))
    entries += broken
    entries.sort(key=lambda entry: entry["key"])
    seen: Counter[str] = Counter()
    for entry in entries:
        entry["occurrence"] = seen[entry["key"]]
        seen[entry["key"]] += 1
    return entries


def read_entries(entries: list[Entry], reading: Reading = Reading()) -> Iterator[Sample]:  # noqa: B008 - frozen
    """Yield the samples of a group of entries, a few images in memory at a time."""
    return ahead(lambda entry: _read_entry(entry, reading), entries, threads=8, depth=16)


def _read_entry(entry: Entry, reading: Reading) -> Sample:
    sample = Sample(key=entry["key"], occurrence=entry["occurrence"], fault=entry.get("fault"))
    if "reason" in entry or entry["length"] > MAX_IMAGE_BYTES:
        sample.state = REJECTED
        sample.reason = entry.get("reason") or f"image file too large: {entry['length']} bytes"
        return sample
    try:
        sample.image = storage.read_bytes(entry["image"])
        sample.source, sample.length = entry["image"], len(sample.image)
        rows = entry.get("rows") or ([entry["fields"]] if "fields" in entry else [])  # ingest 1 kept one, so called
        for fields in rows:
            captions, rest = split_captions(fields, reading.caption_column)
            sample.captions += captions
            sample.meta = rest if sample.meta is None else sample.meta
        sample.parts = {part: storage.read_bytes(url) for part, url in entry.get("parts", {}).items()}
        if "json" in entry:
            sample.meta = storage.read_bytes(entry["json"], 0, MAX_TEXT_BYTES + 1)
        if reading.caption_field and "json" in entry:
            sample.captions = captions_of_json(sample.meta or b"", reading.caption_field, reading.encoding)
        if not sample.captions and "text" in entry:
            sample.captions = [storage.read_bytes(entry["text"], 0, MAX_TEXT_BYTES + 1)]
        if not sample.captions and "json" in entry:
            sample.captions = captions_of_json(sample.meta or b"", None, reading.encoding)
    except storage.UnavailableError:
        raise
    except OSError as error:
        sample.state, sample.reason = FAILED, f"unreadable file: {error}"
    return sample


def _parts_of(parts: list[str], stems: set[str], wanted: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The parts that are wanted, each with the stem of its picture."""
    for path in parts:
        base = base_of(_stem(path), stems - {_stem(path)})
        if base and path[len(base) + 1 :] in wanted:
            yield path, base


def _texts(found: Listing, images: list[str]) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """The texts beside each picture, as `text` and `json`, and the paths of all of them."""
    beside: dict[str, dict[str, Any]] = {}
    used: set[str] = set()
    for path in images:
        for name, endings in (("text", TEXTS), ("json", ("json",))):
            # `dog.txt`, or `dog.jpg.txt`
            texts = [f"{stem}.{ending}" for stem in (_stem(path), path) for ending in endings]
            if text := next((each for each in texts if each in found.files), None):
                beside.setdefault(path, {})[name] = found.files[text].url
                used.update(each for each in texts if each in found.files)
    return beside, used


def _tables(
    found: Listing, images: list[str], used: set[str], reading: Reading
) -> tuple[dict[str, list[Row]], list[Entry]]:
    """The rows of all tables by the picture's path, and an entry for each row that has no picture."""
    finder = _Finder(found, images)
    rows: dict[str, list[Row]] = {}
    broken: list[Entry] = []
    for path in _candidates(found, used):
        try:
            table = read_table(found.files[path], reading.file_column, reading.encoding)
        except NotATableError as error:
            if _ending(path) not in (*TEXTS, "json"):
                found.passed.setdefault(NO_TABLE, []).append(f"{path}: {error}")
                used.add(path)
            continue
        places = [finder.find(path, row.file) if row.file else [] for row in table]
        if not any(places):  # COCO's tables lie apart from the pictures
            places = [finder.find_apart(row.file) if row.file else [] for row in table]
        if not any(places) and _ending(path) in (*TEXTS, "json"):
            continue  # a text that happens to look like one
        used.add(path)
        for row, there in zip(table, places, strict=True):
            if row.fault and there:
                found.passed.setdefault(BROKEN, []).append(f"{path}:{row.number}: {row.fault}")
            if len(there) == 1:
                rows.setdefault(there[0], []).append(row)
                used.add(there[0])
                if there[0] not in finder.images:
                    finder.images.add(there[0])
                    images.append(there[0])
            elif there:
                broken.append(
                    {"key": f"{path}:{row.number}", "reason": f"broken row: {row.file} may be {len(there)} files"}
                )
            elif row.file:
                broken.append({"key": row.file, "reason": f"no image: {path} names it, and it is not in the corpus"})
            else:
                broken.append({"key": f"{path}:{row.number}", "reason": row.fault or "broken row"})
    images.sort()
    return _with_captions(rows, reading), broken


def _with_captions(rows: dict[str, list[Row]], reading: Reading) -> dict[str, list[Row]]:
    """Of a picture's rows those that have captions, if any has; of others the first says the rest."""
    for path, its in rows.items():
        said = [row for row in its if split_captions(row.fields, reading.caption_column)[0]]
        rows[path] = said or its[:1] if all(row.fault is None for row in its) else its
    return rows


class _Finder:
    """Which file of the corpus a table means."""

    def __init__(self, found: Listing, images: list[str]) -> None:
        self._files, self.images = found.files, set(images)
        self._root = found.root.rstrip("/") + "/"
        self._by_name: dict[str, list[str]] = {}
        for path in images:
            for name in {storage.name(path), storage.name(_stem(path))}:
                self._by_name.setdefault(name, []).append(path)

    def find(self, table: str, named: str) -> list[str]:
        """The path that a name means: relative to the table, or to the corpus, or absolute; also without its ending."""
        for way in _ways(named):
            for folder in (posixpath.dirname(table), ""):
                path = posixpath.normpath(posixpath.join(folder, way.removeprefix(self._root)))
                if path in self._files:
                    return [path]
                if found := [each for each in self._by_name.get(storage.name(path), []) if _stem(each) == path]:
                    return found
        return self.find_apart(named) if _FOREIGN.match(named) else []

    def find_apart(self, named: str) -> list[str]:
        """The paths that end as a name does; of one that has folders of another machine, those that do so longest."""
        best, most = list[str](), 1
        for way in _ways(named):
            parts = way.split("/")
            for path in self._by_name.get(parts[-1], []):
                pairs = zip(reversed(path.split("/")), reversed(parts), strict=False)
                shared = next((n for n, (one, other) in enumerate(pairs) if n and one != other), len(parts))
                shared = min(shared, len(path.split("/")))
                if shared < len(parts) and not _FOREIGN.match(way):
                    continue
                best, most = ([path], shared) if shared > most else (best + [path] * (shared == most), most)
        return list(dict.fromkeys(best))


_FOREIGN = re.compile(r"[A-Za-z]:|[\\/]|[a-z0-9+]+://")  # a path that does not begin where the table lies
_MOST_TEXTS = 64  # that may be tables, and are not called so


def _ways(named: str) -> list[str]:
    """A name as it is, without a caption's number (`dog.jpg#0`, as Flickr counts), and with Windows' bars turned."""
    names = [named, re.sub(r"#\d+$", "", named)]
    return list(dict.fromkeys([*names, *(name.replace("\\", "/") for name in names)]))


def _candidates(found: Listing, used: set[str]) -> list[str]:
    """Files that may be tables: all that are called so, and the largest texts that belong to no picture."""
    left = [path for path in found.files if _ending(path) in TABLE_ENDINGS and path not in used]
    plain = sorted((path for path in left if _ending(path) in (*TEXTS, "json")), key=lambda p: -found.files[p].size)
    return [path for path in left if path not in plain[_MOST_TEXTS:]]


def _ending(path: str) -> str:
    return storage.name(path).rsplit(".", 1)[-1].lower()


def _stem(path: str) -> str:
    return path.rsplit(".", 1)[0]
