"""From a corpus to a CLIP that knows how well its pictures and texts go together: a judge, and a score."""

from dataclasses import dataclass

from infra.config import setting
from infra.store import Artifact, Plan, Store
from infra.train.loop import TrainConfig
from infra.train.optim import OptimConfig
from t2i.clip.model import clip_shapes
from workflows.ingest import IngestConfig, ingest
from workflows.mix import MixConfig, mix
from workflows.recaption import RecaptionConfig, check_written, recaption
from workflows.recipes import demo
from workflows.train_captioner import TrainCaptionerConfig, train_captioner
from workflows.train_clip import TrainClipConfig, train_clip


@dataclass(frozen=True, kw_only=True)
class ClipRecipe:
    """Every choice that changes the numbers of a run."""

    name: str
    corpus: IngestConfig
    captioner: TrainCaptionerConfig | str | None = setting(was=TrainCaptionerConfig)  # as `text_to_image.Recipe` has it
    captions: RecaptionConfig | str | None = setting(was=RecaptionConfig)
    mix: MixConfig
    clip: TrainClipConfig

    def __post_init__(self) -> None:
        check_written(self.captions, self.captioner)

    def run(self, store: Store | Plan) -> Artifact:
        """Make what the recipe describes, or find it; returns the CLIP."""
        images = store.step(ingest, self.corpus)
        captioner = store.step(train_captioner, self.captioner, images)
        captions = store.step(recaption, self.captions, images, captioner) or images
        mixture = store.step(mix, self.mix, images, captions)
        return store.step(train_clip, self.clip, mixture)


def clip(seed: int = 0) -> ClipRecipe:
    """Pictures of Shapes and their new captions, by CLIP (arXiv 2103.00020): six minutes on two busy cores."""
    before = demo(seed)
    train = TrainConfig(steps=400, batch=256, seed=seed, precision="bf16", log_every_steps=20, save_every_steps=200)
    optim = OptimConfig(lr=6e-3, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=40, muon=True)
    return ClipRecipe(
        name="clip",
        corpus=before.corpus,
        captioner=before.captioner,
        captions=before.captions,
        mix=before.mix,
        clip=TrainClipConfig(model=clip_shapes(), train=train, optim=optim, seed=seed),
    )
