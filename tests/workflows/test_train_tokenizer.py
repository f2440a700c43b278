"""A tokenizer that others trained is used as it is, or trained on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import VQModel

from infra.cluster import Cluster
from infra.store import Artifact, Store
from infra.train.loop import TrainConfig
from infra.train.optim import OptimConfig
from t2i.tokenizers.critic import CriticConfig
from t2i.tokenizers.published import PublishedConfig
from t2i.tokenizers.task import load_tokenizer
from tests.t2i.tokenizers.test_published import VQ, alike, filled
from workflows.kinds import read, written
from workflows.options import recipe_options
from workflows.train_tokenizer import MODEL, TrainTokenizerConfig, rebuilds, train_tokenizer

DATA = Path(__file__).parents[1] / "data" / "d3c69f4" / "store"


@pytest.fixture(scope="module")
def images():
    (path,) = (DATA / "ingest").iterdir()
    return Artifact.open(str(path))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("published"), filled(VQModel(**VQ["attention at one level"]))
    model.save_pretrained(folder)
    return str(folder), model


def test_it_is_used_as_it_is(images, theirs, tmp_path):
    folder, model = theirs
    store = Store(str(tmp_path / "store"), Cluster(name="test", actors=(1, 1)))
    config = TrainTokenizerConfig(model=PublishedConfig(path=folder), train=None)
    tokenizer = store.step(train_tokenizer, config, images)
    assert tokenizer.summary == {"size": [16, 16], "scale": {"factor": [0.18215], "shift": [0.0]}}
    alike(load_tokenizer(tokenizer.url(MODEL)), model)
    told = json.loads(Path(tokenizer.path, MODEL, "config.json").read_text())
    plain = {"normalize": False, "linear": False, "ema": 0.0, "dead_below": 0.0}
    assert told["model"]["quantizer"] == {"class": "CodebookConfig", "size": 16, "width": 3} | plain
    assert rebuilds(tokenizer)


@pytest.mark.long
@pytest.mark.timeout(240)
def test_training_begins_from_it(images, theirs, tmp_path):
    folder, model = theirs
    store = Store(str(tmp_path / "store"), Cluster(name="test", actors=(1, 1)))
    still = OptimConfig(lr=1e-12, weight_decay=0.0)
    config = TrainTokenizerConfig(model=PublishedConfig(path=folder), train=TrainConfig(steps=2, batch=8), optim=still)
    tokenizer = store.step(train_tokenizer, config, images)
    alike(load_tokenizer(tokenizer.url(MODEL)), model)
    with torch.no_grad():
        assert tokenizer.summary["reconstruction_loss"] > 0


def test_a_recipe_takes_it_by_its_folder(theirs):
    folder, _ = theirs
    recipe = recipe_options(["debug", "--tokenizer", folder], "plan").recipe
    assert recipe.tokenizer == TrainTokenizerConfig(model=PublishedConfig(path=folder), train=None)
    assert read(json.loads(json.dumps(written(recipe)))) == recipe


def test_a_recipe_takes_an_artifact_by_its_folder(tmp_path, monkeypatch):
    (path,) = (DATA / "train_tokenizer").iterdir()
    for word in (str(path), str(DATA)):
        recipe = recipe_options(["debug", "--tokenizer", word], "plan").recipe
        assert recipe.tokenizer == str(path)
        assert read(json.loads(json.dumps(written(recipe)))) == recipe
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="latets"):
        recipe_options(["debug", "--tokenizer", "latets"], "plan")


def test_sizes_that_do_not_fit_and_critics_of_nothing_are_told(theirs):
    folder, _ = theirs
    with pytest.raises(ValueError, match="do not divide"):
        recipe_options(["debug", "--tokenizer", folder, "--image-size", "33", "32"], "plan")
    with pytest.raises(ValueError, match="leave out critic"):
        TrainTokenizerConfig(model=PublishedConfig(path=folder), train=None, critic=CriticConfig())
    # What is not on this machine may be on the cluster.
    away = TrainTokenizerConfig(model=PublishedConfig(path="/no"), train=None)
    assert replace(recipe_options(["debug"], "plan").recipe, tokenizer=away).tokenizer == away
