"""Recipes of every kind: written with their kind and read again, listed as they run, and known to every command."""

import dataclasses
import json
from dataclasses import dataclass, replace
from operator import attrgetter

import pytest

from infra import storage
from infra.config import FieldError, to_dict
from infra.store import Plan, step
from workflows import kinds, recipes, verbs
from workflows.__main__ import main
from workflows.cascade import CascadeRecipe
from workflows.clip import ClipRecipe
from workflows.kinds import parts_of, read, written
from workflows.options import WORK, recipe_options
from workflows.recipes import RECIPES, demo
from workflows.text_to_image import Recipe
from workflows.tokenizers import TokenizersRecipe
from workflows.yardstick import YardstickRecipe


def build(name):
    return RECIPES[name](corpus="corpus/*.tar") if name in ("nlvr", "emoji", "own") else RECIPES[name]()


@dataclass(frozen=True, kw_only=True)
class NoteConfig:
    """What is noted."""

    text: str = "well"


@step(version=1)
def note(config: NoteConfig, *, out, cluster, report):
    """Note it."""
    storage.write_json(storage.join(out, "note.json"), config.text)
    return {"letters": len(config.text)}


@dataclass(frozen=True, kw_only=True)
class NotesRecipe:
    """A kind of somebody else's."""

    name: str
    notes: tuple[NoteConfig, ...]
    last: NoteConfig | str | None = None

    def run(self, store):
        """Note all."""
        for each in self.notes:
            made = store.step(note, each)
        return store.step(note, self.last) or made


def notes(seed: int = 0) -> NotesRecipe:
    """Two notes."""
    return NotesRecipe(name="notes", notes=(NoteConfig(), NoteConfig(text="ill" * (seed + 1))))


@pytest.fixture
def notes_there(monkeypatch):
    """A package that adds a recipe of a kind of its own."""
    monkeypatch.setattr(recipes, "others", lambda group: {"notes": notes})


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json_and_is_listed_as_it_runs(name):
    recipe = build(name)
    assert read(json.loads(json.dumps(written(recipe)))) == recipe
    parts = parts_of(recipe)
    by_option = {part.field: part.config for part in parts}
    assert len(by_option) == len(parts)
    for field, config in by_option.items():
        value = recipe
        for word in field.split("."):
            value = value[int(word)] if word.isdigit() else getattr(value, word)
        assert value is config
    if name not in ("nlvr", "emoji", "own"):
        plan = Plan("/nowhere")
        recipe.run(plan)
        assert [line[0] for line in plan.lines] == [part.work.name for part in parts]


def test_a_file_without_a_kind_is_of_the_first():
    assert "class" not in written(demo())
    assert read(to_dict(demo())) == demo()
    assert written(RECIPES["cascade"]())["class"] == "CascadeRecipe"
    with pytest.raises(FieldError, match=r"one of Recipe, .*CascadeRecipe.*, found 'Cascade'"):
        read({**written(demo()), "class": "Cascade"})
    with pytest.raises(FieldError, match="no field 'links'"):
        read({"name": "a", "links": []})
    with pytest.raises(FieldError, match="an object"):
        read(["demo"])


def test_a_cascade_shares_what_the_demo_has():
    plans = {name: Plan("/nowhere") for name in ("demo", "cascade")}
    for name, plan in plans.items():
        RECIPES[name]().run(plan)
    shared = ["ingest", "train_captioner", "recaption", "mix"]
    first = {name: [line for line in plan.lines if line[0] in shared] for name, plan in plans.items()}
    assert first["demo"] == first["cascade"]
    assert [line[0] for line in first["demo"]] == shared


def test_the_options_of_a_cascade():
    line = ["cascade", "--links.1.prior.train.steps", "7", "--image-size", "64", "64", "--captioner", "none"]
    recipe = recipe_options(line, "plan").recipe
    assert isinstance(recipe, CascadeRecipe)
    assert [link.prior.train.steps for link in recipe.links][1] == 7
    assert recipe.corpus.image_size == (64, 64)
    assert (recipe.captioner, recipe.captions) == (None, None)
    with pytest.raises(ValueError, match="32x128 have other proportions than 16x16"):
        recipe_options(["cascade", "--image-size", "32", "128"], "plan")
    with pytest.raises(ValueError, match="at least one link"):
        replace(RECIPES["cascade"](), links=())


@pytest.mark.parametrize(
    "work", [work for work in WORK.values() if work.name.startswith("train_")], ids=attrgetter("name")
)
def test_what_a_step_trains_is_known_before(work):
    assert isinstance(work.config_class.trainings, property)


def test_the_settings_of_a_cascade_tell_its_priors_apart(capsys):
    main(["settings", "cascade", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == ["train_captioner", "train_prior", "train_prior 2"]
    assert list(shown["train_prior 2"]["updates"]) == ["prior"]


def test_a_kind_of_another_package(notes_there, tmp_path, capsys, monkeypatch):
    """It runs, is planned, shown and read from a file, and nothing else needs to know of it."""
    monkeypatch.chdir(tmp_path)
    results = verbs.run(["notes", "--seed", "1", "--store", "runs"])
    assert results["letters"] == 6
    assert storage.read_json(storage.join(results["artifact"], "note.json")) == "illill"
    assert "report" not in results
    storage.write_json(str(tmp_path / "own.json"), verbs.recipe_of(["notes", "--notes.0.text", "fine"]))
    assert read(storage.read_json(str(tmp_path / "own.json"))) == replace(
        notes(), notes=(NoteConfig(text="fine"), NoteConfig(text="ill"))
    )
    planned = verbs.plan(["own.json", "--notes.1.text", "illill", "--store", "runs"])
    assert [each["reason"] for each in planned["steps"]] == ['text "well" -> "fine"', "done"]
    assert verbs.settings(["notes"]) == {}
    with_path = replace(notes(), last="runs/note")
    assert [(part.field, part.config) for part in parts_of(with_path)][2:] == [("last", "runs/note")]
    assert kinds.read({"class": "NotesRecipe", "name": "n", "notes": []}).notes == ()
    with pytest.raises(ValueError, match=r"There is no option --captioner\. (?!Did you mean --captioner\?)"):
        recipe_options(["notes", "--captioner", "none"], "plan")


def test_every_kind_is_a_frozen_dataclass_with_a_name():
    for name in RECIPES:
        recipe = build(name)
        assert recipe.name == name
        assert isinstance(recipe, Recipe | CascadeRecipe | ClipRecipe | TokenizersRecipe | YardstickRecipe)
        with pytest.raises(dataclasses.FrozenInstanceError):
            recipe.name = "other"
