"""Buckets through the steps: what cannot hear several sizes refuses before anything starts."""

import pytest

from infra.cluster import laptop
from infra.config import from_dict, to_dict
from infra.store import Artifact
from t2i.tokenizers.patch_vqgan import PatchVQGANConfig
from workflows import recipes, train_tokenizer, verbs
from workflows.recaption import _is_published, tell_copies
from workflows.text_to_image import Recipe
from workflows.train_prior import TrainPriorConfig, train_prior
from workflows.train_tokenizer import TrainTokenizerConfig, image_sizes

BUCKETS = ["--corpus.buckets", "32", "32", "32", "64", "--corpus.image-size", "None"]


@pytest.mark.parametrize("verb", [verbs.plan, verbs.run])
def test_a_recipe_with_buckets_is_refused_by_plan(tmp_path, verb):
    with pytest.raises(ValueError, match=r"learns pictures of one size, but buckets give them 2 \(32x32, 32x64\)"):
        verb(["debug", *BUCKETS, "--store", str(tmp_path / "store")])
    assert not (tmp_path / "store").exists(), "nothing was made"


def test_so_is_one_from_a_file():
    table = to_dict(recipes.debug())
    table["corpus"] |= {"buckets": [[32, 32], [32, 64]], "image_size": None}
    with pytest.raises(ValueError, match="learns pictures of one size"):
        from_dict(Recipe, table)
    table["corpus"]["buckets"] = [[32, 64]]  # one size is one size
    assert from_dict(Recipe, table).corpus.sizes == ((32, 64),)


def test_a_prior_refuses_codes_of_several_grids(tmp_path):
    codes = Artifact(str(tmp_path), {"summary": {"grids": {"8x8": [2, 2], "8x16": [2, 4]}, "codebook_size": 4}})
    other = Artifact(str(tmp_path), {})
    with pytest.raises(ValueError, match="learns pictures of one size"):
        train_prior.work(
            TrainPriorConfig(), other, codes, other, out=str(tmp_path), cluster=laptop(), report=lambda *_, **__: None
        )


def ingested(**config):
    return Artifact("images", {"config": {"image_size": None, **config}, "id": "0"})


def test_sizes_of_copies():
    assert image_sizes(ingested(image_size=[8, 9])) == [(8, 9)], "an index from before there were buckets"
    assert image_sizes(ingested(image_size=[8, 9], buckets=[])) == [(8, 9)]
    assert image_sizes(ingested(buckets=[[8, 9], [4, 4]])) == [(8, 9), (4, 4)]
    with pytest.raises(ValueError, match="differ in size"):
        image_sizes(ingested(buckets=[]))


def train(images, monkeypatch):
    """The column by which the step trains, and what it says of it."""
    seen = []

    def fit(trainings, cluster, report):
        seen.extend(trainings)
        return {"step": 1, "rows": 2}

    monkeypatch.setattr(train_tokenizer, "fit", fit)
    monkeypatch.setattr(train_tokenizer, "demand_rows", lambda images: None)
    config = TrainTokenizerConfig(model=PatchVQGANConfig(patch=4))
    summary = train_tokenizer.train_tokenizer.work(config, images, out="out", cluster=laptop(), report=None)
    return seen[0].task.bucket, summary


def test_a_tokenizer_is_trained_by_bucket_where_there_are_some(monkeypatch):
    assert train(ingested(image_size=[8, 12]), monkeypatch) == (None, {"steps": 1, "rows": 2, "size": [8, 12]})
    bucket, summary = train(ingested(buckets=[[8, 12], [4, 4]]), monkeypatch)
    assert (bucket, summary["sizes"]) == ("bucket", [[8, 12], [4, 4]])
    with pytest.raises(ValueError, match="4x6 do not divide"):
        train(ingested(buckets=[[8, 12], [4, 6]]), monkeypatch)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, None),
        ({"image_size": None, "buckets": []}, None),
        ({"image_size": [8, 12]}, "(8x12, stretch)"),
        ({"buckets": [[8, 12], [4, 4]], "fit": "crop"}, "(8x12, 4x4, crop)"),
    ],
)
def test_a_captioner_from_elsewhere_does_not_see_copies_unsaid(config, told, capsys):
    tell_copies(ingested(**config))
    said = capsys.readouterr().err
    assert (told in said and "not trained here" in said) if told else not said


def test_who_was_trained_here():
    for config, published in [
        ({"model": "org/blip", "base": None, "styles": []}, True),
        ({"model": "org/blip", "base": None, "styles": [{"name": "short"}]}, False),
        ({"model": {}, "base": {"steps": 1}, "styles": []}, False),
    ]:
        assert _is_published(Artifact("captioner", {"config": config})) == published
