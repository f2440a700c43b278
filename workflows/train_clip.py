"""Train CLIP: which caption belongs to which picture."""

import tempfile
from dataclasses import dataclass, field, replace
from typing import Any

from infra import storage
from infra.cluster import Cluster
from infra.metrics import Report
from infra.store import Artifact, step
from infra.train.fit import Training, fit
from infra.train.loop import TrainConfig, Trained
from infra.train.optim import OptimConfig
from t2i.clip.model import CLIPConfig
from t2i.clip.task import ClipTask
from t2i.clip.words import FILE, CLIPWords, train_words
from workflows.splits import demand_rows
from workflows.train_prior import captions_of
from workflows.train_tokenizer import losses_of, taken_of


@dataclass(frozen=True, kw_only=True)
class TrainClipConfig:
    """Which CLIP, and how long it learns: by itself a ViT-B/32 with the optimizer of the paper's table 18."""

    model: CLIPConfig = field(default_factory=CLIPConfig)
    vocabulary_rows: int = 1_000_000  # rows whose captions are read for its words, at most
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1000, batch=256))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=5e-4, betas=(0.9, 0.98), weight_decay=0.2, warmup_steps=2000)
    )
    seed: int = 0  # of the first weights

    def __post_init__(self) -> None:
        if self.vocabulary_rows < 1:
            raise ValueError(f"vocabulary_rows must be at least 1, but it is {self.vocabulary_rows}.")
        if self.train.batch < 2:
            raise ValueError("CLIP learns from the other rows of a batch: give train.batch at least 2.")

    @property
    def trainings(self) -> list[Trained]:
        """CLIP's."""
        return [Trained(self.train, {"clip": self.optim})]


@step(version=1)
def train_clip(
    config: TrainClipConfig, mixture: Artifact, *, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Train CLIP on pictures and the captions of a mixture; what is kept loads as any published CLIP does."""
    images, captions = mixture.inputs[:2]
    inputs = [images.path, captions.path, mixture.path]
    demand_rows(images)
    styles = tuple(style for style, weight in mixture.manifest["config"]["weights"].items() if weight > 0)
    folder = storage.join(out, "vocabulary")
    if not storage.exists(storage.join(folder, FILE)):
        texts = captions_of(inputs, styles, config.vocabulary_rows)
        with tempfile.TemporaryDirectory() as local:
            train_words(texts, config.model.vocabulary_size, config.model.length, local)
            storage.upload(local, folder)
    with storage.fetched(folder) as local:
        count = len(CLIPWords(local, config.model.length))
    model = replace(config.model, vocabulary_size=count)
    task = ClipTask(model=model, words=folder, styles=styles, optim=config.optim, seed=config.seed)
    figures = fit([Training(task, inputs, config.train, out)], cluster, report)
    return {
        "steps": figures["step"],
        "rows": figures["rows"],
        "vocabulary": count,
        **losses_of(figures),
        **taken_of(figures),
    }
