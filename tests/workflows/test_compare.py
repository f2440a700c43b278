"""Models on the same prompts: scores, paired differences, costs, the sheet and the page."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infra import storage
from infra.cluster import Cluster
from infra.config import from_dict
from infra.data.images import decode, encode_png
from infra.store import Artifact, Store
from t2i.clip import embedder
from t2i.evaluate import intervals
from t2i.evaluate.comparison import GAP, LINE, contact_sheet, figure
from t2i.evaluate.scenes import describe
from t2i.evaluate.skills import judge, skill_rows, skill_scores
from t2i.priors.task import load_prior
from tests import kills
from tests.browser import in_browser, seen
from tests.workflows.test_evaluate import make
from workflows import compared, yardstick
from workflows.compare import CompareConfig, compare, costs_of, line_of, parameters_of
from workflows.corpora.shapes import draw_scene, render
from workflows.options import step_options
from workflows.sample import SampleConfig, sample
from workflows.yardstick import corpus_of

DATA = Path(__file__).parents[1] / "data"
HOSTILE = """<script>document.title="owned"</script><img src=x onerror='document.title="owned"'>{{ 7*7 }}"""
CLUSTER = Cluster(name="test", actors=(1, 1))


def silent(*_, **__): ...


def pictures(root, name, scenes, wrong=(), prompts=None, without=()):
    """What `sample` drew for scenes; those in `wrong` show another one."""
    made, listed = make(root / name, "sample", config={"seed": 0}, summary={"samples": len(scenes)}), []
    for number, scene in enumerate(scenes):
        if number in without:
            continue
        shown = scenes[(number + 1) % len(scenes)] if number in wrong else scene
        storage.write_bytes(made.url(f"images/{number:05d}.png"), encode_png(render(shown, (32, 32))))
        prompt = prompts[number] if prompts else describe(scene)
        listed.append({"prompt": prompt, "image": f"images/{number:05d}.png", "scene": json.dumps(scene.to_dict())})
    storage.write_json(made.url("samples.json"), listed)
    return made


@pytest.fixture
def scenes():
    rng = np.random.default_rng(0)
    return [draw_scene(rng) for _ in range(12)]


def run(out, *samples, measured=None, **config):
    config = CompareConfig(**{"corpus": "shapes", "names": tuple("ABCDEF"[: len(samples)]), **config})
    compare.work(config, measured, *samples, out=str(out), cluster=CLUSTER, report=silent)
    return storage.read_json(str(out / "compare.json"))


def test_scores_and_paired_differences_are_those_of_their_rows(scenes, tmp_path):
    first, other = pictures(tmp_path, "a", scenes, (0, 1, 2, 3)), pictures(tmp_path, "b", scenes, (0,))
    told = run(tmp_path / "out", first, other)
    assert [model["scene_score"] for model in told["models"]] == [8 / 12, 11 / 12]
    assert told["prompts"] == told["pictures"] == 12
    (apart,) = told["differences"]
    right = [[number not in wrong for number in range(12)] for wrong in ((0, 1, 2, 3), (0,))]
    wanted = intervals.difference(right[1], right[0])
    assert apart["name"] == "B"
    assert apart["scene_score"] == pytest.approx(3 / 12) == pytest.approx(wanted.value)
    assert tuple(apart["scene_score_interval"]) == wanted.interval
    assert told["models"][1]["skill_colors"] > told["models"][0]["skill_colors"]
    assert "parameters" not in told["models"][0]  # nothing says what drew them
    assert told["models"][0]["seconds_a_picture"] == pytest.approx(2.0 / 12)


def test_rows_of_scores_pool_to_the_scores(scenes):
    judged = [
        judge(scenes[(number + 1) % 12] if number % 3 else scenes[number], scenes[number]) for number in range(12)
    ]
    scores = skill_scores(judged)
    for name, (right, asked) in skill_rows(judged).items():
        assert scores[name] == intervals.share(right, asked)
        assert scores[name].value == pytest.approx(sum(right) / sum(asked))


def test_other_prompts_are_refused_and_what_not_all_have_is_left_out(scenes, tmp_path):
    first = pictures(tmp_path, "a", scenes)
    prompts = [describe(scene) if number != 3 else "a cat" for number, scene in enumerate(scenes)]
    others = pictures(tmp_path, "b", scenes, prompts=prompts)
    with pytest.raises(ValueError, match="same prompts, but picture 3 is of"):
        run(tmp_path / "x", first, others)
    fewer = pictures(tmp_path, "c", scenes[:5])
    told = run(tmp_path / "out", first, fewer)
    assert (told["pictures"], told["left_out"]) == (5, 7)
    assert "7 pictures are left out" in (tmp_path / "out" / "compare.html").read_text()
    with pytest.raises(ValueError, match="at least two models, each with a name of its own"):
        run(tmp_path / "x", first)
    with pytest.raises(ValueError, match="a name of its own"):
        run(tmp_path / "x", first, fewer, names=("A", "A"))


class OfColours:
    """A CLIP that sees the mean colour, and reads the first letters."""

    def __init__(self, model):
        assert model == "clip"

    def embed_images(self, images):
        import torch

        return torch.tensor(np.stack([image.mean((0, 1)) + 1 for image in images]), dtype=torch.float32)

    def embed_texts(self, texts):
        import torch

        return torch.tensor([[len(text), ord(text[0]), 1.0] for text in texts])


def test_clip_scores_pair_too(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(embedder, "Embedder", OfColours)
    told = run(tmp_path / "out", pictures(tmp_path, "a", scenes), pictures(tmp_path, "b", scenes, (1, 2)), clip="clip")
    first, other = (model["clip_score"] for model in told["models"])
    assert 0 < other < 100
    assert told["differences"][0]["clip_score"] == pytest.approx(other - first)
    assert "CLIP score" in (tmp_path / "out" / "compare.html").read_text()


def test_who_finds_more_prompts_is_told_in_pairs(scenes, tmp_path, monkeypatch):
    """By a CLIP that reads the prompt off the picture: a picture of another scene finds that one's prompt."""

    class Knows(OfColours):
        kinds = {render(scene, (32, 32)).tobytes(): describe(scene) for scene in scenes}

        def embed_images(self, images):
            return self.embed_texts([self.kinds[image.tobytes()] for image in images])

        def embed_texts(self, texts):
            import torch

            return torch.eye(12)[[[describe(scene) for scene in scenes].index(text) for text in texts]]

    monkeypatch.setattr(embedder, "Embedder", Knows)
    first, other = pictures(tmp_path, "a", scenes, (0, 1, 2)), pictures(tmp_path, "b", scenes, (2,))
    told = run(tmp_path / "out", first, other, clip="clip", retrieval=True)
    assert [model["retrieval"] for model in told["models"]] == [9 / 12, 11 / 12]
    wanted = intervals.difference(np.arange(12) != 2, np.arange(12) > 2)
    assert told["differences"][0]["retrieval"] == pytest.approx(2 / 12) == pytest.approx(wanted.value)
    assert tuple(told["differences"][0]["retrieval_interval"]) == wanted.interval
    assert "Pictures that find their prompt" in (tmp_path / "out" / "compare.html").read_text()
    assert "retrieval" not in run(tmp_path / "x", first, other, clip="clip")["models"][0]  # as before it was there
    with pytest.raises(ValueError, match="Prompts are found by a CLIP"):
        CompareConfig(retrieval=True)


def test_the_sheet_has_a_row_a_prompt_and_a_column_a_model():
    colours = np.arange(12, dtype=np.uint8).reshape(2, 3, 2) * 20
    drawn = [
        (f"prompt {row}", [np.full((32, 32, 3), colours[row, at, 0], np.uint8) for at in range(3)]) for row in (0, 1)
    ]
    sheet = contact_sheet(["one", "two", "a long name that does not fit above a picture"], drawn)
    assert sheet.shape == (LINE + 2 * GAP + 2 * (LINE + 128 + 2 * GAP), GAP + 3 * (128 + GAP), 3)
    for row in (0, 1):
        top = GAP + LINE + GAP + LINE + GAP // 2 + row * (LINE + 128 + 2 * GAP)
        for at in range(3):
            left = GAP + at * (128 + GAP)
            assert (sheet[top : top + 128, left : left + 128] == colours[row, at, 0]).all()
    assert contact_sheet(["one"], [("word " * 200 + "漢字", [np.zeros((300, 200, 3), np.uint8)])]).shape[1] == 216


def test_figures_are_written_as_they_are_read():
    told = [figure(value) for value in (0.5, 12.345, 123.45, 13378, 2.5e12, -0.25, 0)]
    assert told == ["0.500", "12.35", "123.5", "13,378", "2.5e+12", "-0.250", "0.000"]


@in_browser
@pytest.mark.timeout(120)
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_opens_in_a_browser(scenes, tmp_path, width):
    prompts = [HOSTILE, "x" * 300, *(describe(scene) for scene in scenes[2:])]
    samples = [pictures(tmp_path, name, scenes, wrong, prompts) for name, wrong in (("a", (3,)), ("b", ()), ("c", ()))]
    run(tmp_path / "out", *samples, names=(HOSTILE, "B", "C"))
    told = seen(tmp_path / "out" / "compare.html", width=width)
    assert told["width"] == width
    assert told["title"].startswith("<script>")
    assert told["pictures"] == 36
    assert told["overflow"] <= 0
    assert not told["wide"]
    assert told["blank"] == told["fetched"] == told["dead"] == 0


@pytest.fixture
def stores(tmp_path):
    """Two stores, each with a prior that a recipe made, and its pictures."""
    for name, commit in (("one", "d3c69f4"), ("two", "be23f59")):
        shutil.copytree(DATA / commit / "store", tmp_path / name)
    return tmp_path


def line(stores, *words):
    return kills.here("compare", *words, "--store", str(stores / "one"), "--json")


def test_priors_draw_the_same_prompts_from_the_same_seeds(stores):
    one, two = (str(stores / name) for name in ("one", "two"))
    code, results, said = line(stores, one, two, "--count", "3")
    assert code == 0, said
    made = Artifact.open(results["artifact"])
    told, samples = storage.read_json(made.url("compare.json")), made.inputs
    assert [model["name"] for model in told["models"]] == ["one", "two"]
    assert [each.step for each in samples] == ["sample", "sample"]
    assert samples[0].inputs[0].path == samples[1].inputs[0].path  # the first model's mixture
    configs = [from_dict(SampleConfig, each.manifest["config"]) for each in samples]
    assert {(each.count, each.seed) for each in configs} == {(3, configs[0].seed)}
    for model, each in zip(told["models"], samples, strict=True):
        (prior,) = (found for found in each.inputs if found.step == "train_prior")
        loaded, _ = load_prior(prior.url("model"))
        assert model["parameters"] == sum(each.numel() for each in loaded.parameters()) == parameters_of(prior)
        assert "training_flops" not in model
    assert decode(storage.read_bytes(made.url("sheet.png"))).shape[1] == 2 * (128 + GAP) + GAP
    assert line(stores, one, two, "--count", "3")[1] == results, "it is found again"
    names = storage.list_names(str(stores / "one" / "sample"))
    assert line(stores, one, samples[1].path)[0] == 0, "the prompts of pictures that are given"
    assert storage.list_names(str(stores / "one" / "sample")) == names, "those of the first are found"
    words = line_of(samples[0]).split()
    assert step_options(sample, words[2:]).config == configs[0]
    code, _, said = line(stores, one, samples[1].path, "--count", "2")
    assert code == 1
    assert "leave out --count" in said


def test_the_pictures_of_a_recipe_are_drawn_once(stores):
    (made,) = (stores / "one" / "sample").glob("*/manifest.json")
    made.write_text(json.dumps(json.loads(made.read_text()) | {"version": sample.version}))
    one, store = compared.entrant(str(stores / "one"), str), Store(str(stores / "one"), CLUSTER)
    assert compared._draw(store, one, one.config, one.mixture).path == str(made.parent)
    fewer = replace(one.config, count=2)
    other = compared._draw(store, one, fewer, one.mixture)
    assert other.summary["samples"] == 2


def test_prompts_of_the_line_need_no_mixture(stores):
    code, results, said = line(stores, str(stores / "one"), str(stores / "two"), "--prompts", "a red circle", "a cross")
    assert code == 0, said
    (first, _) = Artifact.open(results["artifact"]).inputs
    assert [each.step for each in first.inputs] == ["train_prior", "train_tokenizer"]
    page = Path(results["page"]).read_text()
    assert "a red circle" in page
    assert first.path in page


def test_what_cannot_be_compared_is_said(stores):
    assert "at least two" in line(stores, str(stores / "one"))[2]
    assert "is called 'nowhere'" in line(stores, str(stores / "one"), "nowhere")[2]


def test_distances_of_two_corpora_are_refused(stores, tmp_path):
    (index,) = (stores / "two" / "ingest").glob("*/manifest.json")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id": "f" * 16}))  # the second learned from others
    entrants = [compared.entrant(str(stores / name), str) for name in ("one", "two")]
    corpora = [corpus_of(each.images) for each in entrants if each.images]
    real = {"fid": (1.0, (0.9, 1.1), 10)}
    summary = {"corpus": corpora[0], "extractor": "train_extractor x", "rows": 10, "real": real}
    calibrated = make(tmp_path / "yard", "calibrate", summary=summary)
    compared._demand(calibrated, entrants[:1])
    assert corpora[0] != corpora[1]
    with pytest.raises(ValueError, match="Distances of two corpora say nothing about each other: shapes"):
        compared._demand(calibrated, entrants)
    code, _, said = line(stores, str(stores / "one"), str(stores / "two"), "--yardstick", calibrated.path)
    assert code == 1
    assert "Distances of two corpora say nothing about each other" in said


def pooled(images):
    """What square pictures look like from afar: (N, 48)."""
    return np.stack([each.reshape(4, len(each) // 4, 4, len(each) // 4, 3).mean((1, 3)).ravel() for each in images])


def test_models_draw_what_a_yardstick_asks_for_and_are_measured(stores, monkeypatch):
    monkeypatch.setitem(yardstick.EXTRACTORS, "train_extractor", lambda folder: pooled)
    root = stores / "one"
    (images,) = (Artifact.open(str(path)) for path in (root / "ingest").iterdir())
    extractor = make(root, "train_extractor", [images])
    made = Store(str(root), CLUSTER).step(yardstick.calibrate, yardstick.CalibrateConfig(rows=12), images, extractor)
    code, results, said = line(stores, str(root), str(stores / "two"), "--yardstick", made.path, "--count", "2")
    assert code == 0, said
    told = storage.read_json(Artifact.open(results["artifact"]).url("compare.json"))
    assert told["yardstick"]["id"] == f"calibrate/{made.id}"
    assert told["yardstick"]["fid"] == made.summary["real"]["fid"][0]
    assert told["pictures"] == 2
    measured = Artifact.open(results["artifact"]).inputs[0]
    assert [each.summary["samples"] for each in measured.inputs[1:]] == [12, 12]
    lines = storage.read_json(measured.url("table.json"))
    assert [model["fid"] for model in told["models"]] == [each["fid"] for each in lines[1:]]
    assert "real against real" in Path(results["page"]).read_text()


def test_distances_stand_beside_those_of_real_pictures(scenes, tmp_path):
    samples = [pictures(tmp_path, name, scenes) for name in ("a", "b")]
    by = {"corpus": "shapes 1", "extractor": "train_extractor 2", "rows": 12}
    lines = [by | {"fid": value, "fid_interval": [value - 1, value + 1]} for value in (3.0, 40.0, 50.0)]
    measured = make(tmp_path / "m", "measure", [make(tmp_path / "c", "calibrate")])
    storage.write_json(measured.url("table.json"), lines)
    told = run(tmp_path / "out", *samples, measured=measured)
    assert [model["fid"] for model in told["models"]] == [40.0, 50.0]
    assert told["yardstick"]["fid"] == 3.0
    assert told["yardstick"]["id"].startswith("calibrate/")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "real against real 3.000 (2.000 to 4.000)" in page
    assert "by the yardstick calibrate/" in page


def test_flops_that_a_training_tells_are_summed_over_a_chain(tmp_path):
    priors = [make(tmp_path / str(n), "train_prior", summary={"training_flops": 10.0**n}) for n in (12, 13)]
    samples = make(tmp_path / "s", "sample", priors, summary={"samples": 4})
    costs = costs_of(samples)
    assert costs["training_flops"] == 1.1e13
    assert (costs["training_seconds"], costs["seconds_a_picture"]) == (4.0, 0.5)
    assert "flops_beside" not in costs
    tokenizer = make(tmp_path / "k", "train_tokenizer", summary={"training_flops": 2e9, "frozen_flops": 1e9})
    codes = make(tmp_path / "e", "encode", [tokenizer], summary={"frozen_flops": 4e9})
    told = {"training_flops": 1e12, "frozen_flops": 5e8}
    prior = make(tmp_path / "p", "train_prior", [codes, tokenizer], summary=told)
    costs = costs_of(make(tmp_path / "q", "sample", [prior, tokenizer], summary={"samples": 4}))
    assert (costs["training_flops"], costs["flops_beside"]) == (1e12, 7.5e9)
    silent = make(tmp_path / "t", "sample", [priors[0], make(tmp_path / "u", "train_prior")])
    assert "training_flops" not in costs_of(silent)
    with pytest.raises(ValueError, match="At least one prompt"):
        CompareConfig(shown=0)
