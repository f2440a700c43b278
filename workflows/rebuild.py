"""What tokenizers alone lose: real pictures of a yardstick through each and back, in one table."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from infra import storage
from infra.cluster import Cluster
from infra.config import from_dict
from infra.metrics import Report
from infra.store import Artifact, step
from t2i.evaluate import distances, intervals
from t2i.evaluate.intervals import Estimate
from t2i.evaluate.reconstruction import reconstruction_scores
from t2i.evaluate.yardstick import Measured, Yardstick, distances_of, table
from workflows.compare import parameters_of
from workflows.corpora.scoring import Corpus, Row, Scores, picture_scores
from workflows.evaluate import reconstruct
from workflows.real_pictures import kind_of, sets_of, test_pictures
from workflows.train_tokenizer import MODEL, rebuilds
from workflows.yardstick import TABLE, CalibrateConfig, Extract, calibrate, extract_by, features_of, yardstick_of

PICTURED = ("scene_score", "object_score", "skill_")  # scores of pictures that are told, as they begin


@dataclass(frozen=True, kw_only=True)
class RebuildConfig:
    """What the tokenizers are called in the table, in their order; else by their ids."""

    names: tuple[str, ...] = ()
    rows: int = 1000  # pictures of the test split, at most, where there is no yardstick

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"At least one picture is rebuilt, but rows is {self.rows}.")


@step(version=1)
def rebuild(
    config: RebuildConfig, yardstick: Artifact, *tokenizers: Artifact, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Write `table.json`: what is left of a yardstick's first set of real pictures after a tokenizer and back.

    In a yardstick's place may stand the index of a corpus that has none: then pictures are of its test split, and there
    are no distances.

    A line for the pictures themselves, and one for each tokenizer. `fid` and its like are from the second set, as those
    of drawn pictures are: the best that a prior of this tokenizer can reach. `rfid` is from the very pictures that were
    rebuilt, as papers have it. Then `psnr`, `ssim`, of codes `code_usage` and `code_perplexity`, of Shapes what can
    still be read (`scene_score`, `skill_...`), `values` a picture, `codes`, `parameters`, and what training took.
    """
    if not tokenizers or (config.names and len(config.names) != len(tokenizers)):
        raise ValueError(f"Rebuilt is by at least one tokenizer: {len(tokenizers)}, named {config.names}.")
    if still := [each.path for each in tokenizers if not rebuilds(each)]:
        raise ValueError(
            f"{still[0]} rebuilds nothing: pixels are what they are, and a CLIP has no way back. Leave it out."
        )
    by = _By(yardstick_of(yardstick), extract_by(yardstick), features_of(yardstick)) if measures(yardstick) else None
    images = yardstick.inputs[0] if by else yardstick
    pictures, rows = _pictures(yardstick, images, config.rows)
    corpus: Corpus = "shapes" if kind_of(images) == "shapes" else "words"
    measured, told = list[Measured](), [seen(corpus, rows, pictures)]
    names = config.names or tuple(f"{each.step} {each.id}" for each in tokenizers)
    for number, (name, tokenizer) in enumerate(zip(names, tokenizers, strict=True)):
        began = time.perf_counter()
        rebuilt, codes = reconstruct(tokenizer, pictures)
        speed = {"pictures_per_second": len(pictures) / (time.perf_counter() - began)}
        if by:
            measured.append(by.measured(name, rebuilt))
        sizes = sizes_of(tokenizer, pictures[0].shape[:2]) | costs_of(tokenizer) | speed
        told.append(reconstruction_scores(pictures, rebuilt) | codes | seen(corpus, rows, rebuilt) | sizes)
        report(number + 1, len(tokenizers), "tokenizers")
    plain = [{"name": name, "n": len(pictures)} for name in ("real pictures", *names)]
    lines = [line | beside for line, beside in zip(table(measured) if by else plain, told, strict=True)]
    storage.write_json(storage.join(out, TABLE), lines)
    return {"tokenizers": len(tokenizers), "table": lines}


def _pictures(yardstick: Artifact, images: Artifact, most: int) -> tuple[list[np.ndarray], list[Row]]:
    """The first set of a yardstick, or pictures of the test split, and what is known of them."""
    if yardstick is images:
        pictures = test_pictures(images, most)
        if not pictures:
            raise ValueError(f"{images.path} holds no picture of the test split to rebuild.")
        return pictures, [{"scene": None}] * len(pictures)
    calibrated = from_dict(CalibrateConfig, yardstick.manifest["config"])
    real, _ = sets_of(images, calibrated.rows, calibrated.seed)
    return [each.pixels for each in real], [{"scene": None, **each.line} for each in real]


class _By(NamedTuple):
    """A yardstick, read once for all tokenizers."""

    yardstick: Yardstick
    extract: Extract
    features: dict[str, np.ndarray]

    def measured(self, name: str, rebuilt: Sequence[np.ndarray]) -> Measured:
        """The distances of what a tokenizer rebuilt."""
        found = self.extract(rebuilt)
        scores = distances_of(self.features["second"], found) | {"rfid": rfid(self.features["first"], found)}
        return Measured(name=name, yardstick=self.yardstick, scores=scores)


def measures(given: Artifact) -> bool:
    """Whether it is a yardstick, and no index."""
    return given.step == calibrate.name


def costs_of(tokenizer: Artifact) -> dict[str, float]:
    """What its training took: FLOPs, rows, seconds and the memory of a process, as far as its manifest says."""
    summary, manifest = tokenizer.summary, tokenizer.manifest
    train = manifest["config"].get("train") or {}
    rows = {"trained_rows": summary["steps"] * train["batch"]} if train and "steps" in summary else {}
    told = {"training_flops": summary.get("training_flops"), "training_seconds": manifest.get("seconds")}
    told |= {"training_cpu_seconds": manifest.get("cpu_seconds"), "peak_memory_gb": manifest.get("peak_memory_gb")}
    return rows | {name: value for name, value in told.items() if value is not None}


def rfid(features: np.ndarray, rebuilt: np.ndarray) -> Estimate:
    """FID of rebuilt pictures from these very ones, features (N, D): each is drawn with what became of it."""
    real, found = np.asarray(features, np.float64), np.asarray(rebuilt, np.float64)

    def of(drawn: np.ndarray) -> float:
        return distances.frechet_distance(real[drawn], found[drawn])

    return intervals.of_sets(of, np.arange(len(real)))


def seen(corpus: Corpus, rows: Sequence[Row], pictures: Sequence[np.ndarray]) -> Scores:
    """What can be read of pictures, where they are of Shapes."""
    scores = picture_scores(corpus, rows, pictures).scores
    return {name: value for name, value in scores.items() if name.startswith(PICTURED)}


def sizes_of(tokenizer: Artifact, size: tuple[int, int]) -> dict[str, int]:
    """`values` of a picture of `size` (height, width), how many `codes` there are (0: latents), and `parameters`."""
    from t2i.tokenizers.task import load_tokenizer

    space = load_tokenizer(tokenizer.url(MODEL)).space(size)
    return {"values": space.places, "codes": space.codes, "parameters": parameters_of(tokenizer)}
