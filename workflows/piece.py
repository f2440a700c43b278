"""A piece of an artifact: the first rows of some of its shards, as an artifact that steps read like any other."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.styles import Style
from captioner.task import ALT_COLUMN
from infra import storage
from infra.artifact import Artifact, Planned, Step
from infra.data.ledger import LEDGER, Ledger, commit, pack, record_of, total
from infra.data.shards import ShardReader, shard_names, shard_url
from infra.data.wide import FOLDER as WIDE
from infra.store import MANIFEST, UNLISTED
from workflows.judge import TEST


def has_rows(artifact: Artifact) -> bool:
    """Whether its rows are those of a corpus, and lie in shards."""
    return LEDGER in artifact.manifest.get("files", {}) and not artifact.has_own_rows


def rows_in(path: str) -> tuple[int, int]:
    """The rows of an artifact, and how many of them are held out, where that is counted."""
    records = Ledger(path).complete().values()
    tests = sum(record.get("counts", {}).get("split", {}).get(TEST, 0) for record in records)
    return sum(record["rows_in"] for record in records), tests


def cut(artifact: Artifact, root: str, names: Sequence[str], rows: int) -> Artifact:
    """The first rows of some shards of an artifact, and of its inputs, in a store at `root`, which is local."""
    path = storage.join(root, artifact.step, artifact.id)
    if storage.exists(storage.join(path, MANIFEST)):
        return Artifact.open(path)
    inputs = [cut(each, root, names, rows) if has_rows(each) else each for each in artifact.inputs]
    known, records = Ledger(artifact.path).complete(), {}
    for name in names:
        with storage.open_read(shard_url(artifact.path, name)) as file:
            table = pq.read_table(file)
        table = table.slice(0, rows)
        data = pack(table)
        storage.write_bytes(shard_url(path, name), data)
        records[name] = record_of(table, data)
        for side in known[name].get("wide", ()):
            _bring(*(storage.join(each, WIDE, side) for each in (artifact.path, path)))
    storage.write_json(storage.join(path, LEDGER), records)
    for file in storage.listing(artifact.path):
        name = file.url.removeprefix(artifact.path).lstrip("/")
        if name != LEDGER and name.split("/")[0] not in UNLISTED:
            _bring(file.url, storage.join(path, name))
    storage.write_json(storage.join(path, MANIFEST), artifact.manifest | {"inputs": [each.path for each in inputs]})
    return Artifact.open(path)


def stand_in(
    work: Step, made: Planned, inputs: Sequence[Artifact | None], styles: Sequence[Style], root: str
) -> Artifact:
    """Captions that are the corpus's own texts, in the place of those that nobody is asked for."""
    images = next(each for each in inputs if each is not None)
    path = storage.join(root, work.name, made.id)
    ledger = Ledger(path)
    for name in shard_names(images.path):
        reader = ShardReader([images.path], name, every=True)
        texts = [text or "a picture" for text in reader.columns([ALT_COLUMN])[ALT_COLUMN]]
        columns: dict[str, Any] = {"sample_id": reader.sample_ids, "state": reader.states}
        columns["reason"] = pa.array(reader.reasons, pa.string())
        columns |= {f"caption_{style.name}": pa.array(texts, pa.string()) for style in styles}
        columns |= {f"provenance_{style.name}": pa.nulls(len(texts), pa.string()) for style in styles}
        ledger.add(name, commit(path, name, pa.table(columns)))
    counts = total(ledger.close().values())
    manifest = made.manifest | {
        "step": work.name,
        "inputs": [each.path for each in inputs if each is not None],
        "summary": counts | {"styles": [asdict(style) for style in styles]},
        "files": {LEDGER: {}},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    storage.write_json(storage.join(path, MANIFEST), manifest)
    return Artifact.open(path)


def _bring(source: str, target: str) -> None:
    if storage.is_local(source):
        storage.copy(source, target)
    else:
        storage.write_bytes(target, storage.read_bytes(source))
