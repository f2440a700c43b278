"""The rows of the split `test` that are first by sample id: those that are scored, drawn and shown."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import TypeVar

import numpy as np

from infra.data.first import first_rows
from infra.data.shards import ShardReader, joined_names
from infra.store import Artifact
from workflows.commands import say
from workflows.judge import TEST, TRAIN
from workflows.prompts import Prompt

KNOWN = ("reference_descriptive", "reference_short", "caption_alt")  # captions that a corpus comes with, the best first

Row = TypeVar("Row")


def first_held_out(
    images: Artifact, count: int, read: Callable[[str], Iterable[Row]], sample_id: Callable[[Row], str]
) -> list[Row]:
    """The first `count` by sample id of what `read` finds of the held-out rows of each shard."""
    return first_rows(images.path, "split", TEST, count, read, sample_id, images.records() or {})


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
