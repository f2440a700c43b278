"""Find the shards of a corpus and read them, whatever their format: tars, Parquet files, or folders of images."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pyarrow.parquet as pq

from infra import storage
from infra.data.folders import TABLE_ENDINGS, Entry, list_entries, read_entries
from infra.data.parquet import image_column, read_parquet
from infra.data.samples import IMAGE_ENDINGS, Sample, Source
from infra.data.stage import FAILED
from infra.data.tars import read_tar

SOURCES = "sources"


@dataclass(frozen=True)
class Corpus:
    """What a pattern matched: sources by shard name, entries of those that are groups of files, files passed over."""

    sources: dict[str, Source]
    entries: dict[str, list[Entry]]
    ignored: int


def find_corpus(
    pattern: str, shard_rows: int = 1000, image_column: str | None = None, caption_column: str | None = None
) -> Corpus:
    """List a corpus and name its shards "000000", "000001" ... in the order of their paths.

    Tars are taken if there are any, else Parquet files, else images in groups of `shard_rows` (their listing is held in
    memory). FileNotFoundError or ValueError, before any work, if there is nothing to read.
    """
    root = find_root(pattern)
    files = storage.listing(storage.absolute(pattern))
    endings = Counter(_ending(file) for file in files)
    for kind in ("tar", "parquet"):
        if chosen := [file for file in files if _ending(file) == kind]:
            if kind == "parquet":
                _check_columns(chosen[0].url, image_column)
            sources = {
                f"{number:06d}": Source(
                    kind=kind,
                    name=file.url.removeprefix(root).lstrip("/"),
                    url=file.url,
                    size=file.size,
                    tag=file.tag,
                    column=image_column,
                    caption_column=caption_column,
                )
                for number, file in enumerate(chosen)
            }
            return Corpus(sources, {}, len(files) - len(chosen))
    if not any(ending in endings for ending in IMAGE_ENDINGS):
        found = ", ".join(f"{count} .{ending}" for ending, count in endings.most_common(5))
        raise ValueError(f"{pattern} holds no .tar, no .parquet and no images: found {found}.")
    if not any(ending in endings for ending in ("txt", "json", *TABLE_ENDINGS)):
        raise ValueError(
            f"{pattern} matches {len(files)} images and no captions. Give the folder, or a pattern that matches the "
            "texts too, as in photos/*.{jpg,txt}."
        )
    listed = list_entries(files, root, caption_column)
    groups = [listed[start : start + shard_rows] for start in range(0, len(listed), shard_rows)]
    named = {f"{number:06d}": group for number, group in enumerate(groups)}
    sizes = {name: sum(entry.get("length", 0) for entry in group) for name, group in named.items()}
    sources = {name: Source(kind="folder", name="", url=root, size=sizes[name], tag="") for name in named}
    return Corpus(sources, named, 0)


def find_root(pattern: str) -> str:
    """The folder that the paths within a corpus are relative to: what comes before the first wildcard."""
    url = storage.absolute(pattern)
    if storage.is_local(url) and os.path.isdir(url):
        return url
    scheme, _, path = url.rpartition("://")
    parts = path.split("/")
    plain = next((number for number, part in enumerate(parts) if any(c in part for c in "*?[{")), None)
    if plain is None and scheme:
        # S3 has no folders: a name with something below it is one.
        plain = len(parts) if storage.list_names(url) not in ([], [parts[-1]]) else len(parts) - 1
    kept = "/".join(parts[: len(parts) - 1 if plain is None else plain])
    return f"{scheme}://{kept}" if scheme else kept


def list_corpus(pattern: str) -> list[list[str | int]]:
    """Name, size and tag of each file that a pattern matches: what changes when the corpus does."""
    root = find_root(pattern)
    files = storage.listing(storage.absolute(pattern))
    return [[file.url.removeprefix(root).lstrip("/"), file.size, file.tag] for file in files]


def read_source(source: Source, entries: list[Entry] | None = None) -> Iterator[Sample]:
    """Yield the samples of one source; one that cannot be opened yields a single failed sample."""
    shard = source.name or "folder"
    try:
        if source.kind == "tar":
            yield from read_tar(shard, source.url)
        elif source.kind == "parquet":
            yield from read_parquet(shard, source.url, source.column, source.caption_column)
        else:
            yield from read_entries(entries or [])
    except storage.UnavailableError:
        raise  # the source may be well, and is read when its place is
    except OSError as error:
        yield Sample(key=f"{shard}#unreadable", state=FAILED, reason=f"unreadable shard: {error}")


def write_sources(corpus: Corpus, out: str) -> None:
    """Write which source each shard comes from: `shards.json`, and a file of entries for each group of files."""
    for name, entries in corpus.entries.items():
        storage.write_json(storage.join(out, SOURCES, f"{name}.json"), entries)
    storage.write_json(storage.join(out, "shards.json"), {name: asdict(s) for name, s in corpus.sources.items()})


def read_entries_of(out: str, name: str) -> list[Entry]:
    """The entries that `write_sources` wrote for a group of files."""
    return storage.read_json(storage.join(out, SOURCES, f"{name}.json"))


def _ending(file: storage.File) -> str:
    return storage.name(file.url).rsplit(".", 1)[-1].lower()


def _check_columns(url: str, column: str | None) -> None:
    """A wrong column is the user's mistake and said at once; a broken file is the corpus's, and recorded."""
    try:
        with storage.open_read(url) as file:
            schema = pq.read_schema(file)
            names = schema.names
    except storage.UnavailableError:
        raise
    except Exception:  # pyarrow raises all sorts on broken files
        return
    if column is None:
        image_column(url, schema)
    elif column not in names:
        raise ValueError(f"{url} has no column {column!r}: there are {', '.join(names)}.")
