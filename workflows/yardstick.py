"""The yardstick of a corpus: an extractor trained on it, two sets of real pictures, and what is measured by these.

FID and its like compare what a model draws for the prompts of the first set with the second set, and stand beside what
the first set is from the second.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from infra import storage, strict
from infra.cluster import Cluster
from infra.config import fingerprint, from_dict
from infra.data.images import decode
from infra.data.shards import ShardReader, joined_names
from infra.metrics import Report
from infra.store import Artifact, Plan, Store, step
from infra.train.fit import Training, fit
from infra.train.loop import TrainConfig, Trained
from infra.train.optim import OptimConfig
from t2i.evaluate.extractor import ExtractorConfig
from t2i.evaluate.facts import vocabulary
from t2i.evaluate.intervals import Estimate
from t2i.evaluate.scenes import Scene, describe
from t2i.evaluate.skills import metadata
from t2i.evaluate.task import ExtractorTask, load_extractor
from t2i.evaluate.yardstick import Measured, Yardstick, distances_of, table
from workflows.corpora.prompts import held_out_scenes
from workflows.corpora.shapes import ShapesConfig, render
from workflows.evaluate import read_samples
from workflows.ingest import IngestConfig, ingest
from workflows.judge import TEST, TRAIN
from workflows.recipes import demo
from workflows.splits import demand_rows
from workflows.train_tokenizer import MODEL, losses_of, taken_of

FEATURES, PROMPTS, TABLE = "features.npz", "prompts.jsonl", "table.json"
SETS = ("first", "second")
TRIES = 400  # scenes that are drawn for each of a set, at most

Extract = Callable[[Sequence[np.ndarray]], np.ndarray]
"""(H, W, 3) uint8 pictures of any sizes to features (N, D)."""

EXTRACTORS: dict[str, Callable[[str], Extract]] = {  # by the step that trained what is loaded from a folder
    "train_extractor": lambda folder: load_extractor(folder).extract,
}


@dataclass(frozen=True, kw_only=True)
class TrainExtractorConfig:
    """Which extractor, and how long it learns to see the facts of scenes."""

    model: ExtractorConfig = field(default_factory=ExtractorConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=400, batch=128))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3, warmup_steps=20))
    seed: int = 0  # of the first weights

    @property
    def trainings(self) -> list[Trained]:
        """The extractor's."""
        return [Trained(self.train, {"extractor": self.optim})]


@step(version=1)
def train_extractor(
    config: TrainExtractorConfig, images: Artifact, *, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Train the extractor of a corpus on those of its training rows whose scenes are known."""
    demand_rows(images)
    scenes = [row.scene for row in _rows(images, TRAIN)]
    if not scenes:
        raise ValueError(
            f"No training row of {images.path} has a scene, so nothing says what its pictures show: emoji, and "
            "pictures of one's own, have no FID by this yardstick."
        )
    known = vocabulary(scenes)
    task = ExtractorTask(model=config.model, facts=known, optim=config.optim, seed=config.seed)
    figures = fit([Training(task, [images.path], config.train, out)], cluster, report)
    return {
        "steps": figures["step"],
        "rows": figures["rows"],
        "facts": len(known),
        **losses_of(figures),
        **taken_of(figures),
    }


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """How many real pictures each of the two sets has, at most; those of Shapes are rendered by a seed of their own."""

    rows: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 10:
            raise ValueError(f"rows is {self.rows}; a set of real pictures has at least 10.")


@step(version=1)
def calibrate(
    config: CalibrateConfig, images: Artifact, extractor: Artifact, *, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Write the features of two sets of real pictures, and the prompts of the first, a line of `prompts.jsonl` each.

    Of Shapes no scene is one of training, by its hash, and none comes twice. Other corpora give pictures of their test
    split, one of each scene, to one set or the other by the scene's hash; both sets are as large as the smaller one.
    """
    extract = extractor_of(extractor)
    shapes = _shapes(images)
    sets = _rendered(config, shapes) if shapes else _held_out(config, images)
    seen = {}
    for number, (name, pictures) in enumerate(zip(SETS, sets, strict=True)):
        seen[name] = extract([picture.pixels for picture in pictures])
        report(number + 1, len(SETS), "sets")
    lines = "".join(strict.dumps(picture.line) + "\n" for picture in sets[0])
    storage.write_bytes(storage.join(out, PROMPTS), lines.encode())
    buffer = BytesIO()
    np.savez(buffer, **seen)
    storage.write_bytes(storage.join(out, FEATURES), buffer.getvalue())
    real = distances_of(seen["second"], seen["first"])
    named = {"corpus": corpus_of(images), "extractor": f"{extractor.step} {extractor.id}"}
    return {**named, "rows": len(sets[0]), "real": {name: list(each) for name, each in real.items()}}


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What the models are called in the table, in the order of their pictures; else by the ids of these."""

    names: tuple[str, ...] = ()


@step(version=1)
def measure(
    config: MeasureConfig, yardstick: Artifact, *samples: Artifact, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Write `table.json`: distances of what models drew for the prompts of the first set from the second set.

    ValueError where pictures are of other prompts.
    """
    if not samples or (config.names and len(config.names) != len(samples)):
        raise ValueError(f"Measured are the pictures of at least one model: {len(samples)}, named {config.names}.")
    extract = extractor_of(yardstick.inputs[1])
    lines = storage.read_bytes(yardstick.url(PROMPTS)).decode().splitlines()
    wanted = Counter(json.loads(line)["prompt"] for line in lines)
    real = np.load(BytesIO(storage.read_bytes(yardstick.url(FEATURES))))["second"]
    measured = []
    for number, made in enumerate(samples):
        drawn = list(read_samples(made))
        if Counter(one["prompt"] for one in drawn) != wanted:
            raise ValueError(
                f"{made.path} holds {len(drawn)} pictures of other prompts than the {wanted.total()} of "
                f"{yardstick.url(PROMPTS)}, which a distance is of: sample those."
            )
        features = extract([decode(one["image"]) for one in drawn])
        name = config.names[number] if config.names else f"{made.step} {made.id}"
        measured.append(Measured(name=name, yardstick=yardstick_of(yardstick), scores=distances_of(real, features)))
        report(number + 1, len(samples), "models")
    lines = table(measured)
    storage.write_json(storage.join(out, TABLE), lines)
    return {"models": len(samples), "table": lines}


def yardstick_of(calibrated: Artifact) -> Yardstick:
    """What a `calibrate` artifact says of itself, for tables."""
    said = calibrated.summary
    real = {name: Estimate(value, (low, high), n) for name, (value, (low, high), n) in said["real"].items()}
    return Yardstick(corpus=said["corpus"], extractor=said["extractor"], rows=said["rows"], real=real)


def corpus_of(images: Artifact) -> str:
    """Whose pictures an index holds, as a yardstick names it: its kind, and the index's id."""
    return f"{_kind(images)} {images.id}"


def extractor_of(trained: Artifact) -> Extract:
    """The function from pictures to features of an artifact; ValueError for one that is no extractor."""
    if trained.step not in EXTRACTORS:
        raise ValueError(f"{trained.path} sees no features: an extractor is made by {' or '.join(EXTRACTORS)}.")
    return EXTRACTORS[trained.step](trained.url(MODEL))


@dataclass(frozen=True, kw_only=True)
class YardstickRecipe:
    """Every choice that changes a yardstick. All of them are fixed, seed 0, or distances would say nothing."""

    name: str
    corpus: IngestConfig
    extractor: TrainExtractorConfig
    sets: CalibrateConfig

    def __post_init__(self) -> None:
        if self.corpus.labels == "emoji":
            raise ValueError("Emoji have no FID: each is a kind of its own, and nothing says what it shows.")

    def run(self, store: Store | Plan) -> Artifact:
        """Make the yardstick, or find it; returns what `measure` takes."""
        images = store.step(ingest, self.corpus)
        extractor = store.step(train_extractor, self.extractor, images)
        return store.step(calibrate, self.sets, images, extractor)


def yardstick() -> YardstickRecipe:
    """That of Shapes as the demo has it."""
    return yardstick_for(demo().corpus)


def yardstick_for(corpus: IngestConfig) -> YardstickRecipe:
    """That of any corpus whose scenes are known; its extractor sees pictures of the corpus's size."""
    if not corpus.image_size:
        raise ValueError("A yardstick looks at pictures of one size: give corpus.image_size, such as 32 32.")
    model = ExtractorConfig(size=corpus.image_size)
    return YardstickRecipe(
        name="yardstick", corpus=corpus, extractor=TrainExtractorConfig(model=model), sets=CalibrateConfig()
    )


class _Picture(NamedTuple):
    """A real picture, and the line of `prompts.jsonl` that asks for its like."""

    pixels: np.ndarray
    line: dict[str, Any]


class _Row(NamedTuple):
    """A row whose scene is known: JSON, its longest caption, and where it lies."""

    scene: str
    prompt: str | None
    shard: str
    place: int


def _rows(images: Artifact, split: str) -> Iterator[_Row]:
    for shard in joined_names([images.path]):
        columns = ShardReader([images.path], shard).columns(["split", "scene", "reference_descriptive"])
        for place in np.flatnonzero(columns["split"] == split):
            if scene := columns["scene"][place]:
                yield _Row(scene, columns["reference_descriptive"][place], shard, int(place))


def _shapes(images: Artifact) -> ShapesConfig | None:
    corpus = from_dict(IngestConfig, images.manifest["config"]).corpus
    return corpus if isinstance(corpus, ShapesConfig) else None


def _kind(images: Artifact) -> str:
    return "shapes" if _shapes(images) else images.manifest["config"]["labels"].replace("json", "own")


def _rendered(config: CalibrateConfig, shapes: ShapesConfig) -> list[list[_Picture]]:
    rng = np.random.default_rng([config.seed, 2**32])  # no row of a corpus is drawn from such a seed
    return [
        [_Picture(render(scene, shapes.size, rng, shapes.jitter), _line(scene)) for scene in scenes]
        for scenes in two_sets(shapes, config.rows, rng)
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


def _held_out(config: CalibrateConfig, images: Artifact) -> list[list[_Picture]]:
    """Pictures of test rows that have a caption, the first of each scene, by the hash of the scene.

    Some scenes of a published test split may be in training, too; these are left out.
    """
    first, shown = dict[str, _Row](), {row.scene for row in _rows(images, TRAIN)}
    for row in _rows(images, TEST):
        if row.prompt and row.scene not in shown:
            first.setdefault(fingerprint(["yardstick", row.scene]), row)
    sides = [[first[each] for each in sorted(first) if int(each[-1], 16) % 2 == side] for side in (0, 1)]
    rows = min(config.rows, *map(len, sides))
    if rows < 10:
        raise ValueError(
            f"The test split of {images.path} has {len(first)} scenes with a caption, too few for two sets of pictures."
        )
    return [_pictures(images, side[:rows]) for side in sides]


def _pictures(images: Artifact, rows: Sequence[_Row]) -> list[_Picture]:
    """Those of some rows, in their order; each shard is opened once."""
    found: dict[_Row, np.ndarray] = {}
    for shard in sorted({row.shard for row in rows}):
        here = [row for row in rows if row.shard == shard]
        pixels = ShardReader([images.path], shard).rows(["pixels"], [row.place for row in here])["pixels"]
        found |= dict(zip(here, pixels, strict=True))
    return [_Picture(found[row], {"prompt": row.prompt}) for row in rows]
