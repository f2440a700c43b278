import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.matching import MatchingConfig
from captioner.model import Captioner, CaptionerConfig, TextConfig, VisionConfig
from captioner.styles import DESCRIPTIVE, SHORT, Style
from infra import storage
from infra.cluster import Cluster
from infra.store import Artifact
from infra.train.loop import TrainConfig
from workflows import train_captioner as workflow
from workflows.recaption import RecaptionConfig
from workflows.train_captioner import TrainCaptionerConfig

MODEL = CaptionerConfig(
    vision=VisionConfig(image_size=(16, 8), patch_size=8, hidden=32, layers=1, heads=2, mlp=32),
    text=TextConfig(hidden=32, layers=1, heads=2, mlp=32, max_length=16),
)
ROWS = {
    "sample_id": ["00", "01", "02"],
    "state": ["accepted"] * 3,
    "reason": pa.array([None] * 3, pa.string()),
    "split": ["train", "train", "test"],
    "caption_alt": ["a red house", "IMG_12.jpg", "zebra"],
    "reference_short": ["a house", None, "a zebra"],
    "reference_descriptive": pa.array([None, None, "a zebra in the grass"], pa.string()),
}


@pytest.fixture
def images(tmp_path):
    os.makedirs(tmp_path / "images" / "shards")
    pq.write_table(pa.table(ROWS), tmp_path / "images" / "shards" / "000000.parquet")
    return Artifact(str(tmp_path / "images"), {"id": "images"})


@pytest.fixture
def train(images, tmp_path, monkeypatch):
    """The step with the loop left out: what is trained is exported as it begins. `train.fits` says what was."""

    def fit(trainings, cluster, report):
        figures = {}
        for training in trainings:
            assert training.inputs == [images.path]
            finished = storage.join(training.out, "finished.json")
            if not storage.exists(finished):
                run.fits.append(training.task)
                (update,) = training.task.updates()
                os.makedirs(storage.join(training.out, "model"))
                training.task.export({update.name: update.module}, storage.join(training.out, "model"))
                storage.write_json(finished, {f"{update.name}/loss": 1.0, "step": training.config.steps})
            figures |= storage.read_json(finished)
        return figures

    def run(config):
        return workflow.train_captioner.work(
            config, images, out=str(tmp_path / "out"), cluster=Cluster(name="none"), report=print
        )

    run.fits = []
    monkeypatch.setattr(workflow, "fit", fit)
    return run


def config(**changes):
    return TrainCaptionerConfig(**{"model": MODEL, "styles": (SHORT,), "vocabulary_size": 100} | changes)


def test_a_filter_between_the_base_and_the_styles(train, tmp_path):
    summary = train(config(filter=TrainConfig(steps=3)))
    assert summary["filter_loss"] == 1.0
    base, judge, tuned = train.fits
    assert base.alternatives is None, "the base was not asked for altered texts"
    assert judge.source == str(tmp_path / "out" / "base" / "model")
    assert judge.alternatives is not None
    assert tuned.source == str(tmp_path / "out" / "filter" / "model")
    captioner = Captioner.load(str(tmp_path / "out" / "model"))
    assert captioner.matching.config.match == 1
    assert list(captioner.decoders) == ["alt", "short"]


def test_without_a_filter_nothing_is_counted(train, monkeypatch):
    monkeypatch.setattr(workflow.Alternatives, "count", None)
    train(config())
    assert train.fits[0].alternatives is None


def test_a_filter_needs_a_matching_head():
    with pytest.raises(ValueError, match="filter"):
        config(filter=TrainConfig(steps=3), filter_matching=MatchingConfig(contrastive=1))


def test_a_base_then_a_decoder_a_style(train, tmp_path):
    summary = train(config())
    assert summary["styles"] == ["short"]
    assert summary["base_loss"] == summary["finetune_loss"] == 1.0
    captioner = Captioner.load(str(tmp_path / "out" / "model"))
    assert list(captioner.decoders) == ["alt", "short"]
    assert captioner.styles == (SHORT,)
    assert captioner.image_size == (16, 8)
    assert len(captioner.vocabulary.encode(["a red house"])[0]) == 3
    assert captioner.vocabulary.tokenizer.token_to_id("zebra") is None, "not even the words of test rows may be seen"


def test_what_is_done_is_not_done_again(train, tmp_path):
    train(config())
    words = (tmp_path / "out" / "vocabulary" / "tokenizer.json").stat().st_mtime_ns
    train(config())
    assert len(train.fits) == 2
    assert (tmp_path / "out" / "vocabulary" / "tokenizer.json").stat().st_mtime_ns == words


def test_a_style_without_labels_is_an_error(train):
    with pytest.raises(ValueError, match="reference_descriptive"):
        train(config(styles=(SHORT, DESCRIPTIVE)))


def test_the_base_alone(train, tmp_path):
    train(config(styles=()))
    assert list(Captioner.load(str(tmp_path / "out" / "model")).decoders) == ["alt"]
    assert len(train.fits) == 1


def test_from_a_trained_captioner(train, tmp_path):
    train(config(styles=()))
    os.rename(tmp_path / "out", tmp_path / "first")
    train(config(model=str(tmp_path / "first" / "model"), base=None))
    assert list(Captioner.load(str(tmp_path / "out" / "model")).decoders) == ["alt", "short"]
    assert [type(task).__name__ for task in train.fits] == ["BaseTask", "FinetuneTask"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(vocabulary_size=10), "too small"),
        (lambda: config(base=None), "base training"),
        (lambda: config(styles=(SHORT, Style(name="short"))), "names of their own"),
        (lambda: config(styles=(Style(name="alt"),)), "names of their own"),
        (lambda: RecaptionConfig(styles=(Style(name="alt"),)), "names of their own"),
        (lambda: RecaptionConfig(batch=0), "batch"),
        (lambda: config(base=TrainConfig(steps=0)), "steps"),
    ],
)
def test_configs_check_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()
