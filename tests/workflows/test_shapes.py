"""The Shapes corpus is a function of its config, as noisy as it says, and never tests on what it trained on."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from t2i.evaluate.scenes import Scene, caption_scores, describe, parse, read_many
from workflows.corpora.shapes import NoiseConfig, ShapesConfig, alt_text, draw_scene, render, write_shard, write_shards

SILENT = dict.fromkeys(NoiseConfig.__dataclass_fields__, 0.0)
SMALL = ShapesConfig(samples=250, shard_size=100, labelled=50, test_fraction=0.2, seed=3)


def rows(paths):
    """The rows of all shards, {"key", "png", "txt", "json"}, in order."""
    found: dict[str, dict] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                key, kind = member.name.split(".")
                content = tar.extractfile(member)
                assert content is not None
                found.setdefault(key, {"key": key})[kind] = content.read()
    return [row | {"json": json.loads(row["json"]), "txt": row["txt"].decode()} for row in found.values()]


def texts(count=3_000, **rates):
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng) for _ in range(count)]
    noise = NoiseConfig(**(SILENT | rates)) if rates else NoiseConfig()
    others = scenes[1:] + scenes[:1]
    return scenes, [alt_text(scene, other, rng, noise) for scene, other in zip(scenes, others, strict=True)]


def test_shards_are_the_same_bytes_again_and_one_by_one(tmp_path):
    paths = write_shards(SMALL, tmp_path / "a")
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [path.name for path in paths]
    for number in (2, 0, 1):
        again = write_shard(SMALL, number, tmp_path / "b")
        assert again.read_bytes() == paths[number].read_bytes()
    other = write_shard(ShapesConfig(samples=250, shard_size=100, labelled=50, seed=4), 0, tmp_path / "c")
    assert other.read_bytes() != paths[0].read_bytes()
    with pytest.raises(ValueError, match="Shard 3 does not exist"):
        write_shard(SMALL, 3, tmp_path)


def test_rows_hold_image_text_and_truth(tmp_path):
    found = rows(write_shards(SMALL, tmp_path))
    assert [row["key"] for row in found] == [f"{index:08d}" for index in range(250)]
    images = np.stack([np.asarray(Image.open(io.BytesIO(row["png"]))) for row in found])
    assert images.shape == (250, 32, 32, 3)
    assert images.dtype == np.uint8
    truth = [Scene.from_dict(row["json"]["scene"]) for row in found]
    assert read_many(images) == truth
    labelled = {"test": 0, "train": 0}
    for row, scene in zip(found, truth, strict=True):
        if "caption_short" in row["json"]:
            labelled[row["json"]["split"]] += 1
            assert row["json"]["caption_short"] == describe(scene, "short")
            assert row["json"]["caption_descriptive"] == describe(scene, "descriptive")
    assert labelled == {"train": 50, "test": sum(row["json"]["split"] == "test" for row in found)}


def test_a_scene_is_for_training_or_for_testing_never_both(tmp_path):
    config = ShapesConfig(samples=4_000, size=(16, 16), labelled=0, test_fraction=0.1, max_objects=1)
    seen = {"train": set(), "test": set()}
    count = 0
    for row in rows(write_shards(config, tmp_path)):
        seen[row["json"]["split"]].add(json.dumps(row["json"]["scene"]))
        count += row["json"]["split"] == "test"
    assert len(seen["train"]) < 3_000, "scenes repeat, or this proves nothing"
    assert not seen["train"] & seen["test"]
    assert count / 4_000 == pytest.approx(0.1, abs=0.025)


def test_silent_noise_says_the_truth():
    scenes, said = texts(file_name=0.0)
    assert said[:500] == [text for text in said[:500] if "object" not in text]
    assert caption_scores(said, scenes) == {"precision": 1, "recall": 1, "f1": 1}


def test_default_noise_is_visibly_wrong_and_still_names_everything():
    scenes, said = texts()
    assert 0.6 <= caption_scores(said, scenes)["f1"] <= 0.72
    things = [thing for text in said for thing in parse(text).objects]
    for name in ("shape", "color", "size", "place"):
        assert sum(getattr(thing, name) is not None for thing in things) / len(things) > 0.7


@pytest.mark.parametrize(
    ("rates", "measure"),
    [
        ({"file_name": 0.3}, lambda text, scene: not parse(text).objects),
        ({"swapped": 0.3}, lambda text, scene: text != describe(scene)),
        ({"suffix": 0.3}, lambda text, scene: text != describe(scene) and text.startswith(describe(scene))),
        ({"truncated": 0.3}, lambda text, scene: text != describe(scene) and describe(scene).startswith(text)),
        ({"dropped_background": 0.3}, lambda text, scene: parse(text).background is None),
        ({"wrong_attribute": 0.3}, lambda text, scene: parse(text).objects[0].shape != scene.objects[0].shape),
        ({"wrong_attribute": 0.3}, lambda text, scene: parse(text).objects[0].place != scene.objects[0].place),
        ({"dropped_attribute": 0.3}, lambda text, scene: parse(text).objects[0].size is None),
    ],
)
def test_noise_rates_are_met(rates, measure):
    scenes, said = texts(**rates)
    share = sum(map(measure, said, scenes)) / len(scenes)
    assert share == pytest.approx(0.3, abs=0.03)


def test_dropped_objects_leave_one():
    scenes, said = texts(dropped_object=1.0)
    assert all(len(parse(text).objects) == 1 for text in said)
    scenes, said = texts(dropped_object=0.3)
    three = [len(parse(text).objects) for text, scene in zip(said, scenes, strict=True) if len(scene.objects) == 3]
    assert sum(three) / (3 * len(three)) == pytest.approx(0.7 + 0.3**3 / 3, abs=0.03)


def test_rendering_stays_within_cells_and_jitters():
    rng = np.random.default_rng(0)
    scene = Scene(draw_scene(rng).objects[:1], "white")
    assert (render(scene, (32, 48)) == render(scene, (32, 48))).all()
    assert render(scene, (48, 64), rng).shape == (48, 64, 3)
    assert not (render(scene, (32, 32), rng) == render(scene, (32, 32), rng)).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "at least 1"),
        ({"size": (8, 32)}, "at least 16 pixels"),
        ({"max_objects": 5}, "max_objects is 5"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0"),
        ({"samples": 100, "labelled": 100}, "0 to 95 can be labelled"),
        ({"jitter": 0.2}, "jitter is 0.2"),
    ],
)
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ShapesConfig(**fields)
    with pytest.raises(ValueError, match="swapped is 2"):
        NoiseConfig(swapped=2)
