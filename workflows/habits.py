"""What the captions of a whole corpus have in common, and what is wrong with them: read shard by shard."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from captioner.collapse import Collapse
from captioner.faults import Faults
from captioner.task import ALT_COLUMN
from infra.data.ahead import ahead
from infra.data.shards import ShardReader, joined_names
from infra.store import Artifact

CAPTION, FLAG, TRIES = "caption_", "flag_", "tries_"


@dataclass(frozen=True, kw_only=True)
class Habits:
    """`Collapse.report` of the alt text and each style, `Faults.report` of each style with flags; in their order."""

    collapse: dict[str, dict[str, Any]]
    faults: dict[str, dict[str, Any]]


def habits(images: Artifact, captions: Artifact) -> Habits:
    """Read every caption of the rows that both artifacts accepted, once.

    Memory holds the texts of a few shards, counters of one size for each style, and a few numbers of each shard. One
    process does it, at some 10,000 captions a second.
    """
    inputs = [images.path, captions.path]
    names = joined_names(inputs)
    collapse: dict[str, Collapse] = {}
    faults: dict[str, Faults] = {}

    def read(name: str) -> dict[str, list]:
        reader = ShardReader(inputs, name)
        wanted = sorted(column for column in reader.names if column.startswith((CAPTION, FLAG, TRIES)))
        return reader.stored(wanted, np.arange(len(reader)))

    # An `ahead` of threads, because a corpus in a bucket is read at the speed of its answers.
    for name, columns in zip(names, ahead(read, names, threads=2, depth=4), strict=True):
        for column, values in columns.items():
            kind, _, style = column.partition("_")
            if f"{kind}_" == CAPTION:
                collapse.setdefault(style, Collapse()).add(values)
            elif f"{kind}_" == FLAG:
                faults.setdefault(style, Faults()).add(name, values, columns.get(f"{TRIES}{style}"))
    order = _order(captions, list(collapse))
    return Habits(
        collapse={style: collapse[style].report() for style in order},
        faults={style: faults[style].report() for style in order if style in faults},
    )


def _order(captions: Artifact, styles: list[str]) -> list[str]:
    """The alt text first, then the styles in the order that they were asked for."""
    asked = [ALT_COLUMN.removeprefix(CAPTION), *(style["name"] for style in captions.summary.get("styles", ()))]
    return sorted(styles, key=lambda style: (asked.index(style) if style in asked else len(asked), style))
