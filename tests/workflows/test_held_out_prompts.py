"""Prompts that are held out by construction: against the very rows that the corpus writes for training."""

import itertools
import json
import tarfile

import pytest

from t2i.evaluate.scenes import PLACES, Scene, Thing, describe, parse
from workflows.corpora import prompts
from workflows.corpora.prompts import RELATIONS, combinations, held_out_prompts, prompt_line
from workflows.corpora.shapes import ShapesConfig, scenes_of, split_of, write_shard

KINDS = ("short", "long", "compositional")
CONFIG = ShapesConfig(samples=3_000, labelled=100)


@pytest.fixture(scope="module")
def training():
    return list(scenes_of(CONFIG, "train"))


def test_training_scenes_are_those_that_are_written(tmp_path):
    config = ShapesConfig(samples=90, labelled=10, test_fraction=0.3, shard_size=50, seed=3)
    written = []
    for number in range(config.shards):
        with tarfile.open(write_shard(config, number, tmp_path)) as tar:
            rows = [json.load(tar.extractfile(each)) for each in tar if each.name.endswith(".json")]
        written += [(row["split"], Scene.from_dict(row["scene"])) for row in rows]
    for split in ("train", "test"):
        assert list(scenes_of(config, split)) == [scene for told, scene in written if told == split]


@pytest.mark.parametrize("kind", KINDS)
def test_no_training_scene_says_the_prompt(kind, training):
    asked = held_out_prompts(CONFIG, kind, 60)
    assert len({each.scene for each in asked}) == len({each.prompt for each in asked}) == 60
    said = {describe(scene, style) for scene in training for style in ("short", "descriptive")}
    assert not {each.prompt for each in asked} & said
    assert not {each.scene for each in asked} & set(training)
    assert held_out_prompts(CONFIG, kind, 60) == asked
    assert held_out_prompts(CONFIG, kind, 60, seed=1) != asked
    assert {each.kind for each in asked} == {kind}


def test_compositions_hold_no_training_combination(training):
    shown = {each for scene in training for each in combinations(scene)}
    asked = held_out_prompts(CONFIG, "compositional", 300)
    for each in asked:
        assert len(each.scene.objects) == 2
        assert not combinations(each.scene) & shown
    assert len({each for asking in asked for each in combinations(asking.scene)}) == 300  # each of another
    # What is new is how they meet: each object by itself was shown, in each colour, shape and place.
    alone = {(thing.color, thing.shape) for scene in training for thing in scene.objects}
    assert {(thing.color, thing.shape) for each in asked for thing in each.scene.objects} <= alone


def test_short_and_long_are_what_they_are_called():
    for each in held_out_prompts(CONFIG, "short", 40):
        assert each.prompt == describe(each.scene, "short")
        assert split_of(each.scene, CONFIG.test_fraction) == "test"
    for each in held_out_prompts(CONFIG, "long", 40):
        assert len(each.scene.objects) == 3
        assert len(parse(each.prompt).objects) == 3
        assert split_of(each.scene, CONFIG.test_fraction) == "test"


def test_a_combination_is_the_same_from_both_sides():
    one, other = Thing("circle", "red", "large", "top left"), Thing("square", "blue", "small", "bottom left")
    assert combinations(Scene((one, other), "white")) == {("red", "circle", "above", "blue", "square")}
    assert combinations(Scene((other, one), "black")) == combinations(Scene((one, other), "white"))
    assert combinations(Scene((one,), "white")) == set()
    pairs = [prompts._relation(*pair) for pair in itertools.combinations(PLACES, 2)]
    assert sorted(pairs) == sorted(["left of"] * 2 + ["above"] * 2 + ["above and left of", "above and right of"])
    assert set(pairs) == set(RELATIONS.values())


def test_a_line_has_all_that_judging_needs():
    asked = held_out_prompts(CONFIG, "short", 1)[0]
    line = prompt_line(asked)
    assert line["tag"] == "short"
    assert Scene.from_dict(json.loads(line["scene"])) == asked.scene
    assert {*line["include"][0]} == {"class", "color", "count"}
    assert line["prompt"] == asked.prompt


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (ShapesConfig(samples=50, labelled=0, test_fraction=0), "short"),
        (ShapesConfig(samples=50, labelled=0, test_fraction=0), "long"),
        (ShapesConfig(samples=50, labelled=0, max_objects=1), "compositional"),
    ],
)
def test_where_nothing_is_held_out(config, kind):
    with pytest.raises(ValueError, match=f"Of 9 {kind} prompts 0 were found"):
        held_out_prompts(config, kind, 9)
    with pytest.raises(ValueError, match="count must be at least 1"):
        held_out_prompts(CONFIG, kind, 0)
