"""Prompts that a corpus holds out go to a file, which draws pictures and compares models."""

import json
import shutil
from pathlib import Path

import pytest

from infra import storage
from infra.config import from_dict
from infra.store import Artifact
from t2i.evaluate.scenes import Scene
from tests import kills
from tests.workflows.test_evaluate import make
from workflows.corpora.prompts import combinations, held_out_prompts
from workflows.corpora.shapes import scenes_of
from workflows.ingest import IngestConfig

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """What a recipe made of 160 scenes."""
    shutil.copytree(DATA / "d3c69f4" / "store", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    (images,) = (tmp_path / "runs" / "ingest").iterdir()
    return from_dict(IngestConfig, Artifact.open(str(images)).manifest["config"]).corpus


@pytest.mark.parametrize("kind", ["short", "long", "compositional"])
def test_a_file_of_each_kind_holds_nothing_of_training(store, kind):
    code, told, said = kills.here("prompts", kind, "--count", "20", "--json")
    assert code == 0, said
    assert told["prompts"] == 20
    assert Path(told["file"]) == Path(f"{kind}.jsonl").absolute()
    lines = [json.loads(text) for text in Path(told["file"]).read_text().splitlines()]
    scenes = [Scene.from_dict(json.loads(line["scene"])) for line in lines]
    assert [line["prompt"] for line in lines] == [each.prompt for each in held_out_prompts(store, kind, 20)]
    training = set(scenes_of(store, "train"))
    assert len(set(scenes)) == 20
    assert not set(scenes) & training
    if kind == "compositional":
        assert not {each for scene in scenes for each in combinations(scene)} & {
            each for scene in training for each in combinations(scene)
        }
    assert {line["tag"] for line in lines} == {kind}


def test_they_are_drawn_and_compared(store):
    """Pictures are judged by the scene that each asks for."""
    assert kills.here("prompts", "compositional", "--count", "2", "--images", "runs", "--out", "new.jsonl")[0] == 0
    code, drawn, said = kills.here("sample", "--prior", "runs", "--prompts-file", "new.jsonl", "--json")
    assert code == 0, said
    assert drawn["samples"] == 2
    line = ("compare", "runs", drawn["artifact"], "--names", "a", "b", "--json")
    code, told, said = kills.here(*line)
    assert code == 0, said
    found = storage.read_json(Artifact.open(told["artifact"]).url("compare.json"))
    assert found["pictures"] == found["models"][0]["scene_score_n"] == 2
    assert found["differences"][0]["scene_score"] == 0
    code, again, said = kills.here("compare", "runs", "runs", "--prompts-file", "new.jsonl", "--seed", "3", "--json")
    assert code == 0, said
    assert again["pictures"] == 2
    assert "scene_score" in storage.read_json(Artifact.open(again["artifact"]).url("compare.json"))["models"][1]


def test_what_has_no_such_prompts_is_said(store, tmp_path):
    other = make(tmp_path / "x", "ingest", config={"corpus": "photos/*.tar"})
    code, _, said = kills.here("prompts", "short", "--images", other.path)
    assert code == 1
    assert "no index of the built-in Shapes" in said
    assert kills.here("prompts", "tall")[0] == 2
