"""Parts of a shard: rows that are done are kept while the others are not; to merge them is the one act that counts.

A part is a run of a shard's rows, in a file of its own that has what the shard will have of them. Who reads an artifact
knows of shards only. Which parts there are is a matter of who did what until when, and no part has to fit another:
whatever rows are not in any are done, by whoever comes, and who finds that all are there merges them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.data.ledger import STATES, Record, commit, pack
from infra.data.plain import check_plain

PARTS = "parts"  # a folder within an artifact that is being made, and in it one for each shard that is under way
_FILE = re.compile(r"(\d+)-(\d+)\.(\d+)-(\d+)-(\d+)\.parquet")
_ITEM = re.compile(r"(.*)\.(\d+)-(\d+)")

Rows = tuple[int, int]  # of a shard: the first, and the one after the last


class Part(NamedTuple):
    """Rows of a shard that are done, and how many of them are in which state; its file's name says all of it."""

    first: int
    end: int
    accepted: int
    rejected: int
    failed: int

    @staticmethod
    def of(first: int, table: pa.Table) -> "Part":
        """The part that a table holds, which begins at a row."""
        states = table["state"].to_pylist()
        return Part(first, first + len(states), *(states.count(state) for state in STATES))

    @property
    def file(self) -> str:
        """What its file is called."""
        return f"{self.first:09d}-{self.end:09d}.{self.accepted}-{self.rejected}-{self.failed}.parquet"


def item_of(name: str, rows: Rows | None = None) -> str:
    """What an actor is told to do: a shard, as `000000`, or some of its rows, as `000000.128-256`."""
    return name if rows is None else f"{name}.{rows[0]}-{rows[1]}"


def read_item(item: str) -> tuple[str, Rows | None]:
    """The shard of an item, and its rows; None where it is the whole shard."""
    found = _ITEM.fullmatch(item)
    return (found[1], (int(found[2]), int(found[3]))) if found else (item, None)


def commit_part(out: str, name: str, part: Part, table: pa.Table) -> None:
    """Write a part at once."""
    storage.write_bytes(storage.join(out, PARTS, name, part.file), pack(table))


def parts_of(out: str, name: str) -> list[Part]:
    """The parts that a shard has, by listing alone."""
    return _parts(storage.list_names(storage.join(out, PARTS, name)))


def all_parts(out: str) -> dict[str, list[Part]]:
    """The parts of all shards that have some, by listing alone."""
    found: dict[str, list[str]] = {}
    with suppress(FileNotFoundError):  # there is none, or the last was merged while it was looked at
        for file in storage.listing(storage.join(out, PARTS)):
            found.setdefault(storage.name(file.url.rsplit("/", 1)[0]), []).append(storage.name(file.url))
    return {name: _parts(files) for name, files in found.items()}


def cover(parts: Iterable[Part]) -> list[Part]:
    """Those parts that have a row which none before them has, in order: others come of actors without a driver."""
    chosen: list[Part] = []
    for part in sorted(parts, key=lambda part: (part.first, -part.end)):
        if not chosen or part.end > chosen[-1].end:
            chosen.append(part)
    return chosen


def gaps(rows: Rows, parts: Iterable[Part]) -> list[Rows]:
    """The runs of `rows` that are in none of the parts."""
    at, end = rows
    found: list[Rows] = []
    for part in cover(parts):
        if at < part.first and at < end:
            found.append((at, min(part.first, end)))
        at = max(at, part.end)
    return found + ([(at, end)] if at < end else [])


def cut(gap: Rows, starts: Sequence[int], least: int) -> list[Rows]:
    """A gap in runs of at least so many rows, but for the last, that begin where a batch does."""
    runs, first = [], gap[0]
    for start in starts:
        if first + least <= start < gap[1]:
            runs.append((first, start))
            first = start
    return [*runs, (first, gap[1])]


def merge(out: str, name: str, sample_ids: list[str], own: Mapping[Part, pa.Table]) -> Record:
    """Commit a shard of whose parts all are there, in `own` or in files, and remove them; returns its record.

    ValueError where a file does not hold the shard's rows: it is removed, for them to be done again. FileNotFoundError
    where another actor merges at the same time.
    """
    whole, folder = (0, len(sample_ids)), storage.join(out, PARTS, name)
    parts = {*own} if not gaps(whole, own) else {*own, *parts_of(out, name)}
    if gaps(whole, parts):
        raise FileNotFoundError(f"{folder} lacks rows of shard {name}.")
    tables, at = [], 0
    for part in cover(parts):
        table = own[part] if part in own else _read(storage.join(folder, part.file), sample_ids[part.first : part.end])
        tables.append(table.slice(at - part.first))
        at = part.end
    table = pa.concat_tables(tables, promote_options="permissive")  # where a part has None alone, its type is null
    record = commit(out, name, table.replace_schema_metadata(tables[0].schema.metadata))
    if len(tables) > 1:
        storage.remove(folder)
    return record


def _parts(files: Iterable[str]) -> list[Part]:
    found = [_FILE.fullmatch(file) for file in files]
    return [Part(*map(int, match.groups())) for match in found if match]


def _read(url: str, sample_ids: list[str]) -> pa.Table:
    try:
        with storage.open_read(url) as file:
            table = pq.read_table(file, use_threads=False)
        check_plain(table.schema, url)
        if table["sample_id"].to_pylist() != sample_ids:
            raise ValueError("other rows")
    except (pa.ArrowException, KeyError, ValueError) as error:
        storage.remove(url)
        raise ValueError(f"{url} did not hold the rows of its name and was removed: {error}") from None
    return table
