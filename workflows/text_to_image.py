"""From a corpus to pictures: the whole path, one line a step."""

from dataclasses import dataclass

from infra.config import setting
from infra.data.fitting import bucket_name
from infra.store import Artifact, Plan, Store
from t2i.priors.task import check_sizes
from t2i.tokenizers.task import check_patches
from workflows.encode import EncodeConfig, check_values, encode
from workflows.encode_text import EncodeTextConfig, encode_text
from workflows.evaluate import ReportConfig, evaluate
from workflows.ingest import IngestConfig, ingest
from workflows.mix import MixConfig, mix
from workflows.recaption import RecaptionConfig, check_written, recaption
from workflows.sample import SampleConfig, sample
from workflows.train_captioner import TrainCaptionerConfig, train_captioner
from workflows.train_prior import TrainPriorConfig, train_prior
from workflows.train_tokenizer import TrainTokenizerConfig, train_tokenizer

STEPS = (ingest, train_captioner, recaption, mix, train_tokenizer, encode, train_prior, sample, evaluate)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every choice that changes the numbers of a run."""

    name: str
    corpus: IngestConfig
    # Trained here, somebody else's that is only named, or the path of one that is there; None, as of captions: the
    # corpus has its own. A path in place of captions is that of some that are there.
    captioner: TrainCaptionerConfig | str | None = setting(was=TrainCaptionerConfig)
    captions: RecaptionConfig | str | None = setting(was=RecaptionConfig)
    mix: MixConfig
    tokenizer: TrainTokenizerConfig | str = setting(was=TrainTokenizerConfig)  # or the path of one that is there
    codes: EncodeConfig
    prior: TrainPriorConfig
    sample: SampleConfig
    report: ReportConfig
    # Features of frozen text encoders, an artifact each, where the prior hears them.
    text_features: tuple[EncodeTextConfig, ...] = setting((), since="0.2")

    def __post_init__(self) -> None:
        check_written(self.captions, self.captioner)
        sizes = self.corpus.sizes
        if not sizes:
            raise ValueError("To be trained on, pictures come to a size: give corpus.image_size, such as 256 256.")
        if not isinstance(self.tokenizer, str):
            check_patches(self.tokenizer.model, sizes)
            check_values(self.codes, self.tokenizer.model, self.prior.model)
        check_sizes(self.prior.model, [bucket_name(size) for size in sizes])

    def run(self, store: Store | Plan) -> Artifact:
        """As the function below."""
        return run(self, store)


def run(recipe: Recipe, store: Store | Plan) -> Artifact:
    """Make what the recipe describes, or find it; returns the artifact that holds the report."""
    images = store.step(ingest, recipe.corpus)
    captioner = store.step(train_captioner, recipe.captioner, images)
    captions = store.step(recaption, recipe.captions, images, captioner) or images
    mixture = store.step(mix, recipe.mix, images, captions)
    tokenizer = store.step(train_tokenizer, recipe.tokenizer, images)
    codes = store.step(encode, recipe.codes, images, tokenizer)
    features = [store.step(encode_text, each, images, captions) for each in recipe.text_features]
    prior = store.step(train_prior, recipe.prior, mixture, codes, tokenizer, *features)
    samples = store.step(sample, recipe.sample, mixture, prior, tokenizer)
    return store.step(evaluate, recipe.report, images, captions, captioner, tokenizer, prior, samples)
