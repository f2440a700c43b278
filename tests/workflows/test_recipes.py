"""Every recipe is alive: it builds, survives JSON, plans on an empty store, and is what it was."""

import json
from pathlib import Path

import pytest

from infra.config import fingerprint, from_dict, to_dict
from infra.store import Plan
from workflows import text_to_image
from workflows.corpora.shapes import ShapesConfig, write_shards
from workflows.recipes import RECIPES
from workflows.text_to_image import STEPS, Recipe

GOLDEN = Path(__file__).with_name("recipes.json")  # to change one on purpose, write what the failing test says


def build(name, corpus="corpus/*.tar"):
    return RECIPES[name](corpus=corpus) if name in ("nlvr", "emoji") else RECIPES[name]()


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_what_it_was(name):
    assert fingerprint(build(name)) == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize("name", RECIPES)
def test_it_survives_json(name):
    recipe = build(name)
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert recipe.name == name


@pytest.mark.parametrize("name", RECIPES)
def test_it_plans_on_an_empty_store(name, tmp_path):
    write_shards(ShapesConfig(samples=20, labelled=2, shard_size=20), str(tmp_path / "corpus"))
    plan = Plan(str(tmp_path / "store"))
    text_to_image.run(build(name, f"{tmp_path}/corpus/*.tar"), plan)
    assert [line[0] for line in plan.lines] == [work.name for work in STEPS]
    assert {line[2] for line in plan.lines} == {"first time"}


@pytest.mark.parametrize("name", ["debug", "demo"])
def test_a_seed_changes_every_step(name):
    ids = []
    for seed in (0, 1):
        plan = Plan("/nowhere")
        text_to_image.run(RECIPES[name](seed=seed), plan)
        ids.append({line[0]: line[1] for line in plan.lines})
    assert all(ids[0][step] != ids[1][step] for step in ids[0])
