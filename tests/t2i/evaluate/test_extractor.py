"""An extractor learns to see facts, and what it sees tells pictures apart as distances should."""

import json

import numpy as np
import pytest
import torch

from infra.train.optim import OptimConfig
from t2i.evaluate.distances import frechet_distance
from t2i.evaluate.extractor import ExtractorConfig
from t2i.evaluate.facts import facts_of, marked, vocabulary
from t2i.evaluate.scenes import COLORS, Scene
from t2i.evaluate.task import ExtractorTask, load_extractor
from tests.t2i.evaluate.test_scenes import TWO
from workflows.corpora.shapes import draw_scene, render

SMALL = ExtractorConfig(size=(16, 16), channels=8, features=16)


def drawn(count, seed=0):
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng) for _ in range(count)]
    return [json.dumps(scene.to_dict()) for scene in scenes], [render(scene, (32, 32), rng) for scene in scenes]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """After 60 steps on 512 scenes: the losses, and the extractor from its folder."""
    scenes, pixels = drawn(512)
    task = ExtractorTask(model=SMALL, facts=vocabulary(scenes), optim=OptimConfig(lr=1e-2))
    module = task.updates()[0].module
    columns = task.collate({"scene": scenes, "pixels": pixels}, lambda salt: np.zeros(512))
    assert columns["images"].shape == (512, 3, 16, 16)
    optim, losses = torch.optim.Adam(module.parameters(), 1e-2), []
    for number in range(60):
        part = slice(number % 4 * 128, number % 4 * 128 + 128)
        batch = {name: torch.from_numpy(column[part]) for name, column in columns.items()} | {"weight": torch.ones(128)}
        loss = module(batch)["facts"] / module.targets(batch)["facts"]
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    folder = str(tmp_path_factory.mktemp("extractor"))
    task.export({"extractor": module}, folder)
    return losses, load_extractor(folder)


def test_it_learns(trained):
    losses, _ = trained
    assert np.mean(losses[-4:]) < 0.75 * losses[3]


def test_its_features_come_in_any_batch_and_of_any_size(trained):
    _, extractor = trained
    _, pixels = drawn(20, 1)
    features = extractor.extract(pixels)
    assert features.shape == (20, 16)
    assert features.dtype == np.float64
    np.testing.assert_allclose(extractor.extract(pixels, batch=7), features, atol=1e-5)
    large = [np.repeat(np.repeat(image, 2, 0), 2, 1) for image in pixels]
    assert np.corrcoef(extractor.extract(large).ravel(), features.ravel())[0, 1] > 0.95
    with pytest.raises(ValueError, match="no picture"):
        extractor.extract([])


def test_what_is_wrong_with_pictures_shows_as_a_distance(trained):
    _, extractor = trained
    (_, real), (scenes, others) = drawn(600, 1), drawn(600, 2)
    seen = extractor.extract(real)
    same = frechet_distance(seen, extractor.extract(others))
    noisy = [np.clip(i + np.random.default_rng(0).normal(0, 60, i.shape), 0, 255).astype(np.uint8) for i in others]
    one_color = [render(recolored(scene), (32, 32)) for scene in scenes]
    assert frechet_distance(seen, extractor.extract(noisy)) > 2 * same
    assert frechet_distance(seen, extractor.extract(one_color)) > 2 * same


def recolored(scene):
    told = json.loads(scene)
    return Scene.from_dict({**told, "objects": [{**thing, "color": next(iter(COLORS))} for thing in told["objects"]]})


def test_rows_of_weight_0_count_nothing():
    scenes, pixels = drawn(12)
    task = ExtractorTask(model=SMALL, facts=vocabulary(scenes, 1), optim=OptimConfig())
    module = task.updates()[0].module
    columns = task.collate({"scene": scenes, "pixels": pixels}, lambda salt: np.zeros(12))
    whole = {name: torch.from_numpy(column) for name, column in columns.items()}
    first = {name: column[:8] for name, column in whole.items()} | {"weight": torch.ones(8)}
    padded = whole | {"weight": (torch.arange(12) < 8).float()}
    assert module(padded)["facts"].item() == pytest.approx(module(first)["facts"].item(), rel=1e-5)
    assert float(module.targets(padded)["facts"]) == 8


def test_only_training_rows_with_a_scene_are_learned_from():
    task = ExtractorTask(model=SMALL, facts=("a",), optim=OptimConfig())
    columns = {"split": np.array(["train", "test", "train"], object), "scene": np.array(["{}", "{}", None], object)}
    assert task.where(columns).tolist() == [True, False, False]


def test_facts_of_known_scenes():
    assert facts_of(json.dumps(TWO.to_dict())) == (
        "bottom right blue",
        "bottom right small",
        "bottom right square",
        "top left circle",
        "top left large",
        "top left red",
        "background white",
    )
    black, blue = ({"shape": "square", "color": color, "size": "small", "x_loc": 3} for color in ("black", "blue"))
    boxes = json.dumps([[black, blue], [black]])
    assert facts_of(boxes) == (
        "1 black",
        "1 blue",
        "1 small",
        "1 square",
        "2 black",
        "2 small",
        "2 square",
        "3 small",
        "3 square",
    )
    assert marked([boxes], ["1 black", "1 red", "2 black"]).tolist() == [[1, 0, 1]]
    with pytest.raises(ValueError, match="lacks 'objects'"):
        facts_of("{}")
    with pytest.raises(ValueError, match="has a fact in common with 9 others"):
        vocabulary([boxes] * 9)


def test_sizes_that_cannot_be_halved():
    with pytest.raises(ValueError, match="8 divides"):
        ExtractorConfig(size=(32, 100))
    with pytest.raises(ValueError, match="at least 1"):
        ExtractorConfig(features=0)
