"""The scale of a tokenizer's latents, measured by actors on training rows."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from infra import storage
from infra.cluster import Cluster, connect
from infra.data.first import first_rows
from infra.data.ledger import Ledger, commit
from infra.data.run import run_here, run_stages
from infra.data.shards import ShardReader, joined_names
from infra.data.stage import ACCEPTED
from infra.metrics import Report
from infra.store import Artifact
from t2i.stages import Measure
from t2i.task import TRAIN
from t2i.tokenizers.scale import Scale, ScaleConfig, Sums, measured

FOLDER = "scale"  # within the artifact of the tokenizer, until all is measured
BATCH = 32  # pictures that are looked at together
SHARD_ROWS = 256


def measure_scale(
    config: ScaleConfig, images: Artifact, model: str, out: str, cluster: Cluster, report: Report
) -> Scale:
    """What brings the latents of the tokenizer in the folder `model` to about unit variance.

    It is the same, but for the rounding of the latents themselves, whoever looks at which pictures together.
    """
    rows, sums = (storage.join(out, FOLDER, name) for name in ("rows", "sums"))
    if not storage.exists(storage.join(rows, "ledger.json")):
        _write(_first(images, config.rows), rows)
    count = sum(record["rows_in"] for record in Ledger(rows).complete().values())
    stage = Measure(model, images.path, cluster.cpus_per_actor, cluster.gpus_per_actor)
    if count <= SHARD_ROWS and not (cluster.gpus_per_actor or cluster.address):
        counts = run_here([stage], [rows], sums, batch_size=BATCH, report=report)
    else:
        connect(cluster)
        counts = run_stages([stage], [rows], sums, batch_size=BATCH, actors=cluster.actors, report=report)
    if counts[ACCEPTED] < count:
        (why, *_) = (
            reason
            for name in joined_names([sums])
            for reason in ShardReader([sums], name, every=True).reasons
            if reason is not None
        )
        storage.remove(sums)  # the same line tries again
        raise RuntimeError(
            f"Of {count - counts[ACCEPTED]} of {count} pictures no latents could be had. The first: {why}"
        )
    found = measured(list(_read(sums)), config.channels)
    storage.remove(storage.join(out, FOLDER))
    return found


class _Row(NamedTuple):
    sample_id: str
    shard: str
    place: int


def _first(images: Artifact, count: int) -> list[_Row]:
    """Training rows, the first by sample id: ids are hashes, so the draw is fair and always the same."""

    def read(shard: str) -> Iterator[_Row]:
        columns = ShardReader([images.path], shard).columns(["sample_id", "split"])
        for place in np.flatnonzero(columns["split"] == TRAIN):
            yield _Row(columns["sample_id"][place], shard, int(place))

    found = first_rows(images.path, "split", TRAIN, count, read, lambda row: row.sample_id, images.records() or {})
    return sorted(found, key=lambda row: (row.shard, row.place))


def _write(rows: list[_Row], out: str) -> None:
    """As the shards of an artifact that knows where in another each row lies."""
    ledger = Ledger(out)
    for number, start in enumerate(range(0, len(rows), SHARD_ROWS)):
        part = rows[start : start + SHARD_ROWS]
        columns = {name: [getattr(row, name) for row in part] for name in _Row._fields}
        states = {"state": [ACCEPTED] * len(part), "reason": pa.nulls(len(part), pa.string())}
        name = f"{number:06d}"
        ledger.add(name, commit(out, name, pa.table({"sample_id": columns.pop("sample_id"), **states, **columns})))
    ledger.close()


def _read(sums: str) -> Iterator[Sums]:
    for name in joined_names([sums]):
        columns = ShardReader([sums], name).columns(list(Sums._fields))
        yield from map(Sums, *(columns[name] for name in Sums._fields))
