"""Find the shards of a corpus and read them, whatever their format: tars, Parquet files, or folders of images."""

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import pyarrow.parquet as pq

from infra import storage
from infra.data.fields import CAPTION_NAMES
from infra.data.folders import TEXTS, Entry, list_entries, read_entries
from infra.data.listing import Listing, is_hidden, list_files
from infra.data.packed import plain_copy
from infra.data.parquet import check_column, check_values, image_column, is_text, read_parquet
from infra.data.pictures import is_image
from infra.data.samples import Reading, Sample, Source
from infra.data.stage import FAILED
from infra.data.tars import read_tar

SOURCES = "sources"
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
NOT_CHOSEN, NO_PICTURES = "files of another format", "Parquet files without pictures"
_LOOK = 64  # Parquet files whose columns are looked at
_LOOK_MEMBERS = 100  # of a tar
_TEXTS = (*(f".{ending}" for ending in TEXTS), ".json")


@dataclass(frozen=True)
class Corpus:
    """What a pattern matched: sources by shard name, entries of those that are groups of files, paths passed over."""

    sources: dict[str, Source]
    entries: dict[str, list[Entry]]
    passed: dict[str, list[str]]  # by kind

    @property
    def ignored(self) -> int:
        """How many files were passed over."""
        return sum(map(len, self.passed.values()))

    @property
    def identity(self) -> list[list[str | int]]:
        """Name, size and tag of each source: what changes when the corpus does."""
        return [[source.name, source.size, source.tag] for source in self.sources.values()]


def find_corpus(pattern: str, shard_rows: int = 1000, reading: Reading = Reading()) -> Corpus:  # noqa: B008 - frozen
    """List a corpus and name its shards "000000", "000001" ... in the order of their paths.

    Tars, Parquet files with pictures, and images with their texts are tried in this order; where several hold pictures,
    those that hold the most bytes are the corpus, and the others are passed over. Images come in groups of
    `shard_rows` (their listing is held in memory). FileNotFoundError or ValueError, before any work, if there is
    nothing to read.
    """
    found = list_files(pattern, reading.follow_links)
    tars = [path for path in found.files if path.lower().endswith(TARS)]
    tables, refusal = _with_pictures(found, reading.image_column)
    images = [path for path in found.files if is_image(path)]
    kinds = {"tar": tars, "parquet": tables, "folder": images}
    if sum(map(bool, kinds.values())) > 1:
        kinds["tar"] = [path for path in tars if _holds(found.files[path], is_image)] if len(tars) < _LOOK else tars
    sizes = {kind: sum(found.files[path].size for path in paths) for kind, paths in kinds.items() if paths}
    if not sizes:
        if refusal:
            raise refusal
        raise ValueError(_nothing(pattern, found))
    kind = "parquet" if reading.image_column and tables else _most(found, kinds, sizes)
    for other in sizes.keys() - {kind}:
        found.pass_over(NOT_CHOSEN, [path for path in kinds[other] if path in found.files])
    if kind == "folder":
        return _groups(found, shard_rows, reading)
    chosen = kinds[kind]
    return Corpus(_files(kind, chosen, found, reading), {}, _rest(found, chosen))


def _most(found: Listing, kinds: dict[str, list[str]], sizes: dict[str, int]) -> str:
    """The kind with captions, where another has none; then the one of most bytes; of equals, the first."""
    if len(sizes) == 1:
        return next(iter(sizes))
    captions = {
        "tar": lambda path: _holds(found.files[path], lambda name: name.lower().endswith(_TEXTS)),
        "parquet": lambda path: _has_captions(found.files[path].url),
        "folder": lambda path: any(f"{path.rsplit('.', 1)[0]}.{ending}" in found.files for ending in (*TEXTS, "json")),
    }
    tables = any(path.lower().endswith((".csv", ".tsv", ".jsonl")) for path in found.files)
    with_captions = {kind: any(map(captions[kind], kinds[kind][:_LOOK])) for kind in sizes}
    with_captions["folder"] = with_captions.get("folder", False) or tables
    return max(sizes, key=lambda kind: (with_captions[kind], sizes[kind]))


def _has_captions(url: str) -> bool:
    try:
        with storage.open_read(url) as file:
            names = {name.lower() for name in pq.read_schema(file).names}
    except storage.UnavailableError:
        raise
    except Exception:  # as when it is read
        return False
    return not names.isdisjoint(CAPTION_NAMES)


def _files(kind: str, chosen: list[str], found: Listing, reading: Reading) -> dict[str, Source]:
    return {
        f"{number:06d}": Source(
            kind=kind,
            name=path,
            url=found.files[path].url,
            size=found.files[path].size,
            tag=found.files[path].tag,
            column=reading.image_column if kind == "parquet" else None,
            caption_column=reading.caption_column,
            caption_field=reading.caption_field,
            image_part=reading.image_part,
            encoding=reading.encoding,
            parts=reading.parts,
            root=found.root,
        )
        for number, path in enumerate(chosen)
    }


def _groups(found: Listing, shard_rows: int, reading: Reading) -> Corpus:
    listed = list_entries(found, reading)
    groups = [listed[start : start + shard_rows] for start in range(0, len(listed), shard_rows)]
    named = {f"{number:06d}": group for number, group in enumerate(groups)}
    told = asdict(reading)
    tags = {file.url: file.tag for file in found.files.values()}
    sources = {
        name: Source(
            kind="folder",
            name="",
            url=found.root,
            size=sum(entry.get("length", 0) for entry in group),
            tag=_digest(group, tags),
            caption_column=told["caption_column"],
            caption_field=told["caption_field"],
            encoding=told["encoding"],
            parts=told["parts"],
        )
        for name, group in named.items()
    }
    return Corpus(sources, named, found.passed)


def _digest(group: list[Entry], tags: dict[str, str]) -> str:
    """A hash of a group's entries and of the tags of their files, wherever the corpus lies."""
    files = [[tags.get(entry.get(kind, "")) for kind in ("image", "text", "json")] for entry in group]
    plain = [{key: value for key, value in entry.items() if key not in ("image", "text", "json")} for entry in group]
    text = json.dumps([plain, files], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _with_pictures(found: Listing, column: str | None) -> tuple[list[str], ValueError | None]:
    """The Parquet files that hold pictures, or paths of them where no pictures lie beside; and why others do not."""
    paths = [path for path in found.files if path.lower().endswith(".parquet")]
    alone = not any(is_image(path) for path in found.files)
    without, refusal = [], None
    for path in paths[:_LOOK]:
        try:
            _check_columns(found.files[path].url, column, alone)
        except ValueError as error:
            without.append(path)
            refusal = refusal or error
    if column and refusal and len(without) == len(paths):
        raise refusal  # a wrong name is the user's mistake, and said at once
    if not any(is_image(path) for path in found.files):
        found.pass_over(NO_PICTURES, without)  # else they may be tables, which say what is in the images beside them
    return [path for path in paths if path not in without], refusal


def _check_columns(url: str, column: str | None, paths: bool) -> None:
    """ValueError for a file without pictures; a broken file is the corpus's fault, and recorded when it is read."""
    try:
        with storage.open_read(url) as file:
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            texts = [field.name for field in schema if is_text(field.type)]
            head = next(parquet.iter_batches(8, columns=texts), None)
    except storage.UnavailableError:
        raise
    except Exception:  # pyarrow raises all sorts on broken files
        return
    if column is None:
        column = image_column(url, schema, paths)
    else:
        check_column(url, schema, column)
    if head is not None and column in texts:
        check_values(url, column, head[column].to_pylist())


def _holds(file: storage.File, wanted: Callable[[str], bool]) -> bool:
    """Whether a tar has a file of such a name among its first members; where that cannot be told, it has."""
    try:
        with plain_copy(file.url) as (content, _):
            archive = tarfile.TarFile(fileobj=content, errors="replace")
            for _ in range(_LOOK_MEMBERS):
                member = archive.next()
                if member is None:
                    return False
                if wanted(member.name) and not is_hidden(member.name):
                    return True
    except storage.UnavailableError:
        raise
    except Exception:  # as when it is read
        return True
    return False


def _rest(found: Listing, chosen: list[str]) -> dict[str, list[str]]:
    found.pass_over("other files", sorted(set(found.files).difference(chosen)))
    return found.passed


def _nothing(pattern: str, found: Listing) -> str:
    """Why there is nothing to read."""
    endings = Counter(storage.name(path).rsplit(".", 1)[-1].lower() for path in found.files)
    files = ", ".join(f"{count} .{ending}" for ending, count in endings.most_common(5))
    passed = ", ".join(f"{len(paths)} {kind}" for kind, paths in found.passed.items())
    told = f"{pattern} holds no .tar, no .parquet and no images: found {' and '.join(filter(None, (files, passed)))}."
    tables = endings.keys() & {"csv", "tsv", "psv", "jsonl", "ndjson"}
    return told + " A table speaks for pictures below the same folder: give the folder." * bool(tables)


def list_corpus(pattern: str, shard_rows: int = 1000, reading: Reading = Reading()) -> list[list[str | int]]:  # noqa: B008
    """Name, size and tag of each source of a corpus: what changes when it does."""
    return find_corpus(pattern, shard_rows, reading).identity


def read_source(source: Source, entries: list[Entry] | None = None) -> Iterator[Sample]:
    """Yield the samples of one source; one that cannot be opened yields a single failed sample."""
    shard = source.name or "folder"
    reading = Reading(
        caption_column=source.caption_column,
        caption_field=source.caption_field,
        image_part=source.image_part,
        encoding=source.encoding,
        parts=source.parts,
    )
    try:
        if source.kind == "tar":
            yield from read_tar(shard, source.url, reading)
        elif source.kind == "parquet":
            yield from read_parquet(replace(source, name=shard))
        else:
            yield from read_entries(entries or [], reading)
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
