"""The rows of the split `test` that are first by sample id, out of those shards alone that may hold one of them."""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import TypeVar

import numpy as np

from infra.data.ahead import ahead
from infra.data.shards import ShardReader, joined_names, shard_names
from infra.store import Artifact
from workflows.commands import say
from workflows.judge import TEST, TRAIN
from workflows.prompts import Prompt

AT_ONCE = 8  # shards that are read
KNOWN = ("reference_descriptive", "reference_short", "caption_alt")  # captions that a corpus comes with, the best first

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


def prompts_of(mixture: Artifact, count: int) -> list[Prompt]:
    """Captions of held-out rows: references and alt texts, else those that were written anew.

    Where no row is held out, as in a small corpus may be, those of training rows, which is told.
    """
    images, captions = mixture.inputs[:2]
    written = [f"caption_{style}" for style in sorted(mixture.manifest["config"]["weights"])]
    if rows := held_out(images, count) or held_out(images, count, written, [captions]):
        return rows
    names = [*KNOWN, *written]
    every = (_read(shard, TRAIN, names, [images, captions]) for shard in joined_names([images.path]))
    if not (rows := list(islice(chain.from_iterable(every), count))):
        raise ValueError(f"No row of {images.path} has a caption to draw a picture for. Give prompts of your own.")
    say("No held-out row has a caption, so the prompts are those of training rows.")
    return rows


def held_out(
    images: Artifact, count: int, names: Sequence[str] = KNOWN, beside: Sequence[Artifact] = ()
) -> list[Prompt]:
    """The first test rows by sample id, a fair and fixed draw, each by the first of some columns that has a caption."""
    read = partial(_read, split=TEST, names=names, inputs=[images, *beside])
    return first_held_out(images, count, read, lambda prompt: prompt.sample_id or "")


def _read(shard: str, split: str, names: Sequence[str], inputs: Sequence[Artifact]) -> Iterator[Prompt]:
    """The prompts of a shard's rows; their places are among the rows that the first of the artifacts accepted."""
    columns = ShardReader([each.path for each in inputs], shard).columns(["sample_id", "split", "scene", *names])
    ids = columns["sample_id"]
    own = ShardReader([inputs[0].path], shard).columns(["sample_id"])["sample_id"] if len(inputs) > 1 else ids
    place = {sample_id: row for row, sample_id in enumerate(own)}
    for row in np.flatnonzero(columns["split"] == split):
        if text := next((columns[name][row] for name in names if columns[name][row]), None):
            yield Prompt(text, columns["scene"][row], ids[row], (shard, place[ids[row]]))
