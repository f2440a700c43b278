import pickle

import numpy as np
import pytest
import torch

from captioner.model import Captioner, CaptionerConfig, TextConfig, VisionConfig
from captioner.stages import Caption
from captioner.styles import DESCRIPTIVE, SHORT
from captioner.task import BaseTask, FinetuneTask
from captioner.tower import Tower
from captioner.vocabulary import train_vocabulary
from infra.data.stage import Stage
from infra.train.engine import PlainEngine
from infra.train.optim import OptimConfig

COLORS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
ROWS = [(top, bottom) for top in COLORS for bottom in COLORS]
SIZE = (16, 8)


def draw(top, bottom):
    image = np.zeros((20, 10, 3), np.uint8)
    image[:10], image[10:] = COLORS[top], COLORS[bottom]
    return image


TABLE = {
    "pixels": [draw(*row) for row in ROWS],
    "caption_alt": [f"{top} above {bottom}" for top, bottom in ROWS],
    "reference_short": [top for top, _ in ROWS],
    "reference_descriptive": [f"the top is {top}, the bottom is {bottom}" for top, bottom in ROWS],
}
TEXTS = [text for name, column in TABLE.items() if name != "pixels" for text in column]


@pytest.fixture(scope="module")
def vocabulary():
    return train_vocabulary(TEXTS, 200)


@pytest.fixture(scope="module")
def base_task(vocabulary):
    config = CaptionerConfig(
        vision=VisionConfig(image_size=SIZE, patch_size=8, hidden=64, layers=1, mlp=64),
        text=TextConfig(hidden=64, layers=1, mlp=64, max_length=20),
    )
    return BaseTask(
        source=config,
        vocabulary=vocabulary,
        image_size=SIZE,
        max_length=20,
        optim=OptimConfig(lr=3e-3, warmup_steps=10, schedule="constant"),
    )


def train(task, steps, folder):
    """A few steps of the plain engine, on all rows at once; returns the first and the last losses a token."""
    (update,) = task.updates()
    arrays = task.collate({name: TABLE[name] for name in task.reads if name in TABLE}, lambda salt: np.zeros(len(ROWS)))
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()} | {"weight": torch.ones(len(ROWS))}
    engine, history = PlainEngine(update), []
    for _ in range(steps):
        losses, counts = engine(batch), update.module.targets(batch)
        engine.backward(sum(losses[name] / counts[name] for name in losses))
        engine.step(task.optim.lr)
        history.append({name: losses[name].item() / counts[name].item() for name in losses})
    task.export({update.name: update.module.eval()}, str(folder))
    return history[0], history[-1]


@pytest.fixture(scope="module")
def trained(base_task, vocabulary, tmp_path_factory):
    base, tuned = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("tuned")
    first, last = train(base_task, 150, base)
    assert last["alt"] < 0.1 < first["alt"]
    task = FinetuneTask(
        source=str(base),
        styles=(SHORT, DESCRIPTIVE),
        vocabulary=vocabulary,
        image_size=SIZE,
        max_length=20,
        optim=OptimConfig(lr=3e-3),
    )
    _, last = train(task, 60, tuned)
    assert max(last.values()) < 0.1
    return str(base), str(tuned), task


def test_the_first_weights_come_from_the_seed(base_task):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again = (base_task.updates()[0].module.state_dict() for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_tasks_travel(base_task, trained):
    for task in (base_task, trained[2]):
        other = pickle.loads(pickle.dumps(task))
        assert other.reads == task.reads
        assert other.where_reads == task.where_reads


def test_a_checkpoint_of_styles_holds_their_decoders_alone(trained):
    (update,) = trained[2].updates()
    state = PlainEngine(update).state()
    assert {name.split("/")[2].rsplit(".", 1)[0].split(".")[1] for name in state} == {"short", "descriptive"}
    assert {name.split("/")[1] for name in state} == {"w"}
    assert len(state) == 2 * len([*update.module.decoders["alt"].parameters()])


def test_rows_to_train_on(base_task, trained):
    split = np.array(["train", "train", "test", "train"], object)
    columns = {"split": split, "caption_alt": np.array(["a", None, "b", ""], object)}
    assert base_task.where(columns).tolist() == [True, False, False, False]
    columns = {
        "split": split,
        "reference_short": np.array([None, "a", "b", None], object),
        "reference_descriptive": np.array([None, None, "b", "c"], object),
    }
    assert trained[2].where(columns).tolist() == [False, True, False, True]


def test_collate_fits_images_and_hides_unknown_words(base_task, vocabulary):
    batch = base_task.collate({"pixels": TABLE["pixels"][:2], "caption_alt": ["red ☃", "blue"]}, None)
    assert batch["pixels"].shape == (2, *SIZE, 3)
    assert batch["pixels"].dtype == np.uint8
    assert vocabulary.unk in batch["ids_alt"]
    assert not batch["mask_alt"][batch["ids_alt"] == vocabulary.unk].any()
    assert batch["mask_alt"].sum() == 2 + 2


def test_a_row_without_a_style_has_no_targets_in_it(trained):
    rows = {"pixels": TABLE["pixels"][:2], "reference_short": ["red", None], "reference_descriptive": [None, "blue"]}
    batch = trained[2].collate(rows, None)
    assert batch["mask_short"].sum(1).tolist() == [2, 0]
    assert batch["mask_descriptive"].sum(1).tolist() == [0, 2]


def test_fine_tuning_keeps_the_tower_and_the_base(trained):
    base, tuned = (Captioner.load(folder).state_dict() for folder in trained[:2])
    assert all(torch.equal(base[name], tuned[name]) for name in base)
    assert any(name.startswith("decoders.descriptive") for name in tuned)


def test_the_stage_says_what_it_was_taught(trained):
    stage = Caption(Tower(trained[1]), (SHORT, DESCRIPTIVE))
    assert isinstance(stage, Stage)
    stage = pickle.loads(pickle.dumps(stage))
    stage.setup()
    swapped = [TABLE["caption_alt"][-1], *TABLE["caption_alt"][1:]]  # the first row's alt text is another's
    columns = stage({stage.tower.view: TABLE["pixels"], "caption_alt": swapped})
    assert set(columns) == set(stage.writes)
    assert columns["caption_short"] == TABLE["reference_short"]
    assert columns["caption_descriptive"] == TABLE["reference_descriptive"]
    assert all(-0.5 < value <= 0 for name in ("logp_short", "logp_descriptive") for value in columns[name])
    assert columns["logp_alt"][0] < min(columns["logp_alt"][1:]) - 1


def test_the_stage_in_bf16(trained):
    stage = Caption(Tower(trained[1], "bf16"), (DESCRIPTIVE,))
    stage.setup()
    columns = stage({stage.tower.view: TABLE["pixels"], "caption_alt": TABLE["caption_alt"]})
    assert columns["caption_descriptive"] == TABLE["reference_descriptive"]
