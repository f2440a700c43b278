"""CLIP is trained on a mixture, here without Ray, and kept as a CLIP that anybody loads."""

from dataclasses import replace

import pytest
import torch
import transformers

from infra import storage
from infra.config import from_dict, to_dict
from infra.store import Store
from infra.train.engine import PlainEngine
from infra.train.loop import TrainConfig, train
from infra.train.worker import _export
from t2i.clip.model import TowerConfig
from tests.infra.train.plainly import PlainFeed
from tests.infra.train.toy import Losses
from tests.workflows import test_export as plain  # its steps need no Ray
from workflows import api
from workflows import train_clip as module
from workflows.clip import clip
from workflows.corpora.shapes import ShapesConfig
from workflows.held_out import first_held_out
from workflows.ingest import IngestConfig
from workflows.mix import MixConfig
from workflows.options import WORK, step_options
from workflows.train_clip import TrainClipConfig, train_clip

TOWER = TowerConfig(width=16, layers=1, heads=2)
SIZES = {"vision": TOWER, "text": TOWER, "width": 8, "vocabulary_size": 600, "length": 12}
LEARNED = []  # the losses of each training


def fit(trainings, cluster, report):
    """As the one of that name, in this process."""
    (training,) = trainings
    losses = Losses()
    saved = train(training.task, PlainFeed(training), PlainEngine, 1, training.config, training.checkpoints, losses)
    _export(training.task, saved, storage.join(training.out, "model"))
    LEARNED.append(losses)
    return {"step": training.config.steps, "rows": 9, **losses[-1]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The store, the mixture and the step's artifact; texts are longer than the twelve tokens that are read."""
    store = Store(str(tmp_path_factory.mktemp("store")), plain.CLUSTER)
    corpus = ShapesConfig(samples=60, labelled=5, shard_size=30, test_fraction=0.2)
    images = store.step(plain.ingest, IngestConfig(corpus=corpus, image_size=(40, 48)))
    mixture = store.step(plain.mix, MixConfig(weights={"alt": 1.0}), images, images)
    sizes = replace(clip().clip.model, **SIZES)
    short = TrainConfig(steps=8, batch=16, log_every_steps=1)
    config = replace(clip().clip, model=sizes, train=short, optim=replace(clip().clip.optim, warmup_steps=2))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "fit", fit)
        artifact = store.step(train_clip, config, mixture)
    return mixture, artifact, config


def test_it_learns_and_says_of_what(made):
    _, artifact, _ = made
    summary, (losses,) = artifact.summary, LEARNED
    assert summary["steps"] == 8
    assert summary["contrastive_loss"] == losses[-1]["clip/contrastive"]
    assert losses[-1]["clip/contrastive"] < losses[0]["clip/contrastive"]
    assert 514 < summary["vocabulary"] <= 600


def test_what_is_kept_is_a_clip(made):
    _, artifact, _ = made
    folder = artifact.url("model")
    assert set(storage.list_names(folder)) == {
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    model = transformers.CLIPModel.from_pretrained(folder)
    assert model.config.vision_config.image_size == 32
    assert model.config.text_config.vocab_size == artifact.summary["vocabulary"]
    images = artifact.inputs[0].inputs[0]
    names = ("sample_id", "pixels", "reference_descriptive")

    def read(shard):
        reader = plain.ShardReader([images.path], shard)
        test = (reader.columns(["split"])["split"] == "test").nonzero()[0]
        columns = reader.rows(names, test)
        return zip(*(columns[name] for name in names), strict=True)

    rows = first_held_out(images, 5, read, lambda row: row[0])
    scores = api.load(artifact.path).score([row[1] for row in rows], [row[2] for row in rows])
    assert scores.cosines.shape == (5,)
    assert torch.isfinite(scores.cosines).all()
    assert any(scores.cut)


def test_its_words_are_learned_once(made, tmp_path, monkeypatch):
    mixture, artifact, config = made
    storage.download(artifact.url("vocabulary"), str(tmp_path / "vocabulary"))
    monkeypatch.setattr(module, "train_words", lambda *_: pytest.fail("they are there"))
    tasks = []
    monkeypatch.setattr(module, "fit", lambda trainings, *_: tasks.extend(trainings) or {"step": 6, "rows": 9})
    again = train_clip.work(config, mixture, out=str(tmp_path), cluster=plain.CLUSTER, report=print)
    assert again["vocabulary"] == artifact.summary["vocabulary"]
    assert tasks[0].task.model == replace(config.model, vocabulary_size=again["vocabulary"])
    assert tasks[0].task.reads == ("pixels", "captions_alt?", "weights_alt?", "caption_alt", "weight_alt")


def test_the_command_and_its_config():
    line = ["--mixture", "m", "--model.vision.width", "64", "--model.vision.layers", "2", "--model.vision.heads", "2"]
    config = step_options(WORK["train_clip"], [*line, "--model.fit", "stretch"]).config
    assert config.model.vision == TowerConfig(width=64, layers=2, heads=2)
    assert config.model.fit == "stretch"
    assert from_dict(TrainClipConfig, to_dict(clip(seed=3).clip)) == clip(seed=3).clip
    with pytest.raises(ValueError, match="other rows of a batch"):
        TrainClipConfig(train=TrainConfig(steps=1, batch=1))
    with pytest.raises(ValueError, match="vocabulary_rows"):
        TrainClipConfig(vocabulary_rows=0)
