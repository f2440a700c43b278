"""Every recipe is alive: it builds, survives JSON, plans on an empty store, and is what it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from captioner.backends.vllm import VLLMConfig
from infra.cluster import Cluster
from infra.config import fingerprint, from_dict, to_dict
from infra.store import Plan, Store
from workflows.corpora.shapes import ShapesConfig, write_shards
from workflows.ingest import IngestConfig, ingest
from workflows.options import recipe_options
from workflows.recipes import RECIPES
from workflows.text_to_image import STEPS, Recipe
from workflows.train_captioner import TrainCaptionerConfig

GOLDEN = Path(__file__).with_name("recipes.json")  # to change one on purpose, write what the failing test says


def build(name, corpus="corpus/*.tar"):
    return RECIPES[name](corpus=corpus) if name in ("nlvr", "emoji", "own") else RECIPES[name]()


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_what_it_was(name):
    assert fingerprint(build(name)) == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize("name", RECIPES)
def test_it_survives_json(name):
    recipe = build(name)
    assert from_dict(type(recipe), json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert recipe.name == name


@pytest.mark.parametrize("name", RECIPES)
def test_it_plans_on_an_empty_store(name, tmp_path):
    write_shards(ShapesConfig(samples=20, labelled=2, shard_size=20), str(tmp_path / "corpus"))
    plan = Plan(str(tmp_path / "store"))
    recipe = build(name, f"{tmp_path}/corpus/*.tar")
    recipe.run(plan)
    if isinstance(recipe, Recipe):
        without = ("train_captioner", "recaption") if name == "own" else ()
        assert [line[0] for line in plan.lines] == [work.name for work in STEPS if work.name not in without]
    assert {line[2] for line in plan.lines} == {"first time"}


@pytest.mark.parametrize("name", ["debug", "demo", "cascade"])
def test_a_seed_changes_every_step(name):
    ids = []
    for seed in (0, 1):
        plan = Plan("/nowhere")
        RECIPES[name](seed=seed).run(plan)
        ids.append({line[1] for line in plan.lines})
    assert not ids[0] & ids[1]


def test_what_stands_in_place_of_a_config(tmp_path):
    """A path is an artifact that is there; nothing is a step that is left out."""
    write_shards(ShapesConfig(samples=20, labelled=2, shard_size=20), str(tmp_path / "corpus"))
    store = Store(str(tmp_path / "store"), Cluster(name="test"))
    corpus = IngestConfig(corpus=f"{tmp_path}/corpus/*.tar", image_size=(32, 32))
    images = store.step(ingest, corpus)
    assert store.step(ingest, images.path).path == images.path
    assert store.step(ingest, None) is None
    plan = Plan(store.root)
    recipe = replace(build("own", corpus.corpus), captioner=None, captions=images.path, corpus=corpus)
    recipe.run(plan)
    assert [line for line in plan.lines if line[0] == "ingest"] == [("ingest", images.id, "done")] * 2
    with pytest.raises(FileNotFoundError, match="no finished artifact"):
        store.step(ingest, str(tmp_path))
    with pytest.raises(ValueError, match="Nobody writes the captions"):
        replace(build("debug"), captioner=None)


def test_a_captioner_by_a_word(tmp_path):
    line = ["debug", "--captioner", "http://localhost:1/v1"]
    with pytest.raises(ValueError, match=r"Name the model.*: --model NAME"):
        recipe_options(line, "plan")
    none = recipe_options(["debug", "--captioner", "none"], "plan").recipe
    assert (none.captioner, none.captions) == (None, None)
    vllm = recipe_options(["debug", "--captioner", "vllm:a/b"], "plan").recipe
    assert vllm.captioner == TrainCaptionerConfig(model=VLLMConfig(model="a/b"), base=None, styles=())
    assert recipe_options(["debug", "--captioner.seed", "7"], "plan").recipe.captioner.seed == 7
