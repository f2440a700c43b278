"""A corpus of one's own, captioned by a server, by what is there or by nobody, to a trained model and a report."""

import json
from pathlib import Path

import pytest

from tests import kills
from tests.captioner.backends import server
from workflows.corpora.shapes import ShapesConfig, write_shards

pytestmark = [pytest.mark.long]
FEW = {"steps": 6, "batch": 16, "log-every-steps": 2, "save-every-steps": 3}
SHORT = [
    *(word for part in ("tokenizer", "prior") for name, value in FEW.items()
      for word in (f"--{part}.train.{name}", str(value))),
    "--sample.count", "4", "--report.rebuilt", "8",
]  # fmt: skip


def run(*arguments):
    code, results, errors = kills.here(*arguments)
    assert code == 0, errors
    return results, errors


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(ShapesConfig(samples=160, labelled=1, test_fraction=0.2, shard_size=40), str(folder))
    return f"{folder}/{{00000..00003}}.tar"


@pytest.fixture(scope="module")
def served(ray_cluster, corpus, tmp_path_factory):
    """A store that one line filled, by a served captioner; what it printed; the pictures' sizes; how often it asked."""
    store = str(tmp_path_factory.mktemp("store"))
    endpoint = server.Endpoint(
        lambda body, number: server.completion("a red circle and a blue square on white", finish_reason="stop")
    )
    line = ["run", "own", "--corpus", corpus, "--captioner", endpoint.url, "--model", "m", "--store", store, *SHORT]
    try:
        results, _ = run(*line, "--json")
        asked = len(endpoint.bodies)
        again, said = run(*line, "--json")
        assert len(endpoint.bodies) == asked
        assert "All was done already" in said
        assert again["report"] == results["report"]
        return store, results, {server.picture(body).size for body in endpoint.bodies}, asked
    finally:
        endpoint.close()


@pytest.mark.timeout(400)
def test_a_served_captioner_is_a_recipes(served, corpus):
    _, results, sizes, asked = served
    assert asked == 2 * 160  # short and descriptive, of every picture
    assert sizes == {(32, 32)}, "it saw pictures as the corpus has them, and not the copies of 64x64"
    page = Path(results["report"]).read_text()
    assert "Short, rewritten" in page
    assert "Descriptive, rewritten" in page
    assert Path(results["captioner"]).parent.name == "train_captioner"
    assert results["prior"]
    assert "scene_score" not in results, "nobody knows the scenes of one's own pictures"


@pytest.mark.timeout(400)
def test_nobody_captions(served, corpus):
    store, *_ = served
    results, _ = run("run", "own", "--corpus", corpus, "--store", store, *SHORT, "--json")
    assert "captioner" not in results
    assert Path(results["report"]).is_file()
    mixtures = [json.loads(path.read_text()) for path in Path(store, "mix").glob("*/manifest.json")]
    (alone,) = [each for each in mixtures if each["config"]["weights"] == {"alt": 1.0}]
    assert alone["inputs"][0] == alone["inputs"][1]
    code, _, errors = kills.here("verify", store, "--json")
    assert code == 0, errors


@pytest.mark.timeout(400)
def test_captions_that_are_there_are_taken(served, corpus):
    store, before, *_ = served
    (captions,) = Path(store, "recaption").iterdir()
    line = ["run", "own", "--corpus", corpus, "--store", store, *SHORT, "--captions", str(captions)]
    results, _ = run(*line, "--captioner", "http://127.0.0.1:9/v1", "--model", "another", "--json")
    assert results["prior"] == before["prior"], "the same captions, the same model"
