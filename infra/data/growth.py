"""A corpus grows: a shard that is made of the very same as one of an older artifact is taken over from there.

What a shard is made of is told by a hash, its piece: of an index, the source that it reads; of what is derived shard by
shard, the hashes of the shards that it reads. So names may shift where a source comes in between, and a source that was
copied anew is read again, but nothing is derived from it again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from infra import storage
from infra.data import wide
from infra.data.ahead import ahead
from infra.data.ledger import Ledger, Record
from infra.data.samples import Source
from infra.data.shards import shard_url

SOURCES = "shards.json"  # of an ingest: which source each shard comes from

Pieces = Mapping[str, str | None]  # by shard; None: it cannot be known before it is there


class Input(Protocol):
    """An artifact that shards are made of."""

    @property
    def content(self) -> Any:
        """What is equal where all that lies in it is."""
        ...

    def records(self) -> Mapping[str, Record | None] | None:
        """The records of its shards, where it has any; None in place of one that is yet to be made."""
        ...


def of_inputs(inputs: Sequence[Input]) -> Pieces:
    """The pieces of what is made shard by shard of other artifacts."""
    records = [one.records() for one in inputs]
    whole = [one.content for one, found in zip(inputs, records, strict=True) if found is None]
    by_shard = [found for found in records if found is not None]
    names = [name for name in by_shard[0] if all(name in found for found in by_shard)] if by_shard else []
    read = {name: [found[name] for found in by_shard] for name in names}
    return {
        name: _hash([whole, [one["sha256"] for one in found if one]]) if all(found) else None
        for name, found in read.items()
    }


def of_sources(sources: Mapping[str, Source]) -> Pieces:
    """The pieces of an index; None for a source without a tag, which may have changed."""
    return {name: _hash(asdict(source)) if source.tag else None for name, source in sources.items()}


def listed_sources(out: str) -> Mapping[str, Source]:
    """The sources that an ingest noted."""
    return {name: Source(**told) for name, told in storage.read_json(storage.join(out, SOURCES)).items()}


def matching(wanted: Pieces, theirs: Pieces, names: Iterable[str]) -> dict[str, str]:
    """Of the shards `names` those that others have, and what they call them."""
    named = {piece: name for name, piece in theirs.items() if piece is not None}
    return {name: named[piece] for name in names if (piece := wanted[name]) in named}


def take_over(out: str, older: str, names: Mapping[str, str], records: Mapping[str, Record]) -> None:
    """Put shards of an older artifact, named by what they are called here, into a new one, and note their records."""
    ledger = Ledger(out)

    def take(name: str) -> str:
        for file in records[names[name]].get("wide", ()):
            storage.copy(*(storage.join(artifact, wide.FOLDER, file) for artifact in (older, out)))
        storage.copy(shard_url(older, names[name]), shard_url(out, name))
        return name

    for name in ahead(take, names, threads=8, depth=16):
        ledger.add(name, records[names[name]])
    ledger.save()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
