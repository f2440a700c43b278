"""One Parquet file a shard holds all its rows with their state: it is the ledger, and a record says what it holds."""

import hashlib
import json
import math
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage, strict
from infra.data import wide
from infra.data.ahead import ahead
from infra.data.plain import check_plain
from infra.data.shards import shard_names, shard_url
from infra.data.stage import ACCEPTED, FAILED, REJECTED

LEDGER = "ledger.json"  # the records of all shards, by name; written when the last of them is committed
JOURNAL = "journal"  # a folder of records on the way there
ROW_GROUP = 512  # rows of a shard are also read in part, and images are large
MAX_REASONS = 20
STATES = (ACCEPTED, REJECTED, FAILED)

# In a shard's schema, by what its record has of their values in accepted rows: how often each of few values stands
# there, the sum of numbers, and the first sample id of each value.
COUNTED, SUMMED, FIRST = b"counted", b"summed", b"first"
FIGURES = {COUNTED: "counts", SUMMED: "sums", FIRST: "firsts"}

# rows_in, a count for each state, reasons, and of the file: size and sha256; perhaps figures, and names of side files
Record = dict[str, Any]


def commit(out: str, name: str, table: pa.Table) -> Record:
    """Write a shard at once, unless it is there already; return the record of what is there then.

    Side files of wide columns come before, so that a shard that is there has them.
    """
    table = wide.put(out, table)
    data = pack(table)
    try:
        storage.write_bytes(shard_url(out, name), data, overwrite=False)
    except FileExistsError:
        # Another attempt at the same shard, given up for dead, came first; its rows are as good as these.
        return inspect(out, name)
    return record_of(table, data)


def pack(table: pa.Table) -> bytes:
    """The file of a table."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=ROW_GROUP, compression="zstd")
    return sink.getvalue().to_pybytes()


def inspect(out: str, name: str) -> Record:
    """The record of a committed shard, made anew from its file."""
    data = storage.read_bytes(shard_url(out, name))
    schema = pq.read_schema(pa.BufferReader(data))
    check_plain(schema, shard_url(out, name))
    columns = dict.fromkeys(
        ["sample_id", "state", "reason", *(name for kind in FIGURES for name in noted(schema, kind))]
    )
    return record_of(pq.read_table(pa.BufferReader(data), columns=list(columns), use_threads=False), data, schema)


def counting(
    table: pa.Table, columns: Sequence[str], summed: Sequence[str] = (), first: Sequence[str] = ()
) -> pa.Table:
    """The table, of whose accepted rows a record is to say more.

    How often each value of some `columns` stands there, the sums of others that are `summed`, and by each value of
    others the `first` sample id. Values are texts, and of reasons what stands before the colon.
    """
    asked = {kind: names for kind, names in zip(FIGURES, (columns, summed, first), strict=True) if names}
    if not asked:
        return table
    metadata = {kind: strict.dumps(list(names)).encode() for kind, names in asked.items()}
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})


def noted(schema: pa.Schema, kind: bytes = COUNTED) -> list[str]:
    """The columns of which a shard's record has figures of a kind."""
    return json.loads((schema.metadata or {}).get(kind, b"[]"))


def recorded(out: str, counted: Sequence[str], summed: Sequence[str] = ()) -> list[Record]:
    """The records of an artifact's shards, in their order, with the counts and the sums of some columns.

    Shards of before, whose records lack them, are read, several at a time.
    """

    def complete(named: tuple[str, Record]) -> Record:
        name, record = named
        if {*counted} <= record.get("counts", {}).keys() and {*summed} <= record.get("sums", {}).keys():
            return record
        with storage.open_read(shard_url(out, name)) as file, pq.ParquetFile(file) as parquet:
            check_plain(parquet.schema_arrow, shard_url(out, name))
            table = parquet.read(["state", *counted, *summed], use_threads=False)
        return record | _figures(counting(table, counted, summed))

    return list(ahead(complete, Ledger(out).complete().items(), threads=8, depth=32))


def pending(out: str, names: Sequence[str]) -> list[str]:
    """The shards that are not committed yet, found by listing alone."""
    done = set(shard_names(out))
    return [name for name in names if name not in done]


def tally(out: str) -> dict[str, Any]:
    """Count what an artifact's shards hold: shards, rows_in, accepted, rejected, failed, and rows by reason.

    Reasons are counted by what stands before their first colon, the 20 most frequent of them.
    """
    return total(Ledger(out).complete().values())


def total(records: Iterable[Record]) -> dict[str, Any]:
    """The sum of some records, as `tally` gives it."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for record in records:
        counts.update({"shards": 1, **{key: record[key] for key in ("rows_in", *STATES)}})
        reasons.update(record["reasons"])
    return {key: counts[key] for key in ("shards", "rows_in", *STATES)} | {
        "reasons": dict(reasons.most_common(MAX_REASONS))
    }


class Ledger:
    """The records of an artifact's shards, kept beside them so that a resume reads no finished shard.

    Memory and the ledger's size grow with shards, not rows: some 250 bytes a shard. What earlier drivers noted is read
    when it is asked for, at the end: a resume begins its work without it.
    """

    def __init__(self, out: str) -> None:
        self._out = out
        self._added: dict[str, Record] = {}
        self._fresh: dict[str, Record] = {}
        self._saved = time.monotonic()

    def add(self, name: str, record: Record) -> None:
        """Note a shard that was committed; what was noted is saved every few seconds."""
        self._added[name] = self._fresh[name] = record
        if time.monotonic() - self._saved > (2.0 if storage.is_local(self._out) else 20.0):
            self.save()

    def save(self) -> None:
        """Append what was noted since the last time to the journal."""
        self._saved = time.monotonic()
        if self._fresh:
            url = storage.join(self._out, JOURNAL, f"{uuid.uuid4().hex}.json")
            storage.write_bytes(url, strict.dumps(self._fresh).encode())
            self._fresh = {}

    def complete(self) -> dict[str, Record]:
        """The records of all committed shards by name, those of a dead driver read from their files."""
        return self._complete(self._written() or {})

    def close(self) -> dict[str, Record]:
        """`complete`, and write the ledger unless it says just that already."""
        written = self._written()
        records = self._complete(written or {})
        if records != written:
            storage.write_bytes(storage.join(self._out, LEDGER), strict.dumps(records).encode())
        storage.remove(storage.join(self._out, JOURNAL))
        return records

    def _written(self) -> dict[str, Record] | None:
        url = storage.join(self._out, LEDGER)
        return storage.read_json(url) if storage.exists(url) else None

    def _complete(self, written: dict[str, Record]) -> dict[str, Record]:
        journal = storage.join(self._out, JOURNAL)
        pieces = [storage.join(journal, name) for name in storage.list_names(journal)]
        known = dict(written)
        for piece in ahead(storage.read_json, pieces, threads=8, depth=16):
            known |= piece
        known |= self._added
        present = shard_names(self._out)
        unknown = [name for name in present if name not in known]  # their driver died before it noted them
        known |= zip(unknown, ahead(lambda name: inspect(self._out, name), unknown, threads=8, depth=16), strict=True)
        return {name: known[name] for name in present}


def record_of(table: pa.Table, data: bytes, schema: pa.Schema | None = None) -> Record:
    """The record of a shard that has these rows and these bytes; `schema` where the table lacks columns of it."""
    found = table["state"].to_pylist()
    states = Counter(found)
    reasons = Counter(reason.split(":")[0] for reason in table["reason"].to_pylist() if reason is not None)
    files = [side.file for side in wide.sides(schema or table.schema).values()]
    return {
        "rows_in": table.num_rows,
        **{state: states[state] for state in STATES},
        "reasons": dict(reasons.most_common(MAX_REASONS)),
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        **_figures(table),
        **({"wide": files} if files else {}),
    }


def side_files(records: Iterable[Record]) -> set[str]:
    """The names of the side files of some shards."""
    return {file for record in records for file in record.get("wide", ())}


def _figures(table: pa.Table) -> dict[str, dict[str, Any]]:
    """What a record is to say of the accepted rows of a table beside how many there are."""
    accepted = table.filter(pa.array([state == ACCEPTED for state in table["state"].to_pylist()], pa.bool_()))
    made = {COUNTED: _counts, SUMMED: _sum, FIRST: lambda column: _firsts(column, accepted["sample_id"])}
    figures = {kind: {name: make(accepted[name]) for name in noted(table.schema, kind)} for kind, make in made.items()}
    return {FIGURES[kind]: figure for kind, figure in figures.items() if figure}


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """By value, as text, of reasons by what stands before the colon; null is not counted."""
    values = Counter(map(_word, column.drop_null().to_pylist()))
    return dict(sorted(values.items()))


def _sum(column: pa.ChunkedArray) -> float:
    """Rounded once, so that it is the same however the rows lie."""
    return math.fsum(column.drop_null().to_pylist())


def _firsts(column: pa.ChunkedArray, sample_ids: pa.ChunkedArray) -> dict[str, str]:
    """By value, as `_counts` has it, the first sample id in the order of their letters."""
    firsts: dict[str, str] = {}
    ids: list[Any] = sample_ids.to_pylist()
    for value, sample_id in zip(column.to_pylist(), ids, strict=True):
        if value is not None:
            firsts[_word(value)] = min(sample_id, firsts.get(_word(value), sample_id))
    return dict(sorted(firsts.items()))


def _word(value: Any) -> str:
    return str(value).split(":")[0]
