"""One Parquet file a shard holds all its rows with their state, and its existence is the ledger."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.data.ahead import ahead
from infra.data.shards import shard_names, shard_url
from infra.data.stage import ACCEPTED, FAILED, REJECTED

ROW_GROUP = 512  # rows of a shard are also read in part, and images are large


def commit(out: str, name: str, table: pa.Table) -> bool:
    """Write a shard at once; False, and nothing written, if it is there already."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=ROW_GROUP, compression="zstd")
    try:
        storage.write_bytes(shard_url(out, name), sink.getvalue().to_pybytes(), overwrite=False)
    except FileExistsError:
        # Another attempt at the same shard, given up for dead, came first; its rows are as good as these.
        return False
    return True


def pending(out: str, names: Sequence[str]) -> list[str]:
    """The shards that are not committed yet, found by listing alone."""
    done = set(shard_names(out))
    return [name for name in names if name not in done]


def tally(out: str) -> dict[str, Any]:
    """Count what an artifact's shards hold: shards, rows_in, accepted, rejected, failed, and rows by reason.

    Reasons are counted by what stands before their first colon, the 20 most frequent of them.
    """
    states: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    names = shard_names(out)
    for table in ahead(lambda name: _read_states(out, name), names, threads=8, depth=32):
        states.update(table["state"].to_pylist())
        reasons.update(reason.split(":")[0] for reason in table["reason"].to_pylist() if reason is not None)
    return {
        "shards": len(names),
        "rows_in": states.total(),
        ACCEPTED: states[ACCEPTED],
        REJECTED: states[REJECTED],
        FAILED: states[FAILED],
        "reasons": dict(reasons.most_common(20)),
    }


def _read_states(out: str, name: str) -> pa.Table:
    with storage.open_read(shard_url(out, name)) as file:
        return pq.read_table(file, columns=["state", "reason"], use_threads=False)
