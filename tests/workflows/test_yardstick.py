"""A yardstick's sets hold nothing of training, and only pictures of its own prompts are measured."""

import json
from dataclasses import replace

import numpy as np
import pytest

from infra import storage
from infra.cluster import Cluster
from infra.config import to_dict
from infra.data.images import decode, encode_png
from infra.store import Plan, Store
from infra.train.loop import TrainConfig
from infra.train.optim import OptimConfig
from t2i.clip.embedder import Embedder
from t2i.evaluate.extractor import ExtractorConfig
from t2i.evaluate.scenes import Scene, describe
from tests.workflows.test_clips import exported
from tests.workflows.test_evaluate import make, shapes_row
from workflows import real_pictures
from workflows import yardstick as module
from workflows.clips import key_of
from workflows.corpora.shapes import ShapesConfig, render, scenes_of
from workflows.ingest import IngestConfig
from workflows.options import recipe_options
from workflows.recipes import demo, emoji
from workflows.yardstick import CalibrateConfig, MeasureConfig, TrainExtractorConfig, YardstickRecipe

SHAPES = ShapesConfig(samples=400, labelled=20, test_fraction=0.2, shard_size=200)
CORPUS = IngestConfig(corpus=SHAPES, image_size=(32, 32))
CLUSTER = Cluster(name="test", actors=(1, 1))


def silent(*_, **__): ...


def pooled(images):
    """An extractor without weights: what a picture looks like from afar."""
    return np.stack([image.reshape(4, 8, 4, 8, 3).mean((1, 3)).ravel() for image in images]) / 255


@pytest.fixture
def calibrated(tmp_path, monkeypatch):
    """A yardstick of two sets of 60 scenes."""
    monkeypatch.setitem(module.EXTRACTORS, "train_extractor", lambda folder: pooled)
    images = make(tmp_path, "ingest", config=to_dict(CORPUS))
    extractor = make(tmp_path, "train_extractor", [images])
    out = tmp_path / "made"
    summary = module.calibrate.work(
        CalibrateConfig(rows=60), images, extractor, out=str(out), cluster=CLUSTER, report=silent
    )
    made = make(tmp_path, "calibrate", [images, extractor], summary=summary, config=to_dict(CalibrateConfig(rows=60)))
    for name in (module.PROMPTS, module.FEATURES):
        storage.write_bytes(made.url(name), (out / name).read_bytes())
    return made


def prompts_of(made):
    return [json.loads(line) for line in storage.read_bytes(made.url(module.PROMPTS)).decode().splitlines()]


def sampled(root, lines, draw, name="sample"):
    """What `sample` would have drawn for prompts."""
    made, listed = make(root / name, "sample"), []
    for number, line in enumerate(lines):
        storage.write_bytes(
            made.url(f"images/{number}.png"), encode_png(draw(Scene.from_dict(json.loads(line["scene"]))))
        )
        listed.append({"prompt": line["prompt"], "image": f"images/{number}.png", "scene": line["scene"]})
    storage.write_json(made.url("samples.json"), listed)
    return made


def measure(made, *samples, out, names=()):
    return module.measure.work(MeasureConfig(names=names), made, *samples, out=str(out), cluster=CLUSTER, report=silent)


def test_no_scene_of_a_set_is_one_of_training(calibrated):
    lines = prompts_of(calibrated)
    scenes = [Scene.from_dict(json.loads(line["scene"])) for line in lines]
    assert len(set(scenes)) == 60
    assert not set(scenes) & set(scenes_of(SHAPES, "train"))
    for seed in (1, 2):  # of whatever seed
        assert not set(scenes) & set(
            scenes_of(ShapesConfig(samples=2000, labelled=0, test_fraction=0.2, seed=seed), "train")
        )
    assert [line["prompt"] for line in lines] == [describe(scene) for scene in scenes]
    features = np.load(calibrated.url(module.FEATURES))
    assert features["first"].shape == features["second"].shape == (60, 48)
    assert np.unique(np.concatenate([features["first"], features["second"]]), axis=0).shape[0] == 120


def test_a_better_model_is_nearer_and_real_against_real_stands_beside(calibrated, tmp_path):
    lines, rng = prompts_of(calibrated), np.random.default_rng(0)
    good = sampled(tmp_path, lines[::-1], lambda scene: render(scene, (32, 32), rng), "good")
    dark = sampled(tmp_path, lines, lambda scene: render(scene, (32, 32)) // 2, "dark")
    found = measure(calibrated, good, dark, out=tmp_path / "table", names=("good", "dark"))["table"]
    assert [line["name"] for line in found] == ["real pictures", "good", "dark"]
    assert found[1]["fid"] == pytest.approx(found[0]["fid"], rel=0.1)
    assert found[2]["fid"] > 2 * found[0]["fid"]
    assert found[2]["kid"] > found[1]["kid"]
    assert {line["extractor"] for line in found} == {f"train_extractor {calibrated.inputs[1].id}"}
    assert {line["yardstick"] for line in found} == {f"calibrate/{calibrated.id}"}
    assert storage.read_json(str(tmp_path / "table" / module.TABLE))[2]["fid"] == found[2]["fid"]


def test_pictures_of_other_prompts_are_not_measured(calibrated, tmp_path):
    lines = prompts_of(calibrated)
    for number, others in enumerate((lines[1:], [*lines[1:], lines[1]], [*lines, lines[0]])):
        other = sampled(tmp_path, others, lambda scene: render(scene, (32, 32)), str(number))
        with pytest.raises(ValueError, match="of other prompts than the 60"):
            measure(calibrated, other, out=tmp_path)
    with pytest.raises(ValueError, match="at least one model"):
        measure(calibrated, out=tmp_path)


def test_a_test_split_is_cut_by_its_scenes(tmp_path, monkeypatch):
    """Pictures of one scene stand in one set, once."""
    monkeypatch.setitem(module.EXTRACTORS, "train_extractor", lambda folder: pooled)
    rng = np.random.default_rng(0)
    rows = [shapes_row(number, rng)[0] for number in range(120)]
    again = [{**row, "sample_id": f"again{row['sample_id']}"} for row in rows]
    shown = [row for row in rows if row["split"] == "test"][:8]
    again += [{**row, "sample_id": f"shown{row['sample_id']}", "split": "train"} for row in shown]
    images = make(
        tmp_path, "ingest", shards=[rows, again], config=to_dict(IngestConfig(corpus="x", image_size=(32, 32)))
    )
    extractor = make(tmp_path, "train_extractor", [images])
    summary = module.calibrate.work(
        CalibrateConfig(), images, extractor, out=str(tmp_path / "out"), cluster=CLUSTER, report=silent
    )
    features = np.load(tmp_path / "out" / module.FEATURES)
    every = np.concatenate([features["first"], features["second"]])
    assert len(np.unique(every, axis=0)) == len(every) == 2 * summary["rows"]
    assert 36 < len(every) <= 52  # of sixty test scenes, each twice, of which eight are in training, too
    known = pooled([decode(row["image"]) for row in shown])
    assert len(np.unique(np.concatenate([every, known]), axis=0)) == len(every) + 8
    assert summary["corpus"].startswith("own ")
    with pytest.raises(ValueError, match="sees no features"):
        module.extractor_of(images)


def test_what_has_no_yardstick(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Emoji have no FID"):
        module.yardstick_for(emoji("folder").corpus)
    with pytest.raises(ValueError, match="one size"):
        module.yardstick_for(IngestConfig(corpus="x"))
    with pytest.raises(ValueError, match="at least 10"):
        CalibrateConfig(rows=9)
    row = {"sample_id": "a", "state": "accepted", "reason": None, "split": "train", "scene": None}
    images = make(tmp_path, "ingest", shards=[[row | {"reference_descriptive": None}]])
    with pytest.raises(ValueError, match=r"No training row of .* has a scene"):
        module.train_extractor.work(TrainExtractorConfig(), images, out="", cluster=CLUSTER, report=silent)
    monkeypatch.setattr(real_pictures, "TRIES", 10)
    few = ShapesConfig(max_objects=1, test_fraction=0.01)
    with pytest.raises(ValueError, match=r"Two sets of 10 .* only 1. were found"):  # a hundredth of 1,280 scenes
        real_pictures.two_sets(few, 10, np.random.default_rng(0))


def test_both_sets_are_of_one_kind():
    """Though there are some 250 held-out scenes of one object, and a third of all draws are of these."""
    sets = real_pictures.two_sets(SHAPES, 300, np.random.default_rng(0))
    one, other = (np.bincount([len(scene.objects) for scene in scenes], minlength=4) for scenes in sets)
    assert one.sum() == other.sum() == 300
    assert np.abs(one - other).max() < 35
    assert not set(sets[0]) & set(sets[1])


def test_the_recipe_is_one_a_corpus_and_plans_without_a_store(tmp_path):
    recipe = module.yardstick()
    assert recipe == module.yardstick()
    plan = Plan(str(tmp_path))
    recipe.run(plan)
    assert [line[0] for line in plan.lines] == ["ingest", "train_extractor", "calibrate"]
    assert recipe.extractor.model.size == (32, 32)
    assert recipe.sets.rows == 2000
    assert demo().sample.count == 256  # the prompts of all other scores


def by_clip(root, named="", extractor=None):
    """A yardstick of 30 scenes whose features a CLIP sees, of a store."""
    images = make(root, "ingest", config=to_dict(CORPUS))
    config = CalibrateConfig(rows=30, clip=named)
    return Store(str(root / "runs"), CLUSTER).step(module.calibrate, config, images, extractor), images


def test_a_clip_of_ours_is_an_extractor(tmp_path):
    """What it sees is what its embeddings say, and its id stands in the table."""
    trained = make(tmp_path, "train_clip")
    folder = exported(tmp_path / "train_clip" / trained.id / "model")
    made, _ = by_clip(tmp_path, extractor=trained)
    by = module.yardstick_of(made)
    assert (by.rows, by.extractor) == (30, f"train_clip {trained.id}")
    features, embedder = module.features_of(made), Embedder(folder)
    pictures = [each.pixels for each in real_pictures.sets_of(made.inputs[0], 30, 0)[0]]
    assert features["first"] == pytest.approx(embedder.embed_images(pictures).numpy() * embedder.width**0.5)
    assert (features["first"] ** 2).mean(1) == pytest.approx(np.ones(30))
    lines = prompts_of(made)
    rng = np.random.default_rng(0)
    right = sampled(tmp_path, lines, lambda scene: render(scene, (32, 32), rng), "right")
    dark = sampled(tmp_path, lines, lambda scene: render(scene, (32, 32)) // 3, "dark")
    found = measure(made, right, dark, out=tmp_path, names=("right", "dark"))["table"]
    assert found[2]["fid"] > found[1]["fid"]
    assert found[2]["kid"] > found[1]["kid"]
    other = make(tmp_path / "other", "train_extractor")
    with pytest.raises(ValueError, match="Distances of two extractors"):
        by.demand(replace(by, extractor=f"train_extractor {other.id}"))


def test_a_published_clip_is_an_extractor_while_it_stays_what_it_is(tmp_path):
    folder = exported(tmp_path / "clip")
    made, images = by_clip(tmp_path, folder)
    assert made.summary["extractor"] == f"clip {key_of(folder)}"
    assert [each.step for each in made.inputs] == ["ingest"]
    lines = prompts_of(made)
    drawn = sampled(tmp_path, lines, lambda scene: render(scene, (32, 32)))
    assert measure(made, drawn, out=tmp_path)["table"][1]["fid"] > 0
    exported(tmp_path / "clip", seed=2)
    with pytest.raises(ValueError, match=r"which is not there or has changed: .* Calibrate again"):
        measure(made, drawn, out=tmp_path)
    again = Store(str(tmp_path / "runs"), CLUSTER).step(
        module.calibrate, CalibrateConfig(rows=30, clip=folder), images, None
    )
    assert again.id != made.id
    with pytest.raises(ValueError, match="Say by what is measured"):
        Store(str(tmp_path / "runs"), CLUSTER).step(module.calibrate, CalibrateConfig(), images)


def test_a_recipe_measures_by_a_clip(tmp_path):
    recipe = module.yardstick()
    trained = make(tmp_path, "train_clip")
    plan = Plan(str(tmp_path / "runs"))
    replace(recipe, extractor=trained.path).run(plan)
    assert [line[0] for line in plan.lines] == ["ingest", "train_clip", "calibrate"]
    options = recipe_options(["yardstick", "--extractor", trained.path, "--sets.rows", "50"], "run").recipe
    assert options == replace(recipe, extractor=trained.path, sets=CalibrateConfig(rows=50))
    plan = Plan(str(tmp_path / "runs"))
    recipe_options(["yardstick", "--sets.clip", "openai/clip-vit-base-patch32"], "run").recipe.run(plan)
    assert [line[0] for line in plan.lines] == ["ingest", "calibrate"]


def test_emoji_have_no_fid_by_any_step(tmp_path):
    config = to_dict(IngestConfig(corpus="x", labels="emoji", image_size=(32, 32)))
    row = {"sample_id": "a", "state": "accepted", "reason": None, "split": "test", "scene": None}
    images = make(tmp_path, "ingest", shards=[[row | {"reference_descriptive": None}]], config=config)
    with pytest.raises(ValueError, match="Emoji have no FID: each is a kind of its own"):
        real_pictures.sets_of(images, 10, 0)
    with pytest.raises(ValueError, match="Emoji have no FID"):
        recipe_options(["yardstick", "--corpus", "x", "--corpus.labels", "emoji"], "run")


@pytest.mark.long
def test_a_yardstick_is_made_of_a_corpus(tmp_path, ray_cluster):
    """By the one loop, and found again."""
    train, optim = TrainConfig(steps=80, batch=32, log_every_steps=10), OptimConfig(lr=1e-2, warmup_steps=5)
    extractor = TrainExtractorConfig(model=ExtractorConfig(channels=8, features=16), train=train, optim=optim)
    recipe = YardstickRecipe(name="y", corpus=CORPUS, extractor=extractor, sets=CalibrateConfig(rows=60))
    made = recipe.run(Store(str(tmp_path / "runs"), CLUSTER))
    by = module.yardstick_of(made)
    assert by.rows == 60
    assert by.corpus.startswith("shapes ")
    assert by.extractor == f"train_extractor {made.inputs[1].id}"
    assert by.real["fid"].interval[0] < by.real["fid"].value
    lines = prompts_of(made)
    found = measure(made, sampled(tmp_path, lines, lambda scene: 255 - render(scene, (32, 32))), out=tmp_path)["table"]
    assert found[1]["fid"] > 2 * found[0]["fid"]
    again = Plan(str(tmp_path / "runs"))
    recipe.run(again)
    assert {line[2] for line in again.lines} == {"done"}
