"""Prove that an artifact is whole: every file as it was written, every row of its inputs in it once, in one state."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.data import wide
from infra.data.ahead import ahead
from infra.data.ledger import LEDGER, STATES, record_of, total
from infra.data.plain import check_plain
from infra.data.shards import shard_names, shard_url


def verify_files(path: str, files: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What is wrong with the files that a manifest vouches for: each with its name."""
    for name, wanted in files.items():
        url = storage.join(path, name)
        if not storage.exists(url):
            yield f"{name} is missing"
        elif changes := _differ(storage.digest(url), wanted):
            yield f"{name} has changed: {changes}"


def unlisted(path: str, folder: str, files: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The files of a folder of an artifact that its manifest does not know, which readers would take for its own."""
    if not storage.list_names(storage.join(path, folder)):
        return
    found = [file.url.removeprefix(path.rstrip("/") + "/") for file in storage.listing(storage.join(path, folder))]
    yield from (f"{name} is not in the manifest" for name in found if name not in files)


def verify_shards(path: str, inputs: Sequence[str], summary: dict[str, Any]) -> Iterator[str]:
    """What is wrong with an artifact's shards, against its ledger, its counts and the artifacts that it was made from.

    Reads every shard once, and its side files. Within a shard no sample id may come twice; over shards none can, for an
    id is a hash of its shard's name, and each shard must hold the very rows of its inputs.
    """
    records: dict[str, Any] = storage.read_json(storage.join(path, LEDGER))
    present = shard_names(path)
    yield from (f"shard {name} is missing" for name in sorted(records.keys() - set(present)))
    yield from (f"shard {name} is not in the ledger" for name in sorted(set(present) - records.keys()))
    sources = [artifact for artifact in inputs if shard_names(artifact)]
    for artifact in sources:
        lacking = sorted(set(shard_names(artifact)) - set(present))
        yield from (f"shard {name} of {artifact} has no rows here" for name in lacking)
    schema: pa.Schema | None = None
    shared = [name for name in present if name in records]
    checked = ahead(lambda name: _check(path, name, records[name], sources), shared, threads=4, depth=8)
    for name, (faults, found) in zip(shared, checked, strict=True):
        yield from (f"shard {name} {fault}" for fault in faults)
        if found is not None:
            if schema is not None and not _same(schema, found):
                yield f"shard {name} has other columns than the shards before it: {_columns(found)}"
            schema = _merged(schema, found)
    counts = total(records.values())
    for key in ("rows_in", *STATES):
        if key in summary and summary[key] != counts[key]:
            yield f"the manifest counts {summary[key]} {key}, but the ledger {counts[key]}"


def _check(path: str, name: str, record: dict[str, Any], sources: Sequence[str]) -> tuple[list[str], pa.Schema | None]:
    """The faults of one shard, and its columns."""
    try:
        data = storage.read_bytes(shard_url(path, name))
        table = pq.read_table(pa.BufferReader(data), use_threads=False)  # all of it: every page has to decode
        check_plain(table.schema, shard_url(path, name))
        found = record_of(table, data)
        ids = table["sample_id"].to_pylist()
        faults = [f"has changed: {_differ(found, record)}"] if found != record else []
        if sum(found[state] for state in STATES) != found["rows_in"]:
            faults.append("has rows that are neither accepted, rejected nor failed")
        if len(set(ids)) != len(ids):
            faults.append(f"holds {len(ids) - len(set(ids))} sample ids twice")
        faults += [told for side in wide.sides(table.schema).values() if (told := wide.fault(path, side))]
        for source in sources:
            with storage.open_read(shard_url(source, name)) as file:
                others = pq.read_table(file, columns=["sample_id"], use_threads=False)
                check_plain(others.schema, shard_url(source, name))
                theirs = others["sample_id"].to_pylist()
            if set(theirs) != set(ids):
                less, more = len(set(theirs) - set(ids)), len(set(ids) - set(theirs))
                faults.append(f"lacks {less} rows of {source} and has {more} that are not there")
    except storage.UnavailableError:
        raise  # nothing is known of the shard
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        return [f"cannot be read: {' '.join(str(error).split())[:200]}"], None
    return faults, table.schema


def _same(schema: pa.Schema, other: pa.Schema) -> bool:
    """Whether two shards have the same columns; one without an accepted row may not know a column's type."""
    schema, other = _demanded(schema), _demanded(other)
    return schema.names == other.names and all(
        a == b or pa.types.is_null(a) or pa.types.is_null(b) for a, b in zip(schema.types, other.types, strict=True)
    )


def _demanded(schema: pa.Schema) -> pa.Schema:
    """The columns that every shard has to have, of the types that they have wherever they lie."""
    return pa.schema([(field.name, _type(field)) for field in schema if "optional" not in _marks(field)])


def _type(field: pa.Field) -> pa.DataType:
    if side := wide.side_of(field):
        return side.kind
    if pa.types.is_binary(field.type):
        return pa.large_binary()
    return pa.large_list(field.type.value_type) if pa.types.is_list(field.type) else field.type


def _marks(field: pa.Field) -> set[str]:
    return {key.decode() for key in field.metadata or {}}


def _merged(schema: pa.Schema | None, other: pa.Schema) -> pa.Schema:
    schema, other = schema and _demanded(schema), _demanded(other)
    if schema is None or schema.names != other.names:
        return schema or other
    fields = [b if pa.types.is_null(a.type) else a for a, b in zip(schema, other, strict=True)]
    return pa.schema(fields)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _differ(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    changes = [f"{key} {wanted.get(key)} -> {value}" for key, value in found.items() if wanted.get(key) != value]
    return ", ".join(change if len(change) < 60 else change.split(" ")[0] for change in changes)
