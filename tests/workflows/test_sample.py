"""Pictures for prompts of one's own: from a prior and its tokenizer, as its recipe draws; unknown words are told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.config import from_dict
from infra.store import Artifact
from t2i.priors.sampling import SamplingConfig
from t2i.vocabulary import TextVocabulary
from tests import kills
from workflows.options import WORK, named_fields
from workflows.sample import SampleConfig

DATA = Path(__file__).parents[1] / "data" / "b3c7a06" / "store"


@pytest.fixture
def root(tmp_path):
    """A store that a recipe made."""
    shutil.copytree(DATA, tmp_path / "runs")
    return str(tmp_path / "runs")


def only(root: str, step: str) -> str:
    (name,) = storage.list_names(storage.join(root, step))
    return storage.join(root, step, name)


def sampling_of(path: str) -> SamplingConfig:
    return from_dict(SampleConfig, Artifact.open(path).manifest["config"]).sampling


def draw(root: str, *more: str) -> tuple[Any, Any, str]:
    prior, tokenizer = (only(root, step) for step in ("train_prior", "train_tokenizer"))
    return kills.here("sample", "--prior", prior, "--tokenizer", tokenizer, "--store", root, *more, "--json")


def test_without_a_mixture_as_the_recipe_draws(root):
    recipes = Artifact.open(only(root, "sample"))
    code, results, said = draw(root, "--prompts", "a large red circle", "a small blue cross")
    assert code == 0, said
    made = Artifact.open(results["artifact"])
    assert sampling_of(made.path) == sampling_of(recipes.path)
    assert [each.step for each in made.inputs] == ["train_prior", "train_tokenizer"]
    assert f"Drawn as {recipes.path} was: guidance" in said
    assert f"2 pictures: {made.path}/images" in said
    listed = json.loads(Path(made.url("samples.json")).read_text())
    assert [row["prompt"] for row in listed] == ["a large red circle", "a small blue cross"]
    assert all(Path(made.url(row["image"])).exists() for row in listed)
    assert draw(root, "--prompts", "a large red circle", "a small blue cross")[1] == results, "it is found again"


def test_options_stand_before_the_recipe_and_other_prompts_are_no_recipe(root):
    recipes = sampling_of(only(root, "sample"))
    _, made, _ = draw(root, "--prompts", "a red circle", "--sampling.top-k", "3", "--sampling.temperature=0.5")
    assert sampling_of(made["artifact"]) == replace(recipes, top_k=3, temperature=0.5)
    _, made, _ = draw(root, "--prompts", "a blue circle")
    assert sampling_of(made["artifact"]) == recipes


def test_without_a_recipes_pictures_the_defaults_count(root):
    shutil.rmtree(storage.join(root, "sample"))
    code, results, said = draw(root, "--prompts", "a red circle")
    assert code == 0
    assert sampling_of(results["artifact"]) == SamplingConfig()
    assert "Drawn as" not in said


def test_nothing_to_draw(root):
    code, _, said = draw(root)
    assert code == 1
    assert "Say what to draw: give prompts, or a mixture" in said


def test_words_that_the_vocabulary_does_not_have(root):
    code, results, said = draw(root, "--prompts", "two large Squares, red!", "a red elephant")
    assert code == 0
    assert results["unknown_words"] == ["two", "squares", "elephant"]
    assert "has no word 'two' nor 'squares' nor 'elephant'" in said
    assert "unknown_words" not in draw(root, "--prompts", "a LARGE red circle.")[1]


def test_what_is_no_word_of_a_vocabulary():
    vocabulary = TextVocabulary.train(["a red circle, at the top-left"] * 3, 1000, 20)
    assert vocabulary.unknown(["Red   circle; at top", "a... (red)", ""]) == []
    assert vocabulary.unknown(["redder circles", "red élan 7", "redder"]) == ["redder", "circles", "élan", "7"]


def test_which_inputs_a_step_does_without():
    assert WORK["sample"].input_names == {"mixture": True, "prior": False, "tokenizer": False}
    assert [name for name, without in WORK["evaluate"].input_names.items() if not without] == ["images", "captions"]
    assert named_fields(["--sampling.top-k", "3", "--sampling.guidance=2", "--seed", "1"], "--sampling.") == [
        "top_k",
        "guidance",
    ]
