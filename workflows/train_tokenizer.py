"""Train an image tokenizer: pictures to codes and back."""

import tempfile
from dataclasses import dataclass, field, replace
from typing import Any

from infra import storage
from infra.cluster import Cluster
from infra.config import setting, to_dict
from infra.data.fitting import Size
from infra.metrics import FLOPS, Report
from infra.store import Artifact, step
from infra.train.fit import Training, fit
from infra.train.loop import TrainConfig, Trained, is_loss
from infra.train.optim import OptimConfig
from t2i.tokenizers.clip import ClipConfig
from t2i.tokenizers.critic import CriticConfig
from t2i.tokenizers.losses import LossConfig
from t2i.tokenizers.patch_vqgan import PatchVQGANConfig
from t2i.tokenizers.pixels import PixelsConfig
from t2i.tokenizers.published import PublishedConfig
from t2i.tokenizers.scale import ScaleConfig
from t2i.tokenizers.task import (
    TokenizerConfig,
    TokenizerTask,
    build_tokenizer,
    save_scale,
    save_tokenizer,
)
from workflows.splits import demand_rows

MODEL = "model"  # the folder, within the artifact, of what users load
BEGIN = "begin"  # that of a published tokenizer from which training begins


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """Which tokenizer, what it is trained for, and how long; without `critic` nothing judges its pictures."""

    model: TokenizerConfig = field(default_factory=PatchVQGANConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    # None: it stays as it is. Pixels learn nothing, and what others trained need not.
    train: TrainConfig | None = field(default_factory=lambda: TrainConfig(steps=1000))
    optim: OptimConfig = field(default_factory=OptimConfig)
    critic: CriticConfig | None = None
    critic_optim: OptimConfig | None = None  # None: as the tokenizer's
    seed: int = 0  # of the first weights
    # How the scale of latents is measured. None: by the defaults where values are continuous, else not at all.
    scale: ScaleConfig | None = setting(None, since="0.2")

    def __post_init__(self) -> None:
        pixels = isinstance(self.model, PixelsConfig)
        if pixels and (self.train or self.critic or self.scale):
            raise ValueError("A tokenizer of pixels learns nothing: leave out critic and scale, and give train None.")
        if isinstance(self.model, ClipConfig) and self.train:
            raise ValueError("A CLIP is trained by train_clip, and stays as it is here: give train None.")
        if self.train is None and not isinstance(self.model, PixelsConfig | PublishedConfig | ClipConfig):
            raise ValueError("Say how long the tokenizer is trained: give train its steps.")
        if self.train is None and self.critic:
            raise ValueError("A critic judges a tokenizer that is trained: leave out critic, or give train its steps.")

    @property
    def trainings(self) -> list[Trained]:
        """That of the tokenizer and, with a critic, the critic's beside it; none of pixels."""
        critic = {"critic": self.critic_optim or self.optim} if self.critic else {}
        return [Trained(self.train, {"tokenizer": self.optim, **critic}, bool(self.critic))] if self.train else []


@step(version=2)
def train_tokenizer(
    config: TrainTokenizerConfig, images: Artifact, *, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Train an image tokenizer on the pictures of a corpus, all of one size, or of the sizes of its buckets.

    One of pixels learns nothing, and is only named, and so is a CLIP; one that others trained is kept in our layout,
    and trained on where `train` says how long. Last the scale of latents is measured, which published ones may bring.
    """
    demand_rows(images)
    named = config.model
    if isinstance(named, ClipConfig):
        named = replace(named, path=weights_of(named.path))
    sizes, model = image_sizes(images), build_tokenizer(named)
    for size in sizes:
        model.space(size)  # a size that does not fit is said before anything starts
    if config.scale and not hasattr(model, "latents"):
        raise ValueError(f"A {type(model).__name__} shows no latents whose scale could be measured: leave out scale.")
    size = {"size": list(sizes[0])} if len(sizes) == 1 else {"sizes": [list(size) for size in sizes]}
    published = isinstance(config.model, PublishedConfig)
    if config.train is None or published:
        given = storage.join(out, BEGIN if config.train else MODEL)
        with tempfile.TemporaryDirectory() as local:
            save_tokenizer(model, local)
            storage.upload(local, given)
    if config.train is None:
        return {**size, **_scaled(config, model, images, out, cluster, report)}
    task = TokenizerTask(
        model=model.config,
        losses=config.losses,
        optim=config.optim,
        critic=config.critic,
        critic_optim=config.critic_optim,
        seed=config.seed,
        bucket="bucket" if images.manifest["config"].get("buckets") else None,
        begin=storage.join(out, BEGIN) if published else "",
    )
    figures = fit([Training(task, [images.path], config.train, out)], cluster, report)
    scale = _scaled(config, model, images, out, cluster, report)
    return {
        "steps": figures["step"],
        "rows": figures["rows"],
        **size,
        **losses_of(figures),
        **taken_of(figures),
        **scale,
    }


def _scaled(
    config: TrainTokenizerConfig, model: Any, images: Artifact, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Measure the scale of latents where that is asked, or they are continuous and nobody said it; what is told of it.

    Pixels have none, and codes do without.
    """
    known = getattr(model, "scale", None) if config.train is None else None
    continuous = hasattr(model, "latents") and not model.space(image_sizes(images)[0]).codes
    if config.scale or (continuous and known is None):
        from workflows.scaling import measure_scale  # not before it is wanted: a plan knows no stages

        how = config.scale or ScaleConfig()
        known = measure_scale(how, images, storage.join(out, MODEL), out, cluster, report)
        save_scale(known, storage.join(out, MODEL))
    return {"scale": to_dict(known)} if known is not None else {}


def weights_of(named: str) -> str:
    """The folder of a CLIP's weights, where it is named by that of its artifact; else what it is named by."""
    own = storage.join(named, MODEL) if named else ""
    return storage.absolute(own) if own and storage.exists(own) else storage.anchored(named)


def image_sizes(images: Artifact) -> list[Size]:
    """The sizes that resized copies have, (height, width) each; ValueError where ingest made none."""
    config = images.manifest["config"]
    sizes = config.get("buckets") or ([config["image_size"]] if config["image_size"] else [])
    if not sizes:
        raise ValueError(
            f"The pictures of {images.path} differ in size. Ingest with an image_size, as --image-size 256 256."
        )
    return [(height, width) for height, width in sizes]


def decodes(tokenizer: Artifact) -> bool:
    """Whether a tokenizer makes pictures of its values; a CLIP does not."""
    return _class_of(tokenizer) != ClipConfig.__name__


def rebuilds(tokenizer: Artifact) -> bool:
    """Whether a tokenizer learned to rebuild pictures; one of pixels keeps them as they are."""
    return decodes(tokenizer) and _class_of(tokenizer) != PixelsConfig.__name__


def _class_of(tokenizer: Artifact) -> str | None:
    """The name of the class of its config."""
    return tokenizer.manifest["config"].get("model", {}).get("class")


def losses_of(figures: dict[str, Any]) -> dict[str, float]:
    """The last logged losses, by a name that suits a table."""
    return {name.split("/")[-1] + "_loss": value for name, value in figures.items() if is_loss(name)}


def taken_of(figures: dict[str, Any]) -> dict[str, Any]:
    """What a training took, and what was seen of held-out rows, as far as it is known.

    `training_flops` and, of frozen models that were asked in it, `frozen_flops`; `held_out`: the last losses on rows
    that are held out, and the CPU-seconds that all of these took.
    """
    return {name: figures[name] for name in (*FLOPS, "held_out") if name in figures}
