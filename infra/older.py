"""What older artifacts of a step hold of a new one: shards that are made of the same, whatever their names there."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from infra import storage
from infra.artifact import Artifact, Step
from infra.config import from_dict, to_dict
from infra.data import wide
from infra.data.ahead import ahead
from infra.data.growth import Pieces, matching, take_over
from infra.data.ledger import LEDGER, Ledger, Record
from infra.data.shards import FOLDER, shard_names
from infra.data.stage import FAILED


@dataclass(frozen=True)
class Found:
    """A shard of an older artifact."""

    older: Artifact
    name: str  # there
    record: Record


def grow(
    work: Step, config: Any, inputs: Sequence[Artifact], path: str, tell: Callable[[str], None]
) -> tuple[dict[str, int], Pieces]:
    """Take over what older artifacts hold: how many shards of each, and the pieces of all of them."""
    wanted, found = look(work, config, inputs, path)
    there = {*shard_names(path)} if found else set[str]()
    taken = Counter(one.older.path for one in found.values())
    for older in taken:
        own = {name: one for name, one in found.items() if one.older.path == older and name not in there}
        take_over(path, older, {name: one.name for name, one in own.items()}, {o.name: o.record for o in own.values()})
    if found:
        tell(f"{len(found)} of {len(wanted)} shards are taken over from {', '.join(taken)}")
    counts = {"/".join(older.split("/")[-2:]): count for older, count in taken.items()}
    return counts, {name: wanted[name] for name in found}


def regret(work: Step, config: Any, inputs: Sequence[Artifact], path: str, taken: Pieces) -> None:
    """RuntimeError where shards that were taken over are not those of what the step then read; all are removed."""
    made = work.shards(config, inputs, path) if work.shards and work.listed and taken else taken
    if any(made.get(name) != piece for name, piece in taken.items()):
        for name in (FOLDER, LEDGER, wide.FOLDER):
            storage.remove(storage.join(path, name))
        raise RuntimeError("The corpus changed while it was read. Give the same command again.")


def look(work: Step, config: Any, inputs: Sequence[Artifact], path: str) -> tuple[Pieces, Mapping[str, Found]]:
    """The pieces of an artifact to be made at a path, none where there is no older one, and the shards that are there.

    Of several shards that are made of the same it is the one with the fewest rows that failed, the newest of equals.
    """
    wanted: Pieces = {}
    found: dict[str, Found] = {}
    for older, theirs in _older(work, path) if work.shards else ():
        if _choices(work, theirs) != _choices(work, config):
            continue
        assert work.shards is not None
        wanted = wanted or work.shards(config, inputs, None)
        left = [n for n, piece in wanted.items() if piece is not None and (n not in found or found[n].record[FAILED])]
        if not left:
            break
        with suppress(FileNotFoundError, KeyError, TypeError, ValueError):  # its inputs are gone, or it was cut early
            names = matching(wanted, work.shards(theirs, older.inputs, older.path), left)
            records = Ledger(older.path).complete()
            there = {name: Found(older, one, records[one]) for name, one in names.items() if one in records}
            found |= {
                n: one for n, one in there.items() if n not in found or one.record[FAILED] < found[n].record[FAILED]
            }
    return wanted, found


def _older(work: Step, path: str) -> Iterator[tuple[Artifact, Any]]:
    """The other artifacts of a step, finished or cut, with their configs; the newest first."""
    folder, own = path.rsplit("/", 1)
    urls = [storage.join(folder, name) for name in storage.list_names(folder) if name != own]
    begun = [one for one in ahead(Artifact.begun, urls, threads=8, depth=16) if one is not None]
    same = [one for one in begun if one.manifest.get("version") == work.version]
    for one in sorted(same, key=lambda one: one.manifest["started"], reverse=True):
        with suppress(TypeError, ValueError):  # a config of another time
            yield one, from_dict(work.config_class, one.manifest["config"])


def _choices(work: Step, config: Any) -> str:
    """What of a config shards depend on."""
    return json.dumps({name: value for name, value in to_dict(config).items() if name != work.listed}, sort_keys=True)
