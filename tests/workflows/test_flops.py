"""The steps that a sum of FLOPs buys are forecast without a corpus, and trainings tell that they cost so much."""

from dataclasses import replace

import pytest

from infra.data.run import run_here
from infra.store import Store, step
from infra.train.engine import PlainEngine
from infra.train.flops import of_training
from infra.train.loop import TrainConfig, is_loss, train
from t2i.conditions.labels import LabelConfig
from t2i.conditions.words import WordsConfig
from t2i.diffusion.prior import DiffusionConfig
from t2i.diffusion.unet import UNetConfig
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.stages import Encode
from t2i.tokenizers.critic import CriticConfig
from t2i.tokenizers.finite_scalar import FiniteScalarConfig
from t2i.tokenizers.pixels import PixelsConfig
from t2i.tokenizers.vqgan import VQGANConfig
from tests.infra.train.plainly import PlainFeed
from tests.infra.train.toy import Figure
from tests.workflows import test_export as plain  # its steps need no Ray
from tests.workflows.test_train_clip import SIZES
from workflows import train_clip, train_prior, train_tokenizer
from workflows.clip import clip
from workflows.corpora.shapes import ShapesConfig
from workflows.encode import EncodeConfig
from workflows.flops import Forecast, forecast, steps_for
from workflows.ingest import IngestConfig
from workflows.mix import MixConfig
from workflows.train_prior import TrainPriorConfig, captions_of
from workflows.train_tokenizer import MODEL, TrainTokenizerConfig

SIZE = (16, 24)
TRAIN = TrainConfig(steps=40, batch=12, log_every_steps=40, save_every_steps=40)
TOKENIZER = TrainTokenizerConfig(
    model=VQGANConfig(
        channels=8,
        multipliers=(1, 2),
        blocks=1,
        attention_levels=(1,),
        groups=4,
        latent_channels=8,
        quantizer=FiniteScalarConfig(levels=(8, 5)),
    ),
    critic=CriticConfig(channels=8, layers=2, start_step=13),
    train=replace(TRAIN, steps=30),
)
PIXELS = TrainTokenizerConfig(model=PixelsConfig(size=SIZE), train=None)
AUTOREGRESSIVE = TrainPriorConfig(
    model=AutoregressiveConfig(width=32, layers=2, heads=2, text_loss=True), vocabulary_size=300, train=TRAIN
)
DIFFUSION = TrainPriorConfig(
    model=DiffusionConfig(network=UNetConfig(channels=16, multipliers=(1, 2), blocks=1, width=32, head_width=16)),
    conditions=(WordsConfig(vocabulary_size=300, length=30), LabelConfig(column="split")),
    train=replace(TRAIN, steps=20),
)
CLIP = replace(clip().clip, model=replace(clip().clip.model, **SIZES), train=replace(TRAIN, batch=16))
MICRO_STEPS = 1


def fit(trainings, cluster, report):
    """As the one of that name, in this process."""
    (training,) = trainings
    figures, feed = {}, PlainFeed(training, micro_steps=MICRO_STEPS)

    class Log(Figure):
        def __call__(self, step, told):
            figures.update(told)

    config, task = training.config, training.task
    saved = train(task, feed, PlainEngine, MICRO_STEPS, config, training.checkpoints, Log())
    from infra import storage
    from infra.train.worker import _export

    _export(task, saved, storage.join(training.out, MODEL))
    losses = {name: value for name, value in figures.items() if is_loss(name)}
    counted = of_training(saved.meta["flops"], feed.plan, config.steps)
    return {"step": config.steps, "rows": feed.plan.rows_per_epoch, **losses, **counted}


@step(version=1)
def encode(config, images, tokenizer, *, out, cluster, report):
    """As the step of that name, without Ray."""
    stage = Encode(tokenizer.url(MODEL))
    counts = run_here([stage], [images.path], out, batch_size=config.batch)
    space = stage._model.space(SIZE)
    return counts | {"grid": list(space.shape), "codebook_size": space.codes}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        for module in (train_clip, train_prior, train_tokenizer):
            patched.setattr(module, "fit", fit)
        yield Store(str(tmp_path_factory.mktemp("store")), plain.CLUSTER)


@pytest.fixture(scope="module")
def images(store):
    corpus = ShapesConfig(samples=60, labelled=5, shard_size=30, test_fraction=0.2)
    return store.step(plain.ingest, IngestConfig(corpus=corpus, image_size=SIZE))


@pytest.fixture(scope="module")
def mixture(store, images):
    return store.step(plain.mix, MixConfig(weights={"alt": 1.0}), images, images)


@pytest.fixture(scope="module")
def captions(images, mixture):
    return list(captions_of([images.path, images.path, mixture.path], ("alt",), 100))


def check(told, config, **given):
    """That a training cost what was forecast, and that its steps follow from what it cost."""
    found = told.summary["training_flops"]
    expected = forecast(config, **given)
    assert expected.of(config.train.steps) == pytest.approx(found, rel=0.03)
    assert steps_for(config, found, **given) == pytest.approx(config.train.steps, rel=0.03)
    return expected


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("micro_steps", [1, 3])
def test_a_vqgan_whose_critic_wakes_late(store, images, monkeypatch, micro_steps):
    monkeypatch.setitem(globals(), "MICRO_STEPS", micro_steps)
    config = replace(TOKENIZER, seed=micro_steps)
    expected = check(store.step(train_tokenizer.train_tokenizer, config, images), config, size=SIZE)
    assert expected.by_row.keys() == {0, 13}
    assert expected.by_row[13] > 1.1 * expected.by_row[0]


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("micro_steps", [1, 2])
def test_an_autoregressive_prior_whose_captions_differ_in_length(
    store, images, mixture, captions, monkeypatch, micro_steps
):
    monkeypatch.setitem(globals(), "MICRO_STEPS", micro_steps)
    tokenizer = store.step(train_tokenizer.train_tokenizer, replace(TOKENIZER, seed=1), images)
    codes = store.step(encode, EncodeConfig(batch=16), images, tokenizer)
    config = replace(AUTOREGRESSIVE, seed=micro_steps)
    made = store.step(train_prior.train_prior, config, mixture, codes, tokenizer)
    expected = check(made, config, size=SIZE, tokenizer=TOKENIZER, captions=captions)
    short = forecast(config, size=SIZE, tokenizer=TOKENIZER, captions=[text[:9] for text in captions])
    assert short.of(9) < 0.9 * expected.of(9), "lengths count"


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_diffusion_of_pixels(store, images, mixture, captions):
    pixels = store.step(train_tokenizer.train_tokenizer, PIXELS, images)
    assert "training_flops" not in pixels.summary
    made = store.step(train_prior.train_prior, DIFFUSION, mixture, None, pixels)
    check(made, DIFFUSION, size=SIZE, tokenizer=PIXELS, captions=captions)


@pytest.mark.parametrize("micro_steps", [1, pytest.param(4, marks=pytest.mark.long)])
def test_a_clip(store, mixture, captions, monkeypatch, micro_steps):
    monkeypatch.setitem(globals(), "MICRO_STEPS", micro_steps)
    config = replace(CLIP, seed=micro_steps)
    check(store.step(train_clip.train_clip, config, mixture), config, captions=captions)


def test_the_steps_of_a_sum():
    costs = Forecast({0: 10.0, 100: 30.0}, batch=2)
    assert costs.of(0) == 0
    assert costs.of(40) == 800
    assert costs.of(150) == 2000 + 3000
    assert [costs.steps(costs.of(steps)) for steps in (1, 40, 99, 100, 101, 150)] == [1, 40, 99, 100, 101, 150]
    assert costs.steps(1e-9) == 1
    assert costs.steps(2000 + 3000 + 29) == 150
    assert costs.steps(2000 + 3000 + 31) == 151


def test_what_lacks_is_said():
    with pytest.raises(ValueError, match="give the size"):
        forecast(TOKENIZER)
    with pytest.raises(ValueError, match="give the tokenizer's config"):
        forecast(AUTOREGRESSIVE, size=SIZE, captions=["a"])
    with pytest.raises(ValueError, match="whose lengths count: give some"):
        forecast(AUTOREGRESSIVE, size=SIZE, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="whose lengths count: give some"):
        forecast(CLIP)
    with pytest.raises(ValueError, match="learns nothing"):
        forecast(PIXELS, size=SIZE)
