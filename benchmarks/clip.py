"""How well does a CLIP find the caption of a held-out picture among all of them, and the picture of a caption?

    python -m benchmarks.clip --model runs/train_clip/ID/model --images runs/ingest/ID

Texts are the rows' reference captions. A find is right where the text is equal, since some scenes occur twice. Prints
one JSON object: of each direction the share of rows whose first find is right, and one of whose first five is, with
95 % intervals by the bootstrap (1,000 resamples) over texts, each drawn with all its rows; and how many texts there
are, and were cut.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro

from infra.data.shards import ShardReader
from infra.store import Artifact
from t2i.clip.embedder import Embedder
from workflows.held_out import first_held_out
from workflows.judge import TEST

RESAMPLES = 1000


@dataclass(frozen=True)
class Config:
    """What is measured, on which rows."""

    model: str  # a folder or a hub's name
    images: str  # an artifact of ingest
    column: str = "reference_descriptive"
    rows: int = 1000  # held-out ones, the first by sample id


def read_rows(config: Config) -> list[tuple[str, np.ndarray, str]]:
    """Sample id, picture and caption."""
    names = ("sample_id", "pixels", config.column)

    def read(shard: str) -> Iterator[tuple[Any, ...]]:
        reader = ShardReader([config.images], shard)
        columns = reader.rows(names, np.flatnonzero(reader.columns(["split"])["split"] == TEST))
        return zip(*(columns[name] for name in names), strict=True)

    return first_held_out(Artifact.open(config.images), config.rows, read, lambda row: row[0])


def recall(scores: np.ndarray, kinds: np.ndarray, first: int) -> np.ndarray:
    """Of each row, whether a text of its own kind is among the `first` that it likes best."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :first]
    return (kinds[best] == kinds[:, None]).any(axis=1)


def told(right: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """The share, and its interval."""
    rng, members = np.random.default_rng(0), [right[kinds == kind] for kind in np.unique(kinds)]
    drawn = (rng.integers(len(members), size=len(members)) for _ in range(RESAMPLES))
    means = [np.concatenate([members[number] for number in numbers]).mean() for numbers in drawn]
    low, high = np.percentile(means, (2.5, 97.5))
    return {"share": float(right.mean()), "low": float(low), "high": float(high)}


def main(config: Config) -> None:
    """Embed, find, and print."""
    rows, clip = read_rows(config), Embedder(config.model)
    texts = [row[2] for row in rows]
    kinds = np.unique(texts, return_inverse=True)[1]
    cosines = (clip.embed_images([row[1] for row in rows]) @ clip.embed_texts(texts).T).numpy()
    result: dict[str, Any] = {"rows": len(rows), "texts": int(kinds.max()) + 1, "cut": sum(clip.cut(texts))}
    for name, scores in (("text_of_picture", cosines), ("picture_of_text", cosines.T)):
        result |= {f"{name}_at_{first}": told(recall(scores, kinds, first), kinds) for first in (1, 5)}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Config))
