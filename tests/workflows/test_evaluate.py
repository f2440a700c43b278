"""The last step on small made-up artifacts: scores, page, and what is left out."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from infra import storage
from infra.cluster import laptop
from infra.config import from_dict
from infra.data.images import decode, encode_png
from infra.store import Artifact
from t2i.clip import embedder
from t2i.evaluate.alignment import clip_score
from t2i.evaluate.scenes import Scene, describe
from workflows import evaluate as module
from workflows import remade
from workflows.corpora import emoji, nlvr, scoring
from workflows.corpora.prompts import held_out_prompts, prompt_line
from workflows.corpora.shapes import ShapesConfig, draw_scene, render
from workflows.kinds import read
from workflows.options import step_options
from workflows.remade import line_again
from workflows.text_to_image import Recipe

GOLDEN = Path(__file__).parents[1] / "data" / "d3c69f4"

INGESTED = ("sample_id", "state", "reason", "caption_alt", "split", "reference_short", "reference_descriptive", "scene")


def make(root, step, inputs=(), shards=(), **extra):
    """An artifact of `shards`, lists of rows."""
    path = root / step / "0123456789abcdef"
    (path / "shards").mkdir(parents=True)
    for number, rows in enumerate(shards):
        pq.write_table(pa.Table.from_pylist(rows), path / "shards" / f"{number:06d}.parquet")
    manifest = {"step": step, "id": path.name, "version": 1, "config": {"seed": 0}, "summary": {"rows": 40}}
    manifest |= {"inputs": [one.path for one in inputs], "seconds": 2.0, "started": "2026-01-02T03:04:05Z"}
    manifest |= {"peak_memory_gb": 0.5, "libraries": {"torch": "2"}, "cluster": {"name": "laptop"}, **extra}
    storage.write_json(str(path / "manifest.json"), manifest)
    return Artifact.open(str(path))


def shapes_row(number, rng):
    scene = draw_scene(rng)
    row = dict.fromkeys(INGESTED)
    row |= {"sample_id": f"{number:04d}", "state": "accepted", "caption_alt": f"IMG_{number}.jpg", "offset": 0}
    row |= {"split": "test" if number % 2 else "train", "scene": json.dumps(scene.to_dict())}
    row |= {f"reference_{style}": describe(scene, style) for style in ("short", "descriptive")}
    return row | {"image": encode_png(render(scene, (32, 32), rng))}, scene


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """Two shards of twenty; captions are right except in the first test row; pictures except the first of four."""
    rng = np.random.default_rng(0)
    rows, truth = zip(*(shapes_row(number, rng) for number in range(40)), strict=True)
    told = [
        {"sample_id": row["sample_id"], "state": "accepted", "reason": None, "caption_short": row["reference_short"]}
        | {"caption_descriptive": "nothing" if row["sample_id"] == "0001" else row["reference_descriptive"]}
        | {"flag_short": "cut off" if number % 4 == 0 else None, "tries_short": 1 + 2 * (number % 4 == 0)}
        for number, row in enumerate(rows)
    ]
    images = make(tmp_path, "ingest", shards=[rows[:20], rows[20:]])
    captioner = make(tmp_path, "train_captioner", [images])
    metrics = "".join(json.dumps({"step": s, "base/caption": 1 / s, "base/lr": 0.1}) + "\n" for s in (1, 2, 3))
    storage.write_bytes(storage.join(captioner.path, "metrics.jsonl"), metrics.encode())
    styles = {"styles": [{"name": "short"}, {"name": "descriptive"}]}
    captions = make(tmp_path, "recaption", [images, captioner], [told[:20], told[20:]], summary=styles)
    tokenizer = make(tmp_path, "train_tokenizer", [images], config={"seed": 0, "train": {}, "model": {}})
    prior = make(tmp_path, "train_prior", [tokenizer])
    samples = make(tmp_path, "sample", [prior])
    listed = []
    for number, scene in enumerate(truth[:4]):
        name = f"images/{number:05d}.png"
        drawn = truth[20] if number == 0 else scene
        storage.write_bytes(samples.url(name), encode_png(render(drawn, (32, 32))))
        listed.append({"prompt": describe(scene), "image": name, "scene": json.dumps(scene.to_dict())})
    storage.write_json(samples.url("samples.json"), listed)
    monkeypatch.setattr(module, "reconstruct", lambda tokenizer, images: ([np.minimum(i, 250) for i in images], {}))
    return images, captions, captioner, tokenizer, prior, samples


def run(artifacts, out, **config):
    config = module.ReportConfig(corpus="shapes", title="demo", targets={"caption_f1": 0.95}, **config)
    return module.evaluate.work(config, *artifacts, out=str(out), cluster=laptop(), report=lambda *_, **__: None)


def test_scores_and_page(shapes, tmp_path):
    scores = run(shapes, tmp_path / "out")
    assert scores["caption_n"] == 20
    assert 0.9 < scores["caption_f1"] < 1
    assert scores["short_caption_f1"] == 1
    assert scores["alt_text_f1"] == 0
    assert scores["chance_f1"] < 0.8
    assert scores["scene_score"] == 0.75
    assert scores["scene_score_n"] == 4
    low, high = scores["scene_score_interval"]
    assert (low, high) == (0.25, 1)  # of four prompts, each a quarter
    assert scores["caption_f1_interval"][0] < scores["caption_f1"] < scores["caption_f1_interval"][1]
    assert scores["caption_gain"] == pytest.approx(scores["caption_f1"] - scores["alt_text_f1"])
    assert scores["caption_gain_interval"][0] > 0.5
    assert scores["caption_cider"] == pytest.approx(9.5)  # nineteen of twenty are the reference itself
    assert scores["skill_counts_n"] == 4
    assert scores["rebuilt_scene_score"] == 1
    assert 30 < scores["reconstruction_psnr"] < 60
    page = (tmp_path / "out" / "report.html").read_text()
    assert scores["report"].endswith("out/report.html")
    for words in ("train_captioner · caption", "reaches the target 0.95", "IMG_1.jpg", "as asked", "from the prompt"):
        assert words in page
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["caption_f1"] == scores["caption_f1"]


def test_every_score_has_an_interval_about_it(shapes, tmp_path):
    scores = run(shapes, tmp_path / "out")
    told = [name for name, value in scores.items() if isinstance(value, float) and not name.endswith("_n")]
    assert len(told) > 20
    for name in told:
        low, high = scores[f"{name}_interval"]
        assert low <= scores[name] <= high, name


def test_pictures_have_a_line_each_as_geneval_writes_it(shapes, tmp_path):
    run(shapes, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["filename"] for line in lines] == [f"images/{number:05d}.png" for number in range(4)]
    assert [line["correct"] for line in lines] == [False, True, True, True]
    assert all(json.loads(line["metadata"])["prompt"] == line["prompt"] for line in lines)
    assert lines[0]["reason"]


class Named:
    """A CLIP that knows pictures by their mean, and prompts by their length."""

    def __init__(self, model):
        assert model == "clip"

    def embed_images(self, images):
        return torch.tensor(np.stack([image.mean((0, 1)) + 1 for image in images]), dtype=torch.float32)

    def embed_texts(self, texts):
        return torch.tensor([[len(text), ord(text[0]), 1.0] for text in texts])

    def cut(self, texts):
        return [False] * len(texts)


def test_a_clip_scores_pictures_beside_the_real_ones_of_the_same_rows(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(embedder, "Embedder", Named)
    images, _, _, _, _, samples = shapes
    listed, rows = storage.read_json(samples.url("samples.json")), module.held_out(images, images, 40)
    prompts = [f"{number} {row['reference_short']}" for number, row in enumerate(rows[:3])]
    own = [{**one, "sample_id": row["sample_id"], "prompt": prompt}
           for one, row, prompt in zip(listed[:3], rows, prompts, strict=False)]  # fmt: skip
    storage.write_json(samples.url("samples.json"), own + listed[3:])  # the last one's row is not known
    scores = run(shapes, tmp_path / "out", clip="clip")
    real = [decode(image) for image in module.fetch_images(images, images, rows[:3])]
    drawn = [decode(storage.read_bytes(samples.url(one["image"]))) for one in own + listed[3:]]
    clip = Named("clip")
    for prefix, pictures, texts in (("", drawn, [*prompts, listed[3]["prompt"]]), ("real_", real, prompts)):
        wanted = clip_score(clip.embed_images(pictures).numpy(), clip.embed_texts(texts).numpy())
        assert scores[f"{prefix}clip_score"] == pytest.approx(wanted.value)
        assert scores[f"{prefix}clip_score_n"] == len(texts)
        assert 0 <= scores[f"{prefix}retrieval_text_r@1"] <= 1
    page = (tmp_path / "out" / "report.html").read_text()
    for words in ("Sampled pictures, CLIP score", "Sampled pictures that find their prompt", "real pictures"):
        assert words in page
    without = run(shapes, tmp_path / "without")
    assert not [name for name in without if "clip" in name or "retrieval" in name]
    few = run(shapes, tmp_path / "few", clip="clip", rows=0)
    assert "real_clip_score" not in few


def test_what_was_seen_while_it_trained_is_shown(shapes, tmp_path):
    prior, grey = shapes[4], [np.full((8, 8, 3), value, np.uint8) for value in range(20)]
    for folder, loss in (("", 1.0), ("held_out/", 2.0)):
        metrics = "".join(json.dumps({"step": s, "prior/codes": loss * s}) + "\n" for s in (1, 2))
        storage.write_bytes(prior.url(f"{folder}metrics.jsonl"), metrics.encode())
    for step in range(20):
        strip = encode_png(np.concatenate([grey[step], grey[19 - step]], axis=1))
        storage.write_bytes(prior.url("held_out", "pictures", f"{100 * step:09d}.png"), strip)
    storage.write_json(prior.url("held_out", "prompts.json"), ["a circle", "a square"])
    (curve,) = module._curves("train_prior", prior)
    assert curve.title == "train_prior · codes"
    assert curve.series == {"prior": [(1, 1.0), (2, 2.0)], "prior, held out": [(1, 2.0), (2, 4.0)]}
    (course,) = module._courses("train_prior", prior)
    assert (course.title, course.steps) == ("train_prior", [0, 300, 500, 800, 1100, 1400, 1600, 1900])
    assert [prompt for prompt, _ in course.drawn] == ["a circle", "a square"]
    assert [decode(image)[0, 0, 0] for image in course.drawn[1][1]] == [19, 16, 14, 11, 8, 5, 3, 0]
    run(shapes, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "prior, held out" in page
    assert 'alt="After 1900 steps: a square"' in page


def test_all_captions_are_looked_at_as_a_whole(shapes, tmp_path):
    run(shapes, tmp_path / "out", rows=5)
    found = json.loads((tmp_path / "out" / "habits.json").read_text())
    assert list(found["collapse"]) == ["alt", "short", "descriptive"]
    assert [report["count"] for report in found["collapse"].values()] == [40, 40, 40]  # not the held-out rows alone
    assert found["collapse"]["alt"]["begins_with_capital"] == 1
    assert found["faults"]["short"]["faults"] == {"cut off": 0.25}
    assert found["faults"]["short"]["decoded_again"] == 0.25
    page = (tmp_path / "out" / "report.html").read_text()
    for words in ("Do the captions collapse?", "Begin with “a” or “an”", "What is wrong with them", "<dt>cut off</dt>"):
        assert words in page
    run(shapes, tmp_path / "again", rows=5)
    assert (tmp_path / "again" / "report.html").read_text() == page


def test_fewer_rows_are_a_fixed_draw(shapes, tmp_path):
    scores = run(shapes, tmp_path / "out", rows=5, rebuilt=2, captions_shown=9, samples_shown=0)
    assert scores["caption_n"] == 5
    assert scores["reconstruction_n"] == 2
    assert 'id="samples"' not in (tmp_path / "out" / "report.html").read_text()


def test_all_steps_are_found_once_inputs_first(shapes):
    names = [artifact.step for artifact in module.ancestors(list(shapes))]
    assert sorted(names) == sorted(set(names))
    assert len(names) == 6
    assert names.index("ingest") < names.index("train_captioner") < names.index("recaption")


def test_steps_are_told_in_the_order_in_which_they_ran():
    hours = {"mix": "11", "encode": "12", "train_tokenizer": "10"}
    made = [
        Artifact(name, {"step": name, "started": f"2026-12-01T{hour}:00:00Z", "inputs": []})
        for name, hour in hours.items()
    ]
    assert [artifact.step for artifact in module.ancestors(made)] == ["train_tokenizer", "mix", "encode"]


def test_nlvr_captions_are_scored_by_their_boxes():
    boxes = [[{"shape": "square", "color": color, "size": "medium"}] for color in ("blue", "black")]
    meta = {"boxes_unordered": boxes}
    rows = [nlvr.label(f"nlvr-test-{n}-0-0", "There is a box.", meta) for n in range(4)]
    rows = [
        {**r, "caption_short": r["reference_short"], "caption_descriptive": r["reference_descriptive"]} for r in rows
    ]
    rows[0]["caption_descriptive"] = "one box with 1 blue square"
    scores = scoring.caption_scores("nlvr", rows)
    assert scores["caption_exact"] == 3 / 4
    assert scores["caption_recall"] == 7 / 8
    assert scores["short_caption_exact"] == 1
    assert "alt_text_f1" not in scores


def test_names_are_scored_by_their_words():
    rows = [emoji.label("e", name, {"codepoints": "1f335"}) for name in ("cactus", "red heart")]
    rows = [{**row, "caption_short": "red heart"} for row in rows]
    scores = scoring.caption_scores("words", rows)
    known = {"caption_f1": 0.5, "caption_exact": 0.5, "caption_n": 2, "chance_f1": 0.5, "caption_cider": 2.5}
    assert {name: value for name, value in scores.items() if not name.endswith("_interval")} == pytest.approx(known)
    assert {name.removesuffix("_interval") for name in scores.keys() - known.keys()} <= known.keys()
    assert scoring.caption_scores("words", []) == {}


def test_what_a_file_of_prompts_says_goes_along():
    rng = np.random.default_rng(0)
    lines = [prompt_line(asked) for asked in held_out_prompts(ShapesConfig(samples=500, labelled=0), "short", 6)]
    scenes = [Scene.from_dict(json.loads(line["scene"])) for line in lines]
    drawn = [
        {"number": n, "prompt": line["prompt"], "scene": None, "metadata": json.dumps(line)}
        for n, line in enumerate(lines)
    ]
    moved = [Scene(tuple(replace(t, size="small") for t in scene.objects), "gray") for scene in scenes]
    pictures = [render(scene, (32, 32), rng) for scene in moved]
    found = scoring.picture_scores("shapes", [module.asked_of(row) for row in drawn], pictures)
    assert found.scores["scene_score"] == 1  # neither sizes nor the background were asked for
    assert "skill_sizes" not in found.scores
    assert {line["tag"] for line in found.lines} == {"short"}
    assert json.loads(found.lines[0]["metadata"])["include"] == lines[0]["include"]


def test_pictures_without_a_known_scene_are_not_judged():
    pictures = scoring.picture_scores("words", [{"scene": None}], [np.zeros((8, 8, 3), np.uint8)])
    assert (pictures.scores, pictures.right) == ({}, [None])


def test_a_report_that_is_no_recipes_has_the_line_of_its_step(shapes, tmp_path):
    out = tmp_path / "store" / "evaluate" / "0123456789abcdef"
    run(shapes, out, summary="It's a test", captions_shown=3)
    page = unescape((out / "report.html").read_text())
    line = re.search(r"rescribe evaluate [^<]*", page)[0]
    words = shlex.split(line)
    assert not (out / "recipe.json").exists()
    assert words[words.index("--prior") + 1] == shapes[4].path
    wanted = module.ReportConfig(
        corpus="shapes", title="demo", targets={"caption_f1": 0.95}, summary="It's a test", captions_shown=3
    )
    assert step_options(module.evaluate, words[2:]).config == wanted
    assert f"rescribe show {shapes[4].path}" in page


def test_a_recipes_report_has_the_line_that_makes_it_again(tmp_path, monkeypatch):
    """Of artifacts that an older commit's recipe made, as if no step had risen since."""
    shutil.copytree(GOLDEN / "store", tmp_path / "runs")
    store, recipe = str(tmp_path / "runs"), from_dict(Recipe, storage.read_json(str(GOLDEN / "recipe.json")))
    made = {path.parent.parent.name: Artifact.open(str(path.parent)) for path in Path(store).glob("*/*/manifest.json")}
    names = ("ingest", "recaption", "train_captioner", "train_tokenizer", "train_prior", "sample")
    inputs = [made[name] for name in names]
    out = storage.join(store, "evaluate", "0123456789abcdef")
    assert line_again(recipe.report, *inputs, out=out).startswith("rescribe evaluate --images")
    monkeypatch.setattr(remade, "VERSIONS", {name: each.manifest["version"] for name, each in made.items()})
    line = shlex.split(line_again(recipe.report, *inputs, out=out))
    assert line == ["rescribe", "run", storage.join(out, "recipe.json"), "--store", store]
    assert replace(read(storage.read_json(line[2])), name=recipe.name) == recipe
    inputs[0].manifest["id"] += ".1"
    assert "evaluate" in line_again(recipe.report, *inputs, out=out), "a revision is not what a recipe makes"
