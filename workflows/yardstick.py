"""The yardstick of a corpus: an extractor trained on it, two sets of real pictures, and what is measured by these.

FID and its like compare what a model draws for the prompts of the first set with the second set, and stand beside what
the first set is from the second.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np

from infra import storage, strict
from infra.cluster import Cluster
from infra.config import from_dict, setting
from infra.data.images import decode
from infra.metrics import Report
from infra.store import Artifact, Plan, Store, step
from infra.train.fit import Training, fit
from infra.train.loop import TrainConfig, Trained
from infra.train.optim import OptimConfig
from t2i.evaluate.extractor import ExtractorConfig
from t2i.evaluate.facts import vocabulary
from t2i.evaluate.intervals import Estimate
from t2i.evaluate.task import ExtractorTask, load_extractor
from t2i.evaluate.yardstick import Measured, Yardstick, distances_of, table
from workflows.clips import key_of, weights_of
from workflows.evaluate import read_samples
from workflows.ingest import IngestConfig, ingest
from workflows.judge import TRAIN
from workflows.real_pictures import NO_SCENES, kind_of, rows_of, sets_of
from workflows.recipes import demo
from workflows.splits import demand_rows
from workflows.train_tokenizer import MODEL, losses_of, taken_of

FEATURES, PROMPTS, TABLE = "features.npz", "prompts.jsonl", "table.json"
SETS = ("first", "second")

Extract = Callable[[Sequence[np.ndarray]], np.ndarray]
"""(H, W, 3) uint8 pictures of any sizes to features (N, D)."""


def clip_features(folder: str) -> Extract:
    """What a CLIP sees, by its folder or a hub's name."""
    from t2i.clip.embedder import Embedder  # brings transformers

    return Embedder(folder).features


EXTRACTORS: dict[str, Callable[[str], Extract]] = {  # by the step that trained what is loaded from a folder
    "train_extractor": lambda folder: load_extractor(folder).extract,
    "train_clip": clip_features,
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
    scenes = [row.scene for row in rows_of(images, TRAIN)]
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
    clip: str = setting("", since="0.2")  # in an extractor's place: a CLIP, by a folder or a hub's name

    def __post_init__(self) -> None:
        if self.rows < 10:
            raise ValueError(f"rows is {self.rows}; a set of real pictures has at least 10.")


@step(version=1, key=lambda config: key_of(config.clip))
def calibrate(
    config: CalibrateConfig,
    images: Artifact,
    extractor: Artifact | None = None,
    *,
    out: str,
    cluster: Cluster,
    report: Report,
) -> dict[str, Any]:
    """Write the features of two sets of real pictures, and the prompts of the first, a line of `prompts.jsonl` each.

    Of Shapes no scene is one of training, by its hash, and none comes twice. Other corpora give pictures of their test
    split, one of each scene, to one set or the other by the scene's hash; both sets are as large as the smaller one.
    The extractor is one of these pictures, or a CLIP: what `train_clip` made, or a published one that is named.
    """
    if (extractor is None) != bool(config.clip):
        raise ValueError("Say by what is measured: an extractor, which may be what train_clip made, or a CLIP by name.")
    extract = _extract(config, extractor)
    sets = sets_of(images, config.rows, config.seed)
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
    by = f"{extractor.step} {extractor.id}" if extractor else f"clip {(key_of(config.clip) or config.clip)[:64]}"
    named = {"corpus": corpus_of(images), "extractor": by}
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
    extract = extract_by(yardstick)
    lines = storage.read_bytes(yardstick.url(PROMPTS)).decode().splitlines()
    wanted = Counter(json.loads(line)["prompt"] for line in lines)
    real = features_of(yardstick)["second"]
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
    named = {name: said[name] for name in ("corpus", "extractor", "rows")}
    return Yardstick(**named, real=real, yardstick=f"{calibrated.step}/{calibrated.id}")


def extract_by(calibrated: Artifact) -> Extract:
    """What sees the pictures that a yardstick measures; ValueError where it is no longer what it was."""
    config, extractor = from_dict(CalibrateConfig, calibrated.manifest["config"]), calibrated.inputs[1:]
    if config.clip and key_of(config.clip) != calibrated.manifest["key"]:
        raise ValueError(
            f"{calibrated.path} measures by the CLIP at {config.clip}, which is not there or has changed: distances by "
            "another say nothing beside its own. Calibrate again."
        )
    return _extract(config, extractor[0] if extractor else None)


def features_of(calibrated: Artifact) -> dict[str, np.ndarray]:
    """(N, D) of each of its sets, by name."""
    return dict(np.load(BytesIO(storage.read_bytes(calibrated.url(FEATURES)))))


def corpus_of(images: Artifact) -> str:
    """Whose pictures an index holds, as a yardstick names it: its kind, and the index's id."""
    return f"{kind_of(images)} {images.id}"


def extractor_of(trained: Artifact) -> Extract:
    """The function from pictures to features of an artifact; ValueError for one that is no extractor."""
    if trained.step not in EXTRACTORS:
        raise ValueError(f"{trained.path} sees no features: an extractor is made by {' or '.join(EXTRACTORS)}.")
    return EXTRACTORS[trained.step](trained.url(MODEL))


def _extract(config: CalibrateConfig, extractor: Artifact | None) -> Extract:
    return extractor_of(extractor) if extractor else clip_features(weights_of(config.clip))


@dataclass(frozen=True, kw_only=True)
class YardstickRecipe:
    """Every choice that changes a yardstick. All of them are fixed, seed 0, or distances would say nothing.

    In an extractor's place may stand the path of one, or of what `train_clip` made; with `sets.clip` there is none.
    """

    name: str
    corpus: IngestConfig
    extractor: TrainExtractorConfig | str = setting(was=TrainExtractorConfig)
    sets: CalibrateConfig

    def __post_init__(self) -> None:
        if self.corpus.labels == "emoji":
            raise ValueError(NO_SCENES)

    def run(self, store: Store | Plan) -> Artifact:
        """Make the yardstick, or find it; returns what `measure` takes."""
        images = store.step(ingest, self.corpus)
        extractor = None if self.sets.clip else store.step(train_extractor, self.extractor, images)
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
