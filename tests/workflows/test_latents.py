"""Latents through the steps: a scale beside the tokenizer, columns of 16 bits, a prior that draws them, pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infra import storage
from infra.cluster import Cluster
from infra.data.images import decode
from infra.data.shards import ShardReader, joined_names
from infra.store import Artifact, Store
from infra.train.loop import TrainConfig
from infra.train.optim import OptimConfig
from t2i.conditions.words import WordsConfig
from t2i.diffusion.prior import DiffusionConfig, DiffusionSampling
from t2i.diffusion.unet import UNetConfig
from t2i.nn.weights import initialize
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.tokenizers.clip import ClipConfig
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.gaussian import GaussianConfig
from t2i.tokenizers.losses import LossConfig
from t2i.tokenizers.pixels import PixelsConfig
from t2i.tokenizers.scale import Scale, ScaleConfig, measured, sums_of
from t2i.tokenizers.task import load_tokenizer, save_tokenizer
from t2i.tokenizers.vqgan import VQGANConfig
from t2i.values import as_floats
from tests.t2i.clip import tiny
from workflows import look, scaling
from workflows import train_tokenizer as module
from workflows.api import load
from workflows.encode import EncodeConfig, encode
from workflows.evaluate import reconstruct
from workflows.recipes import debug
from workflows.sample import SampleConfig, sample
from workflows.scaling import measure_scale
from workflows.train_prior import TrainPriorConfig, train_prior
from workflows.train_tokenizer import MODEL, TrainTokenizerConfig, rebuilds, train_tokenizer

DATA = Path(__file__).parents[1] / "data" / "d3c69f4" / "store"
CLUSTER = Cluster(name="test", actors=(1, 2))
SMALL = {"channels": 8, "groups": 4, "multipliers": (1, 2), "blocks": 1, "latent_channels": 3, "attention_levels": ()}
KL = VQGANConfig(**SMALL, quantizer=GaussianConfig(width=3))
VQ = VQGANConfig(**SMALL, quantizer=CodebookConfig(size=16, width=3))
NET = UNetConfig(channels=16, width=32, multipliers=(1,), attention_levels=(0,), blocks=1, head_width=8, groups=8)
SUMS = LossConfig(reduction="sum", kl=1e-6)


def made(step: str) -> Artifact:
    (path,) = (DATA / step).iterdir()
    return Artifact.open(str(path))


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"), CLUSTER)


@pytest.fixture
def untrained(monkeypatch):
    """Trainings end at once, with first weights."""

    def fit(trainings, cluster, report):
        (training,) = trainings
        tokenizer = training.task.model.build()
        initialize(tokenizer, 0)
        Path(training.out, MODEL).mkdir(parents=True)
        save_tokenizer(tokenizer, f"{training.out}/{MODEL}")
        return {"step": 0, "rows": 0}

    monkeypatch.setattr(module, "fit", fit)


def training_pixels() -> dict[str, np.ndarray]:
    """By sample id."""
    images, found = made("ingest"), {}
    for name in joined_names([images.path]):
        reader = ShardReader([images.path], name)
        columns = reader.columns(["sample_id", "split"])
        for place in np.flatnonzero(columns["split"] == "train"):
            found[columns["sample_id"][place]] = reader.rows(["pixels"], [place])["pixels"][0]
    return found


def test_a_scale_is_measured_after_the_training(store, untrained):
    tokenizer = store.step(train_tokenizer, TrainTokenizerConfig(model=KL), made("ingest"))
    loaded = load_tokenizer(tokenizer.url(MODEL))
    assert tokenizer.summary["scale"] == {"factor": list(loaded.scale.factor), "shift": list(loaded.scale.shift)}
    assert sorted(tokenizer.manifest["files"]) == ["model/config.json", "model/model.safetensors", "model/scale.json"]
    pixels = torch.from_numpy(np.stack(list(training_pixels().values()))).permute(0, 3, 1, 2) / 127.5 - 1
    values = loaded.encode(pixels)
    assert values.mean().item() == pytest.approx(0, abs=1e-4)
    assert values.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert look.verify([tokenizer.path])["whole"]


@pytest.mark.parametrize("channels", [False, True], ids=["one", "each"])
def test_codes_have_a_scale_only_where_it_is_asked_for(store, untrained, channels):
    plain = store.step(train_tokenizer, TrainTokenizerConfig(model=VQ), made("ingest"))
    assert "scale" not in plain.summary
    assert not Path(plain.path, MODEL, "scale.json").exists()
    asked = TrainTokenizerConfig(model=VQ, scale=ScaleConfig(rows=5, channels=channels))
    tokenizer = store.step(train_tokenizer, asked, made("ingest"))
    model = load_tokenizer(tokenizer.url(MODEL))
    found, model.scale = model.scale, None
    pixels = training_pixels()
    few = [pixels[sample_id] for sample_id in sorted(pixels)[:5]]  # the first by sample id
    latents = model.latents(torch.from_numpy(np.stack(few)).permute(0, 3, 1, 2) / 127.5 - 1)
    wanted = measured([sums_of(each) for each in latents.numpy()], channels)
    assert found.factor == pytest.approx(wanted.factor, rel=1e-5)
    assert found.shift == pytest.approx(wanted.shift, rel=1e-4, abs=1e-6)


@pytest.mark.long
@pytest.mark.timeout(240)
def test_actors_measure_what_one_process_does(ray_cluster, tmp_path, monkeypatch):
    save_tokenizer(tokenizer := KL.build(), str(tmp_path))
    initialize(tokenizer, 0)
    save_tokenizer(tokenizer, str(tmp_path))
    found = []
    for most, rows in ((256, 256), (8, 5), (8, 8)):
        monkeypatch.setattr(scaling, "SHARD_ROWS", rows)
        monkeypatch.setattr(scaling, "BATCH", min(rows, 32))
        options = CLUSTER if most == 256 else replace(CLUSTER, address="auto")
        monkeypatch.setattr(scaling, "connect", lambda cluster: None)
        found.append(measure_scale(ScaleConfig(), made("ingest"), str(tmp_path), str(tmp_path / "out"), options, None))
        assert not (tmp_path / "out" / "scale").exists()
    for other in found[1:]:
        assert other.factor == pytest.approx(found[0].factor, rel=1e-6)
        assert other.shift == pytest.approx(found[0].shift, rel=1e-5)


def test_what_cannot_be_encoded_is_told(store, untrained):
    vq, kl = (store.step(train_tokenizer, TrainTokenizerConfig(model=each), made("ingest")) for each in (VQ, KL))
    pixels = store.step(
        train_tokenizer, TrainTokenizerConfig(model=PixelsConfig(size=(8, 8)), train=None), made("ingest")
    )
    for tokenizer, options in ((vq, {}), (vq, {"latents": True})):
        with pytest.raises(ValueError, match="no distribution of its values"):
            store.step(encode, EncodeConfig(deviations=True, **options), made("ingest"), tokenizer)
    with pytest.raises(ValueError, match="has no codes to write"):
        store.step(encode, EncodeConfig(latents=True), made("ingest"), pixels)
    with pytest.raises(ValueError, match="leave out critic and scale"):
        TrainTokenizerConfig(model=PixelsConfig(size=(8, 8)), train=None, scale=ScaleConfig())
    with pytest.raises(ValueError, match="trained by train_clip"):
        TrainTokenizerConfig(model=ClipConfig(path="clip"))
    assert rebuilds(kl)


@pytest.mark.parametrize(
    ("model", "codes", "prior", "why"),
    [
        (KL, EncodeConfig(), AutoregressiveConfig(), "the tokenizer has none"),
        (VQ, EncodeConfig(), DiffusionConfig(network=NET), "give codes.latents"),
        (VQ, EncodeConfig(latents=True), AutoregressiveConfig(), "leave out codes.latents"),
        (VQ, EncodeConfig(latents=True, deviations=True), DiffusionConfig(network=NET), "leave out codes.deviations"),
    ],
    ids=["no codes", "codes", "latents", "deviations"],
)
def test_a_recipe_whose_prior_draws_other_values_is_refused(model, codes, prior, why):
    recipe = debug()
    tokenizer = replace(recipe.tokenizer, model=model)
    with pytest.raises(ValueError, match=why):
        replace(recipe, tokenizer=tokenizer, codes=codes, prior=replace(recipe.prior, model=prior))
    fits = {
        "codes": replace(codes, deviations=False),
        "prior": replace(recipe.prior, model=DiffusionConfig(network=NET)),
    }
    assert replace(recipe, tokenizer=replace(tokenizer, model=KL), **fits)


def test_latents_are_rebuilt_and_have_no_usage(store, untrained):
    tokenizer = store.step(train_tokenizer, TrainTokenizerConfig(model=KL), made("ingest"))
    pixels = list(training_pixels().values())[:3]
    rebuilt, scores = reconstruct(tokenizer, pixels)
    assert [each.shape for each in rebuilt] == [(16, 16, 3)] * 3
    assert scores == {}


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_clip_is_named_and_its_embeddings_are_written(ray_cluster, store, tmp_path):
    folder, task = tmp_path / "clip" / MODEL, tiny.task()
    folder.mkdir(parents=True)
    task.export({"clip": task.updates()[0].module.eval()}, str(folder))
    config = TrainTokenizerConfig(model=ClipConfig(path=str(tmp_path / "clip")), train=None)
    tokenizer = store.step(train_tokenizer, config, made("ingest"))
    assert len(tokenizer.summary["scale"]["factor"]) == 1
    assert not rebuilds(tokenizer)
    values = store.step(encode, EncodeConfig(column="embedding"), made("ingest"), tokenizer)
    width = load_tokenizer(tokenizer.url(MODEL)).space((16, 16)).places
    assert values.summary["grid"] == [width]
    found = as_floats([row for name in joined_names([values.path])
                       for row in ShardReader([values.path], name).columns(["embedding"])["embedding"]])  # fmt: skip
    assert found.shape[1] == width
    assert found.std() == pytest.approx(1, abs=0.2)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_diffusion_draws_latents_and_pictures_come_of_it(ray_cluster, store):
    """From the training of a KL autoencoder to pictures; then of what a codebook has before its codes."""
    optim = OptimConfig(lr=2e-3, warmup_steps=2)
    short = TrainConfig(steps=4, batch=8)
    drawn = DiffusionSampling(steps=3, guidance=2.0)
    words = WordsConfig(vocabulary_size=64, length=12)
    for model, losses, told in (
        (KL, SUMS, EncodeConfig(batch=8)),
        (KL, SUMS, EncodeConfig(batch=8, deviations=True)),
        (VQ, LossConfig(), EncodeConfig(batch=8, latents=True)),
    ):
        config = TrainTokenizerConfig(model=model, losses=losses, train=short, optim=optim, scale=ScaleConfig(rows=20))
        tokenizer = store.step(train_tokenizer, config, made("ingest"))
        values = store.step(encode, told, made("ingest"), tokenizer)
        assert values.summary["grid"] == [3, 8, 8]
        assert values.summary["codebook_size"] == 0
        assert values.summary.get("deviations", False) == told.deviations
        assert look.verify([values.path])["whole"]
        (name, *_) = joined_names([values.path])
        column = ShardReader([values.path], name).columns(["codes"])["codes"]
        assert column[0].dtype == np.uint16
        assert 0.3 < as_floats(list(column)).std() < 3
        asked = TrainPriorConfig(model=DiffusionConfig(network=NET), conditions=(words,), train=short, optim=optim)
        prior = store.step(train_prior, asked, made("mix"), values, tokenizer)
        shape = storage.read_json(prior.url(MODEL, "config.json"))
        assert shape["space"]["shape"] == [3, 8, 8]
        samples = store.step(sample, SampleConfig(count=3, sampling=drawn), made("mix"), prior, tokenizer)
        pictures = ShardReader([samples.path], joined_names([samples.path])[0]).columns(["image"])["image"]
        assert [decode(each).shape for each in pictures] == [(16, 16, 3)] * 3
        assert np.std(decode(pictures[0])) > 0
        assert look.verify([samples.path])["whole"]
        assert load(prior.path).sample("a red circle", steps=2)[0].size == (16, 16)
    with pytest.raises(ValueError, match="draws codes"):
        store.step(train_prior, TrainPriorConfig(model=AutoregressiveConfig()), made("mix"), values, tokenizer)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_codes_of_before_still_train(ray_cluster, store):
    """They are int32."""
    old = made("encode")
    assert old.manifest["version"] == 1
    (name, *_) = joined_names([old.path])
    assert ShardReader([old.path], name).columns(["codes"])["codes"][0].dtype == np.int32
    config = replace(TrainPriorConfig(train=TrainConfig(steps=2, batch=8), vocabulary_size=64, text_length=12),
                     model=AutoregressiveConfig(width=16, layers=1, heads=2))  # fmt: skip
    prior = store.step(train_prior, config, made("mix"), old, made("train_tokenizer"))
    samples = store.step(sample, SampleConfig(count=2), made("mix"), prior, made("train_tokenizer"))
    assert samples.summary["samples"] == 2


@pytest.mark.long
@pytest.mark.timeout(300)
def test_shards_do_not_depend_on_who_encodes(ray_cluster, tmp_path, untrained):
    """Bit for bit, whatever the actors."""
    found = []
    for actors in ((1, 1), (2, 3)):
        store = Store(str(tmp_path / f"{actors[1]}"), replace(CLUSTER, actors=actors))
        tokenizer = store.step(train_tokenizer, TrainTokenizerConfig(model=KL), made("ingest"))
        values = store.step(encode, EncodeConfig(batch=4, deviations=True), made("ingest"), tokenizer)
        found.append([
            np.stack(list(ShardReader([values.path], name).columns([column])[column]))
            for name in joined_names([values.path])
            for column in ("codes", "codes_deviation")
        ])  # fmt: skip
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_a_scale_is_kept_by_a_published_tokenizer(store, tmp_path, monkeypatch):
    """One that others measured is not measured again, unless that is asked."""
    from t2i.tokenizers.published import PublishedConfig

    def build(self):
        tokenizer = KL.build()
        initialize(tokenizer, 0)
        tokenizer.scale = Scale(factor=(0.18215,), shift=(0.0,))
        return tokenizer

    monkeypatch.setattr(PublishedConfig, "build", build)
    config = TrainTokenizerConfig(model=PublishedConfig(path="sd"), train=None)
    tokenizer = store.step(train_tokenizer, config, made("ingest"))
    assert tokenizer.summary["scale"] == {"factor": [0.18215], "shift": [0.0]}
    assert load_tokenizer(tokenizer.url(MODEL)).scale == Scale(factor=(0.18215,), shift=(0.0,))
    again = store.step(train_tokenizer, replace(config, scale=ScaleConfig()), made("ingest"))
    assert again.summary["scale"]["factor"] != [0.18215]
