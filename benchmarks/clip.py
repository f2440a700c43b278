"""How well does a CLIP find the caption of a held-out picture among all of them, and the picture of a caption?

    python -m benchmarks.clip --model runs/train_clip/ID/model --images runs/ingest/ID

Texts are the rows' reference captions. A find is right where the text is equal, since some scenes occur twice. Prints
one JSON object: of each direction (`text_r`: a picture finds its text) the share of rows whose first find is right,
and one of whose first five is, with 95 % intervals by the bootstrap; and how many texts there are, and were cut.
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
from t2i.evaluate.alignment import retrieval
from workflows.held_out import first_held_out
from workflows.judge import TEST


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


def main(config: Config) -> None:
    """Embed, find, and print."""
    rows, clip = read_rows(config), Embedder(config.model)
    texts = [row[2] for row in rows]
    images = clip.embed_images([row[1] for row in rows]).numpy()
    found = retrieval(images, clip.embed_texts(texts).numpy(), texts, texts, ks=(1, 5))
    told = {name: {"share": each.value, "interval": each.interval} for name, each in found.items()}
    print(json.dumps({"rows": len(rows), "texts": len(set(texts)), "cut": sum(clip.cut(texts)), **told}, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Config))
