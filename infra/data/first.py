"""The rows with a value of a column that are first by sample id, out of those shards alone that may hold some."""

import heapq
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import TypeVar

from infra import storage
from infra.data.ahead import ahead
from infra.data.ledger import LEDGER, Ledger, Record
from infra.data.sidecar import shard_names

AT_ONCE = 8  # shards that are read

Row = TypeVar("Row")


def first_rows(
    path: str,
    column: str,
    value: str,
    count: int,
    read: Callable[[str], Iterable[Row]],
    sample_id: Callable[[Row], str],
    records: Mapping[str, Record | None] | None = None,
) -> list[Row]:
    """The first `count` by sample id of what `read` finds, in each shard, of the rows with a `value` of a column.

    Ids are hashes, so that the draw is fair, and always the same. Which id is the first of a shard its record says, in
    `records` or in the ledger of the artifact at `path`; shards of before, whose records do not, are all read. Some may
    be read in vain where `read` leaves rows out.
    """
    if records is None and storage.exists(storage.join(path, LEDGER)):
        records = Ledger(path).complete()
    first: dict[str, str] = {}
    for name in shard_names(path):
        record = (records or {}).get(name) or {}
        if value in record.get("counts", {}).get(column, [value]):
            first[name] = record.get("firsts", {}).get(column, {}).get(value, "")
    left = sorted(first, key=lambda name: (first[name], name))
    found: list[Row] = []
    while left and count:
        some = left[: min(AT_ONCE, count - len(found) or AT_ONCE)]
        if len(found) == count:
            some = [name for name in some if first[name] < sample_id(found[-1])]
        if not some:
            break
        left = left[len(some) :]
        rows = ahead(lambda name: list(read(name)), some, threads=AT_ONCE, depth=AT_ONCE)
        found = heapq.nsmallest(count, chain(found, *rows), key=sample_id)
    return found
