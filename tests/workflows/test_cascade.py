"""Two priors of pixels on a corpus that is there: trained, drawn through one chain, scored; and what cannot be."""

from dataclasses import replace
from pathlib import Path

import pytest

from infra.cluster import Cluster
from infra.store import Artifact, Store
from t2i.conditions.codes import CodesConfig
from t2i.conditions.pictures import SmallerConfig
from t2i.conditions.words import WordsConfig
from t2i.diffusion.prior import DiffusionConfig
from t2i.diffusion.unet import UNetConfig
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.tokenizers.pixels import PixelsConfig
from workflows.encode import EncodeConfig, encode
from workflows.train_prior import TrainPriorConfig, train_prior
from workflows.train_tokenizer import TrainTokenizerConfig, train_tokenizer

DATA = Path(__file__).parents[1] / "data" / "d3c69f4" / "store"
CLUSTER = Cluster(name="test", actors=(1, 1))
NET = UNetConfig(channels=16, multipliers=(1,), attention_levels=(0,), blocks=1, head_width=8, groups=8, patch=4)


def made(step: str) -> Artifact:
    (path,) = (DATA / step).iterdir()
    return Artifact.open(str(path))


def pixels(side: int) -> TrainTokenizerConfig:
    return TrainTokenizerConfig(model=PixelsConfig(size=(side, side)), train=None)


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"), CLUSTER)


def test_pixels_are_named_and_nothing_is_trained(store):
    tokenizer = store.step(train_tokenizer, pixels(8), made("ingest"))
    assert tokenizer.summary == {"size": [16, 16]}
    assert sorted(tokenizer.manifest["files"]) == ["model/config.json", "model/model.safetensors"]
    with pytest.raises(ValueError, match="16x16 have other proportions than 8x16"):
        store.step(train_tokenizer, TrainTokenizerConfig(model=PixelsConfig(size=(8, 16)), train=None), made("ingest"))
    with pytest.raises(ValueError, match=r"has no codes to write.*without `codes`"):
        store.step(encode, EncodeConfig(), made("ingest"), tokenizer)


def test_what_learns_says_how_long_and_pixels_do_not():
    with pytest.raises(ValueError, match="learns nothing"):
        TrainTokenizerConfig(model=PixelsConfig(size=(8, 8)))
    with pytest.raises(ValueError, match="how long"):
        TrainTokenizerConfig(train=None)
    assert TrainTokenizerConfig(model=PixelsConfig(size=(8, 8)), train=None).trainings == []


@pytest.mark.parametrize(
    ("model", "side", "said"),
    [
        (AutoregressiveConfig(), 8, "draws codes"),
        (DiffusionConfig(network=replace(NET, patch=3)), 8, "patches of 3 pixels"),
    ],
)
def test_a_prior_that_does_not_draw_pixels_is_told_before_anything_starts(store, model, side, said):
    tokenizer = store.step(train_tokenizer, pixels(side), made("ingest"))
    with pytest.raises(ValueError, match=said):
        store.step(train_prior, TrainPriorConfig(model=model), made("mix"), None, tokenizer)


def test_codes_are_asked_for_where_the_tokenizer_has_some(store):
    with pytest.raises(ValueError, match="give the `codes` that `encode` made"):
        store.step(train_prior, TrainPriorConfig(), made("mix"), None, made("train_tokenizer"))
    config = TrainPriorConfig(model=DiffusionConfig(network=NET))
    with pytest.raises(ValueError, match="draws continuous values"):
        store.step(train_prior, config, made("mix"), made("encode"), made("train_tokenizer"))


def test_what_a_condition_hears_of_others_is_kept_beside_the_prior(monkeypatch, store):
    """The picture, and the values of another tokenizer, by its artifact's id."""
    from workflows import train_prior as module

    def fit(trainings, cluster, report):
        (training,) = trainings
        assert training.task.reads[0] == training.task.column == "pixels"
        given.append(training.task.shape.given)
        return {"step": 0, "rows": 0}

    given: list[dict[str, str]] = []
    monkeypatch.setattr(module, "fit", fit)
    tokenizer = store.step(train_tokenizer, pixels(8), made("ingest"))
    told = (
        WordsConfig(vocabulary_size=64, length=8),
        SmallerConfig(size=(4, 4)),
        CodesConfig(name="map", column="codes", codes=240, places=64),
    )
    config = TrainPriorConfig(model=DiffusionConfig(network=NET), conditions=told)
    store.step(train_prior, config, made("mix"), None, tokenizer, made("encode"))
    assert given == [{"smaller": "pixels", "map": made("train_tokenizer").id}]
