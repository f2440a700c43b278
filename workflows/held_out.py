"""The rows of the split `test` that are first by sample id, out of those shards alone that may hold one of them."""

import heapq
from collections.abc import Callable, Iterable
from itertools import chain
from typing import TypeVar

from infra.data.ahead import ahead
from infra.data.sidecar import shard_names
from infra.store import Artifact
from workflows.judge import TEST

AT_ONCE = 8  # shards that are read

Row = TypeVar("Row")


def first_held_out(
    images: Artifact, count: int, read: Callable[[str], Iterable[Row]], sample_id: Callable[[Row], str]
) -> list[Row]:
    """The first `count` by sample id of what `read` finds of the held-out rows of each shard.

    Ids are hashes, so that the draw is fair, and always the same. Which id is the first of a shard its record says;
    shards of before, whose records do not, are all read. Some may be read in vain where `read` leaves rows out.
    """
    records = images.records() or {}
    first: dict[str, str] = {}
    for name in shard_names(images.path):
        record = records.get(name) or {}
        if TEST in record.get("counts", {}).get("split", [TEST]):
            first[name] = record.get("firsts", {}).get("split", {}).get(TEST, "")
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
