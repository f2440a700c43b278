"""Two sets of real pictures of a corpus that no training has seen: rendered anew of Shapes, else of the test split."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from infra import strict
from infra.config import fingerprint, from_dict
from infra.data.shards import ShardReader, joined_names
from infra.store import Artifact
from t2i.evaluate.scenes import Scene, describe
from t2i.evaluate.skills import metadata
from workflows.corpora.prompts import held_out_scenes
from workflows.corpora.shapes import ShapesConfig, render
from workflows.ingest import IngestConfig
from workflows.judge import TEST, TRAIN

NO_SCENES = "Emoji have no FID: each is a kind of its own, and nothing says what it shows."
TRIES = 400  # scenes that are drawn for each of a set, at most


class Picture(NamedTuple):
    """A real picture, and the line of `prompts.jsonl` that asks for its like."""

    pixels: np.ndarray
    line: dict[str, Any]


class KnownRow(NamedTuple):
    """A row whose scene is known: JSON, its longest caption, and where it lies."""

    scene: str
    prompt: str | None
    shard: str
    place: int


def rows_of(images: Artifact, split: str) -> Iterator[KnownRow]:
    """The rows of a split whose scenes are known."""
    for shard in joined_names([images.path]):
        columns = ShardReader([images.path], shard).columns(["split", "scene", "reference_descriptive"])
        for place in np.flatnonzero(columns["split"] == split):
            if scene := columns["scene"][place]:
                yield KnownRow(scene, columns["reference_descriptive"][place], shard, int(place))


def shapes_of(images: Artifact) -> ShapesConfig | None:
    """The config of Shapes, where an index is of these."""
    corpus = from_dict(IngestConfig, images.manifest["config"]).corpus
    return corpus if isinstance(corpus, ShapesConfig) else None


def kind_of(images: Artifact) -> str:
    """Of which kind a corpus is: Shapes, one that was published, or one's own."""
    return "shapes" if shapes_of(images) else images.manifest["config"]["labels"].replace("json", "own")


def sets_of(images: Artifact, rows: int, seed: int) -> list[list[Picture]]:
    """The two sets of real pictures, always the same ones."""
    shapes = shapes_of(images)
    return _rendered(shapes, rows, seed) if shapes else _held_out(images, rows)


def test_pictures(images: Artifact, most: int) -> list[np.ndarray]:
    """Pixels of the first rows of the test split."""
    found: list[np.ndarray] = []
    for shard in joined_names([images.path]):
        reader = ShardReader([images.path], shard)
        places = np.flatnonzero(reader.columns(["split"])["split"] == TEST)[: most - len(found)]
        found += reader.rows(["pixels"], places.tolist())["pixels"] if len(places) else []
        if len(found) == most:
            break
    return found


def _rendered(shapes: ShapesConfig, rows: int, seed: int) -> list[list[Picture]]:
    rng = np.random.default_rng([seed, 2**32])  # no row of a corpus is drawn from such a seed
    return [
        [Picture(render(scene, shapes.size, rng, shapes.jitter), _line(scene)) for scene in scenes]
        for scenes in two_sets(shapes, rows, rng)
    ]


def two_sets(shapes: ShapesConfig, rows: int, rng: np.random.Generator) -> tuple[list[Scene], list[Scene]]:
    """Two times `rows` distinct scenes that are held out; ValueError where there are not as many."""
    found = dict[Scene, None]()
    for scene in islice(held_out_scenes(shapes, rng), TRIES * rows):
        found[scene] = None
        if len(found) == 2 * rows:
            break
    else:
        raise ValueError(
            f"Two sets of {rows} scenes that are held out were wanted, but only {len(found)} were found: give the "
            "corpus more max_objects or a larger test_fraction, or the sets fewer rows."
        )
    # Scenes of one object are few, and soon all found: as they come, the first set would have nearly all of them.
    scenes = list(found)
    mixed = [scenes[number] for number in rng.permutation(len(scenes))]
    return mixed[:rows], mixed[rows:]


def _line(scene: Scene) -> dict[str, Any]:
    return metadata(describe(scene), scene) | {"scene": strict.dumps(scene.to_dict())}


def _held_out(images: Artifact, most: int) -> list[list[Picture]]:
    """Pictures of test rows that have a caption, the first of each scene, by the hash of the scene.

    Some scenes of a published test split may be in training, too; these are left out.
    """
    first, shown = dict[str, KnownRow](), {row.scene for row in rows_of(images, TRAIN)}
    for row in rows_of(images, TEST):
        if row.prompt and row.scene not in shown:
            first.setdefault(fingerprint(["yardstick", row.scene]), row)
    sides = [[first[each] for each in sorted(first) if int(each[-1], 16) % 2 == side] for side in (0, 1)]
    rows = min(most, *map(len, sides))
    if kind_of(images) == "emoji":
        raise ValueError(NO_SCENES)
    if rows < 10:
        raise ValueError(
            f"The test split of {images.path} has {len(first)} scenes with a caption, too few for two sets of pictures."
        )
    return [_pictures(images, side[:rows]) for side in sides]


def _pictures(images: Artifact, rows: Sequence[KnownRow]) -> list[Picture]:
    """Those of some rows, in their order; each shard is opened once."""
    found: dict[KnownRow, np.ndarray] = {}
    for shard in sorted({row.shard for row in rows}):
        here = [row for row in rows if row.shard == shard]
        pixels = ShardReader([images.path], shard).rows(["pixels"], [row.place for row in here])["pixels"]
        found |= dict(zip(here, pixels, strict=True))
    return [Picture(found[row], {"prompt": row.prompt}) for row in rows]
