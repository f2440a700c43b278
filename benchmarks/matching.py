"""Does the match score tell right alt texts from wrong ones? Trains a base on Shapes in one process, and measures.

    python -m benchmarks.matching --steps 600 --matching.hard 0

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

from captioner.decoding import score
from captioner.matching import MatchingConfig
from captioner.model import Captioner, CaptionerConfig, TextConfig, VisionConfig
from captioner.styles import Style
from captioner.task import BaseTask
from captioner.vocabulary import train_vocabulary
from infra.train.checkpoint import Checkpoint
from infra.train.draw import uniforms
from infra.train.engine import PlainEngine, load_weights
from infra.train.loop import TrainConfig, train
from infra.train.optim import OptimConfig
from infra.train.plan import BatchPlan
from t2i.evaluate import scenes
from workflows.corpora.shapes import ShapesConfig, write_shards

Rows = dict[str, list]


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 600
    batch: int = 64
    lr: float = 1e-3
    samples: int = 12_000
    test_fraction: float = 0.1
    seed: int = 0
    matching: MatchingConfig = field(default_factory=lambda: MatchingConfig(contrastive=1, match=1, hard=0))


def read_corpus(config: Config) -> dict[str, Rows]:
    """Pixels, alt texts and scenes of both splits."""
    shapes = ShapesConfig(
        samples=config.samples, jitter=0, labelled=0, test_fraction=config.test_fraction, seed=config.seed
    )
    corpus: dict[str, Rows] = {split: {"pixels": [], "caption_alt": [], "scene": []} for split in ("train", "test")}
    with tempfile.TemporaryDirectory() as folder:
        for path in write_shards(shapes, folder):
            with tarfile.open(path) as tar:
                files = {member.name: (tar.extractfile(member) or io.BytesIO()).read() for member in tar}
            for key in sorted({name.split(".")[0] for name in files}):
                about = json.loads(files[f"{key}.json"])
                rows = corpus[about["split"]]
                rows["pixels"].append(np.asarray(Image.open(io.BytesIO(files[f"{key}.png"])).convert("RGB")))
                rows["caption_alt"].append(files[f"{key}.txt"].decode())
                rows["scene"].append(scenes.Scene.from_dict(about["scene"]))
    return corpus


def train_base(config: Config, rows: Rows, folder: str) -> tuple[Captioner, list[dict]]:
    task = BaseTask(
        source=CaptionerConfig(
            vision=VisionConfig(image_size=(32, 32), patch_size=8, hidden=128, layers=2, heads=4, mlp=384),
            text=TextConfig(hidden=128, layers=2, heads=4, mlp=384, max_length=48),
        ),
        vocabulary=train_vocabulary(rows["caption_alt"], 400),
        image_size=(32, 32),
        max_length=48,
        optim=OptimConfig(lr=config.lr, warmup_steps=50),
        seed=config.seed,
        matching=config.matching,
    )
    plan = BatchPlan([len(rows["pixels"])], config.batch, config.seed, 1)

    def feed(start: int) -> Iterator[list[dict]]:
        for step in range(start, config.steps):
            picked = plan.steps(step, step + 1)
            part = {name: [rows[name][row] for row in picked.row] for name in task.reads}
            ids, epochs = picked.row.astype(np.uint64), picked.epoch
            arrays = task.collate(part, lambda salt, i=ids, e=epochs: uniforms(config.seed, e, i, salt))
            batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
            yield [batch | {"weight": torch.ones(config.batch)}]

    log = Log()
    settings = TrainConfig(
        steps=config.steps, batch=config.batch, seed=config.seed, log_every_steps=50, save_every_steps=config.steps
    )
    saved: Checkpoint = train(task, feed, PlainEngine, 1, settings, folder, log)
    (update,) = task.updates()
    load_weights(update, saved)
    assert isinstance(update.module, Captioner)
    return update.module.eval(), log


class Log(list):
    def __call__(self, step: int, figures: dict) -> None:
        self.append({"step": step} | {name: round(value, 4) for name, value in figures.items()})
        print(self[-1], flush=True)

    def flush(self) -> None: ...


@torch.no_grad()
def scores(captioner: Captioner, rows: Rows) -> dict[str, np.ndarray]:
    """Of each row's alt text: `match`, `similarity` where it was learned, and the decoder's `logp`."""
    columns: dict[str, list] = {"logp": []}
    for start in range(0, len(rows["pixels"]), 256):
        pixels = torch.from_numpy(np.stack(rows["pixels"][start : start + 256]))
        texts, features = rows["caption_alt"][start : start + 256], captioner.encode(pixels)
        columns["logp"] += score(captioner, features, texts, Style(name="alt"))
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


def main(config: Config) -> None:
    corpus = read_corpus(config)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        captioner, log = train_base(config, corpus["train"], folder)
    seconds = time.perf_counter() - began
    print(
        json.dumps(
            {"seconds": round(seconds, 1), "losses": log[-1]}
            | measure(scores(captioner, corpus["test"]), corpus["test"]),
            indent=1,
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
