"""Does the match score tell right alt texts from wrong ones? Trains on Shapes in one process, and measures.

    python -m benchmarks.matching --steps 600 --matching.hard 0
    python -m benchmarks.matching --matching.contrastive 0 --matching.match 0 --steps 800 --filter_steps 1500
    python -m benchmarks.matching --base STORE/train_captioner/ID/base/model --filter_steps 1500 --seed 2

The first trains a base with matching losses, the second a plain base and then a filter (`captioner.capfilt`), the third
only the filter: its base must have been trained on Shapes of the same seed, size and test fraction.

Prints one JSON object. An alt text is right if all that it says of its picture is true, and it says something; by the
scene that the picture was drawn from. A wrong one says nothing (a file name), or is mostly wrong (fewer than 0.6 of its
facts are true: as a rule another picture's), or partly. Scored are rows whose scenes occur in no training row.
"""

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import tyro
from PIL import Image

from captioner.altered import Alternatives
from captioner.capfilt import weigh
from captioner.decoding import score
from captioner.matching import MatchingConfig
from captioner.model import Captioner, CaptionerConfig, TextConfig, VisionConfig
from captioner.styles import DESCRIPTIVE, SHORT, Style
from captioner.task import BaseTask, FilterTask, load_captioner
from captioner.vocabulary import Vocabulary, train_vocabulary
from infra.train.checkpoint import Checkpoint
from infra.train.draw import uniforms
from infra.train.engine import PlainEngine, load_weights
from infra.train.loop import TrainConfig, train
from infra.train.optim import OptimConfig
from infra.train.plan import BatchPlan
from infra.train.task import Batch, Losses
from t2i.evaluate import scenes
from workflows.corpora.shapes import ShapesConfig, write_shards

Rows = dict[str, list]


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 800  # of the base
    filter_steps: int = 0  # of the filter after it; 0: none
    base: str = ""  # the folder of a base that was trained already, whose training is left out
    batch: int = 64
    lr: float = 1e-3
    samples: int = 24_000
    labelled: int = 1_000
    test_fraction: float = 0.05
    seed: int = 0
    matching: MatchingConfig = field(default_factory=lambda: MatchingConfig(contrastive=1, match=1, hard=0))
    filter: MatchingConfig = field(default_factory=lambda: MatchingConfig(match=1, hard=0, altered=True))


def read_corpus(config: Config) -> dict[str, Rows]:
    """Pixels, alt texts and scenes of both splits."""
    shapes = ShapesConfig(
        samples=config.samples,
        jitter=0,
        labelled=config.labelled,
        test_fraction=config.test_fraction,
        seed=config.seed,
    )
    names = ("pixels", "caption_alt", "reference_short", "reference_descriptive", "scene")
    corpus: dict[str, Rows] = {split: {name: [] for name in names} for split in ("train", "test")}
    with tempfile.TemporaryDirectory() as folder:
        for path in write_shards(shapes, folder):
            with tarfile.open(path) as tar:
                files = {member.name: (tar.extractfile(member) or io.BytesIO()).read() for member in tar}
            for key in sorted({name.split(".")[0] for name in files}):
                about = json.loads(files[f"{key}.json"])
                rows = corpus[about["split"]]
                rows["pixels"].append(np.asarray(Image.open(io.BytesIO(files[f"{key}.png"])).convert("RGB")))
                rows["caption_alt"].append(files[f"{key}.txt"].decode())
                for style in ("short", "descriptive"):
                    rows[f"reference_{style}"].append(about.get(f"caption_{style}"))
                rows["scene"].append(scenes.Scene.from_dict(about["scene"]))
    return corpus


def sizes(height: int, width: int, length: int) -> CaptionerConfig:
    """As the recipes have them."""
    return CaptionerConfig(
        vision=VisionConfig(image_size=(height, width), patch_size=8, hidden=128, layers=2, heads=4, mlp=384),
        text=TextConfig(hidden=128, layers=2, heads=4, mlp=384, max_length=length),
    )


def train_base(config: Config, model: CaptionerConfig, rows: Rows, folder: str) -> tuple[Captioner, "Log"]:
    task = BaseTask(
        source=model,
        vocabulary=(vocabulary := train_vocabulary(_captions(rows), 400)),
        image_size=model.vision.image_size,
        max_length=model.text.max_length,
        optim=OptimConfig(lr=config.lr, warmup_steps=50),
        seed=config.seed,
        matching=config.matching,
        alternatives=count(rows, vocabulary) if config.matching.altered else None,
    )
    module, log = run(task, rows, config.steps, config, folder)
    assert isinstance(module, Captioner)
    return module, log


def train_filter(config: Config, rows: Rows, base: str, folder: str) -> tuple[Captioner, "Log"]:
    captioner = load_captioner(base)
    task = FilterTask(
        source=base,
        styles=(SHORT, DESCRIPTIVE),
        vocabulary=captioner.vocabulary,
        image_size=captioner.image_size,
        max_length=captioner.max_length,
        optim=OptimConfig(lr=config.lr, warmup_steps=20),
        matching=config.filter,
        alternatives=count(rows, captioner.vocabulary) if config.filter.altered else None,
        seed=config.seed,
    )
    module, log = run(task, rows, config.filter_steps, config, folder)
    assert isinstance(module.captioner, Captioner)
    return module.captioner, log


def count(rows: Rows, vocabulary: Vocabulary) -> Alternatives:
    lines = ([vocabulary.bos, *line, vocabulary.sep] for line in vocabulary.encode(_captions(rows)))
    return Alternatives.count(lines, barred={vocabulary.unk})


def _captions(rows: Rows) -> list[str]:
    names = ("caption_alt", "reference_short", "reference_descriptive")
    return [text for name in names for text in rows[name] if text]


def run(
    task: BaseTask | FilterTask, rows: Rows, steps: int, config: Config, folder: str
) -> tuple[torch.nn.Module, "Log"]:
    plan = BatchPlan([len(rows["pixels"])], config.batch, config.seed, 1)

    def feed(start: int) -> Iterator[list[dict]]:
        for step in range(start, steps):
            picked = plan.steps(step, step + 1)
            part = {name: [rows[name][row] for row in picked.row] for name in task.reads}
            ids, epochs = picked.row.astype(np.uint64), picked.epoch
            arrays = task.collate(part, lambda salt, i=ids, e=epochs: uniforms(config.seed, e, i, salt))
            batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
            yield [batch | {"weight": torch.ones(config.batch)}]

    log = Log()
    settings = TrainConfig(
        steps=steps, batch=config.batch, seed=config.seed, log_every_steps=50, save_every_steps=steps
    )
    saved: Checkpoint = train(task, feed, Halved, 1, settings, folder, log)
    (update,) = task.updates()
    load_weights(update, saved)
    return update.module.eval(), log


class Halved(PlainEngine):
    """One process in bf16, as the recipes train."""

    def __call__(self, batch: Batch) -> Losses:
        with torch.autocast("cpu", torch.bfloat16):
            return super().__call__(batch)


class Log(list):
    def __call__(self, step: int, figures: dict) -> None:
        self.append({"step": step} | {name: round(value, 4) for name, value in figures.items()})
        print(self[-1], flush=True)

    def begin(self, step: int) -> None: ...

    def flush(self) -> None: ...


@torch.no_grad()
def scores(captioner: Captioner, rows: Rows) -> dict[str, np.ndarray]:
    """Of each row's alt text: `match`, `similarity` where it was learned, and the decoder's `logp` and `weigh`."""
    columns: dict[str, list] = {"logp": [], "weigh": []}
    for start in range(0, len(rows["pixels"]), 256):
        pixels = torch.from_numpy(np.stack(rows["pixels"][start : start + 256]))
        texts, features = rows["caption_alt"][start : start + 256], captioner.encode(pixels)
        columns["logp"] += score(captioner, features, texts, Style(name="alt"))
        columns["weigh"] += weigh(captioner, features, texts)
        for part, judge in (("match", "match"), ("contrastive", "similarity")):
            if captioner.matching is not None and part in captioner.matching.config.losses:
                columns.setdefault(judge, []).extend(getattr(captioner.matching, judge)(features, texts))
    return {name: np.array(column) for name, column in columns.items()}


def auc(values: np.ndarray, right: np.ndarray) -> float:
    """The chance that a right one scores above a wrong one (Mann-Whitney), ties counting half."""
    above = values[right][:, None] - values[~right][None, :]
    return float((above > 0).mean() + (above == 0).mean() / 2)


def precision(texts: Sequence[str], truth: Sequence[scenes.Scene]) -> float:
    return scenes.caption_scores(texts, truth)["precision"]


def measure(values: dict[str, np.ndarray], rows: Rows) -> dict:
    texts, truth = rows["caption_alt"], rows["scene"]
    said = np.array([bool(scenes.parse(text).objects) or bool(scenes.parse(text).background) for text in texts])
    share = np.array([precision([text], [scene]) for text, scene in zip(texts, truth, strict=True)])
    right = said & (share == 1)
    found: dict = {"rows": len(texts), "right": float(right.mean()), "precision_of_all": precision(texts, truth)}
    wrong = {
        "all": ~right,
        "says_nothing": ~said,
        "mostly_wrong": said & (share < 0.6),
        "nothing_or_mostly_wrong": ~said | (share < 0.6),
        "partly_wrong": said & (share >= 0.6) & (share < 1),
    }
    found["wrong"] = {kind: int(rows.sum()) for kind, rows in wrong.items()}
    for name, column in values.items():
        apart = {kind: auc(column[right | rows], right[right | rows]) for kind, rows in wrong.items()}
        kept = np.argsort(-column)[: int(right.sum())]
        chosen = precision([texts[i] for i in kept], [truth[i] for i in kept])
        found[name] = {f"auc_{key}": round(value, 4) for key, value in apart.items()} | {
            "precision_of_as_many_as_are_right": round(chosen, 4)
        }
    if "match" in values:
        kept = np.flatnonzero(values["match"] >= 0.5)
        found["match_above_half"] = {
            "kept": len(kept) / len(texts),
            "right": float(right[kept].mean()) if len(kept) else None,
            "precision": precision([texts[i] for i in kept], [truth[i] for i in kept]) if len(kept) else None,
        }
    return found


def learn(config: Config, model: CaptionerConfig, rows: Rows) -> tuple[Captioner, dict]:
    """The base and, where it is asked for, the filter; and what they took."""
    base, took = config.base, {}
    with tempfile.TemporaryDirectory() as folder:
        if not base:
            began = time.process_time()
            captioner, log = train_base(config, model, rows, f"{folder}/training")
            captioner.save(base := tempfile.mkdtemp(dir=folder))
            took["base"] = {"cpu_seconds": round(time.process_time() - began, 1), "last": log[-1]}
        captioner = load_captioner(base)
        if config.filter_steps:
            began = time.process_time()
            captioner, log = train_filter(config, rows, base, f"{folder}/filter")
            took["filter"] = {"cpu_seconds": round(time.process_time() - began, 1), "last": log[-1]}
    return captioner, took


def main(config: Config) -> None:
    corpus = read_corpus(config)
    captioner, took = learn(config, sizes(32, 32, 48), corpus["train"])
    print(json.dumps(took | measure(scores(captioner, corpus["test"]), corpus["test"]), indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config))
