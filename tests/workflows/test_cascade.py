"""Two priors of pixels on a corpus that is there: trained, drawn through one chain, scored; and what cannot be."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from infra import storage
from infra.cluster import Cluster
from infra.data.images import decode
from infra.data.shards import ShardReader, joined_names
from infra.store import Artifact, Store
from infra.train.optim import OptimConfig
from t2i.conditions.codes import CodesConfig
from t2i.conditions.pictures import SmallerConfig
from t2i.conditions.words import WordsConfig
from t2i.diffusion.prior import DiffusionConfig, DiffusionSampling
from t2i.diffusion.unet import UNetConfig
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.tokenizers.pixels import PixelsConfig
from tests import kills
from workflows.api import load
from workflows.cascade import CascadeRecipe, LinkTraining
from workflows.encode import EncodeConfig, encode
from workflows.kinds import read, written
from workflows.sample import LinkConfig, SampleConfig
from workflows.text_to_image import Recipe
from workflows.train_prior import TrainPriorConfig, train_prior
from workflows.train_tokenizer import MODEL, TrainTokenizerConfig, train_tokenizer

DATA = Path(__file__).parents[1] / "data" / "d3c69f4" / "store"
CLUSTER = Cluster(name="test", actors=(1, 1))
NET = UNetConfig(
    channels=16, width=32, multipliers=(1,), attention_levels=(0,), blocks=1, head_width=8, groups=8, patch=4
)


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


def two_links() -> CascadeRecipe:
    """On what the recipe of the store made: 8x8 pixels from words, 16x16 from these and the words."""
    base = read(storage.read_json(str(DATA.parent / "recipe.json")))
    assert isinstance(base, Recipe)
    words, smaller = WordsConfig(vocabulary_size=64, length=12), SmallerConfig(size=(8, 8), noise=0.3)
    short = replace(base.prior.train, steps=2, batch=8)
    optim = OptimConfig(warmup_steps=1, muon=True, ema_decay=0.9)
    priors = [
        TrainPriorConfig(model=DiffusionConfig(network=NET), conditions=told, train=short, optim=optim)
        for told in ((words,), (words, smaller))
    ]
    drawn = DiffusionSampling(steps=2, guidance=2.0)
    further = LinkConfig(sampling=replace(drawn, noised={"smaller": 0.1}))
    return CascadeRecipe(
        name="two",
        corpus=base.corpus,
        captioner=base.captioner,
        captions=base.captions,
        mix=base.mix,
        links=tuple(LinkTraining(tokenizer=pixels(8 * (place + 1)), prior=prior) for place, prior in enumerate(priors)),
        sample=SampleConfig(count=5, sampling=drawn, links=(further,)),
        report=base.report,
    )


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_cascade_runs_and_every_command_knows_it(ray_cluster, tmp_path):
    store, line = str(tmp_path / "runs"), str(tmp_path / "two.json")
    shutil.copytree(DATA, store)
    storage.write_json(line, written(two_links()))
    code, results, said = kills.here("run", line, "--store", store, "--json")
    assert code == 0, said
    assert said.count("done already") == 4, "the corpus and its captions are there"
    (drawn,) = set(storage.list_names(f"{store}/sample")) - {made("sample").id}
    samples = Artifact.open(f"{store}/sample/{drawn}")
    assert [each.step for each in samples.inputs] == ["mix", *["train_prior", "train_tokenizer"] * 2]
    (shard,) = joined_names([samples.path])
    pictures = ShardReader([samples.path], shard).columns(["image"])["image"]
    assert [decode(each).shape for each in pictures] == [(16, 16, 3)] * 5
    assert 0 <= results["object_score"] <= 1
    assert "rebuilt_scene_score" not in results, "pixels rebuild nothing"
    assert "train_prior 2" in Path(results["report"]).read_text()

    code, again, said = kills.here("run", line, "--store", store, "--json")
    assert code == 0
    assert "All was done already." in said
    assert again["prior"] == results["prior"]
    code, planned, _ = kills.here("plan", line, "--store", store, "--links.1.prior.train.steps", "3", "--json")
    reasons = [(step["step"], step["reason"]) for step in planned["steps"] if step["reason"] != "done"]
    assert [step for step, _ in reasons] == ["train_prior", "sample", "evaluate"]
    assert reasons[0][1] == "train.steps 2 -> 3"
    code, proved, said = kills.here("verify", store, "--json")
    assert code == 0, said
    assert proved["whole"]
    code, _, said = kills.here("retry", samples.path)
    assert code == 1
    assert "No row" in said

    first, second = (each for each in samples.inputs if each.step == "train_prior")
    assert storage.read_json(second.url(MODEL, "config.json"))["given"] == {"smaller": "pixels"}
    painter = load(first.path)
    assert painter.sampling == DiffusionSampling(steps=2, guidance=2.0)
    assert painter.sample("a red circle")[0].size == (8, 8)
    with pytest.raises(ValueError, match="hears of 'pixels', which nobody told"):
        load(second.path).sample("a red circle")
