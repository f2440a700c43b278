"""How well does a CLIP find the caption of a held-out picture among all of them, and the picture of a caption?

    python -m benchmarks.clip --model runs/train_clip/ID/model --images runs/ingest/ID

Texts are the rows' reference captions. A find is right where the text is equal, since some scenes occur twice. Prints
one JSON object: of each direction the share of rows whose first find is right, and one of whose first five is, with
95 % intervals by the bootstrap over rows (1,000 resamples), and how many captions were cut.
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


def recall(scores: np.ndarray, texts: list[str], first: int) -> np.ndarray:
    """Of each row, whether its own text is among the `first` that it likes best."""
    kinds = np.unique(texts, return_inverse=True)[1]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :first]
    return (kinds[best] == kinds[:, None]).any(axis=1)


def told(right: np.ndarray) -> dict[str, float]:
    """The share, and its interval."""
    rng = np.random.default_rng(0)
    means = [right[rng.integers(len(right), size=len(right))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return {"share": float(right.mean()), "low": float(low), "high": float(high)}


def main(config: Config) -> None:
    """Embed, find, and print."""
    rows, clip = read_rows(config), Embedder(config.model)
    texts = [row[2] for row in rows]
    cosines = (clip.embed_images([row[1] for row in rows]) @ clip.embed_texts(texts).T).numpy()
    result: dict[str, Any] = {"rows": len(rows), "cut": sum(clip.cut(texts))}
    for name, scores in (("text_of_picture", cosines), ("picture_of_text", cosines.T)):
        result |= {f"{name}_at_{first}": told(recall(scores, texts, first)) for first in (1, 5)}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Config))
