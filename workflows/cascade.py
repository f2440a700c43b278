"""From a corpus to pictures by a chain of priors: each draws what the ones after it hear."""

from dataclasses import dataclass, replace

from infra.config import setting
from infra.data.fitting import bucket_name
from infra.store import Artifact, Plan, Store
from infra.train.optim import OptimConfig
from t2i.conditions.pictures import SmallerConfig
from t2i.conditions.words import WordsConfig
from t2i.diffusion.prior import DiffusionConfig, DiffusionSampling
from t2i.diffusion.process import Process
from t2i.diffusion.schedules import Flow
from t2i.diffusion.unet import UNetConfig
from t2i.priors.task import check_sizes
from t2i.tokenizers.pixels import PixelsConfig
from t2i.tokenizers.task import check_patches
from workflows.encode import EncodeConfig, encode
from workflows.encode_text import EncodeTextConfig, encode_text
from workflows.evaluate import ReportConfig, evaluate
from workflows.ingest import IngestConfig, ingest
from workflows.mix import MixConfig, mix
from workflows.recaption import RecaptionConfig, check_written, recaption
from workflows.recipes import demo
from workflows.sample import LinkConfig, SampleConfig, sample
from workflows.train_captioner import TrainCaptionerConfig, train_captioner
from workflows.train_prior import TrainPriorConfig, train_prior
from workflows.train_tokenizer import TrainTokenizerConfig, train_tokenizer


@dataclass(frozen=True, kw_only=True)
class LinkTraining:
    """A prior of a chain, and the tokenizer in whose space it draws."""

    tokenizer: TrainTokenizerConfig
    codes: EncodeConfig | None = None  # None: the values are pixels; else in a column of their own
    prior: TrainPriorConfig


@dataclass(frozen=True, kw_only=True)
class CascadeRecipe:
    """Every choice that changes the numbers of a run; links are trained and drawn in this order."""

    name: str
    corpus: IngestConfig
    captioner: TrainCaptionerConfig | str | None = setting(was=TrainCaptionerConfig)  # as `text_to_image.Recipe` has it
    captions: RecaptionConfig | str | None = setting(was=RecaptionConfig)
    mix: MixConfig
    links: tuple[LinkTraining, ...]
    sample: SampleConfig
    report: ReportConfig
    text_features: tuple[EncodeTextConfig, ...] = ()

    def __post_init__(self) -> None:
        check_written(self.captions, self.captioner)
        if not self.links:
            raise ValueError("A cascade has at least one link.")
        sizes = self.corpus.sizes
        if not sizes:
            raise ValueError("To be trained on, pictures come to a size: give corpus.image_size, such as 256 256.")
        for link in self.links:
            check_patches(link.tokenizer.model, sizes)
            check_sizes(link.prior.model, [bucket_name(size) for size in sizes])

    def run(self, store: Store | Plan) -> Artifact:
        """Make what the recipe describes, or find it; returns the artifact that holds the report."""
        images = store.step(ingest, self.corpus)
        captioner = store.step(train_captioner, self.captioner, images)
        captions = store.step(recaption, self.captions, images, captioner) or images
        mixture = store.step(mix, self.mix, images, captions)
        beside = {each.name: store.step(encode_text, each, images, captions) for each in self.text_features}
        links: list[Artifact] = []
        for link in self.links:
            tokenizer = store.step(train_tokenizer, link.tokenizer, images)
            codes = store.step(encode, link.codes, images, tokenizer)
            heard = [made for name, made in beside.items() if _hears(link.prior, name)]
            links += [store.step(train_prior, link.prior, mixture, codes, tokenizer, *heard), tokenizer]
            beside |= {link.codes.column: codes} if link.codes and codes else {}
        samples = store.step(sample, self.sample, mixture, *links)
        prior, tokenizer = links[-2:]
        return store.step(evaluate, self.report, images, captions, captioner, tokenizer, prior, samples)


def cascade(seed: int = 0) -> CascadeRecipe:
    """Shapes in two steps, as Imagen draws (arXiv 2205.11487): 16x16 pixels from words, then 32x32 from both."""
    before = demo(seed)
    words, smaller = WordsConfig(vocabulary_size=1000, length=40), SmallerConfig(size=(16, 16), noise=0.3)
    drawn = DiffusionSampling(sampler="dpm_solver_2m", steps=20, guidance=2.0)
    return CascadeRecipe(
        name="cascade",
        corpus=before.corpus,
        captioner=before.captioner,
        captions=before.captions,
        mix=before.mix,
        links=(
            # Of what noise hides only words tell: more of the steps are there.
            LinkTraining(tokenizer=_pixels(16), prior=_diffusion(before.prior, 800, Flow(shift=2.0), words)),
            LinkTraining(tokenizer=_pixels(32), prior=_diffusion(before.prior, 250, Flow(), words, smaller)),
        ),
        sample=replace(
            before.sample, sampling=drawn, links=(LinkConfig(sampling=replace(drawn, noised={"smaller": 0.1})),)
        ),
        report=replace(
            before.report,
            title="Shapes, in two steps",
            summary="Pictures of 16x16 pixels drawn from words, and of 32x32 from these and the words.",
        ),
    )


def _hears(prior: TrainPriorConfig, name: str) -> bool:
    """Whether a condition hears a column of codes, or features of the captions, by their name."""
    return any(name in (each.name, *each.reads) for each in prior.told)


def _pixels(side: int) -> TrainTokenizerConfig:
    return TrainTokenizerConfig(model=PixelsConfig(size=(side, side)), train=None)


def _diffusion(
    before: TrainPriorConfig, steps: int, schedule: Flow, *told: WordsConfig | SmallerConfig
) -> TrainPriorConfig:
    """A prior of pixels, with the seed of another one's training; of flat colours x0 is soon learned."""
    network = UNetConfig(
        channels=128, multipliers=(1,), blocks=1, attention_levels=(0,), width=128, patch=4, token_layers=2
    )
    return replace(
        before,
        model=DiffusionConfig(network=network, process=Process(schedule=schedule, prediction="x0")),
        conditions=told,
        drop=0.1,
        train=replace(before.train, steps=steps),
        optim=OptimConfig(lr=8e-3, warmup_steps=40, muon=True, ema_decay=0.99),
    )
