"""Which CLIP is meant, by an artifact, a folder, a name or a hub's name; and that what it scores is its own."""

import os
from functools import partial

import numpy as np
import pytest

from infra import storage
from infra.config import fingerprint
from infra.data.images import encode_png
from infra.store import Artifact
from t2i.clip.embedder import Embedder
from t2i.evaluate.alignment import clip_score, retrieval
from tests.t2i.clip import tiny
from tests.workflows.test_evaluate import make
from workflows import clips
from workflows.aligned import alignment_scores
from workflows.clips import in_words, key_of, weights_of, with_clips
from workflows.compare import CompareConfig
from workflows.evaluate import ReportConfig, evaluate
from workflows.lookup import keep_name, rephrased
from workflows.sample import SampleConfig
from workflows.yardstick import CalibrateConfig, calibrate, yardstick


def line(path):
    return f"rescribe evaluate --clip {path}"


def exported(folder, seed=1):
    """A tiny CLIP that has learned nothing, as train_clip keeps it."""
    task = tiny.task()
    (update,) = type(task)(**{**vars(task), "seed": seed}).updates()
    task.export({"clip": update.module}, str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def store(tmp_path, monkeypatch, folder):
    """A store with one CLIP, and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    made = make(tmp_path / "runs", "train_clip")
    os.symlink(folder, made.url("model"))
    make(tmp_path / "runs", "train_tokenizer")
    keep_name("runs", "mine", [made])
    return made


def test_a_clip_is_where_it_is_named(store, folder, tmp_path):
    assert weights_of(store.path) == weights_of("runs/train_clip/0123456789abcdef") == store.url("model")
    assert weights_of(folder) == folder
    os.symlink(folder, "beside")
    assert weights_of("beside") == str(tmp_path / "beside")
    assert weights_of("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"
    assert weights_of("") == ""


def test_a_folder_that_changes_is_another_clip(folder, tmp_path):
    """By what files hold, wherever they lie; links, as a hub's cache has them, are followed."""
    known = key_of(folder)
    (tmp_path / "links").mkdir()
    for name in storage.list_names(folder):
        os.symlink(os.path.join(folder, name), tmp_path / "links" / name)
    assert key_of(str(tmp_path / "links")) == known
    assert key_of(exported(tmp_path / "other", seed=2)) != known
    assert key_of("") is key_of("openai/clip-vit-base-patch32") is None


@pytest.mark.parametrize("given", ["latest", "runs", "runs/train_clip", "mine", "runs/mine", "runs/train_clip/latest"])
def test_words_for_a_clip(store, given):
    assert in_words(given, "runs", line) == store.path
    found = with_clips(ReportConfig(clip=given), "runs", partial(rephrased, "evaluate", []))
    assert found == ReportConfig(clip=store.path)


def test_what_is_named_by_its_folder_keeps_its_words(store, folder):
    for given in ("openai/clip-vit-base-patch32", "gpt2", folder, "runs/train_clip/0123456789abcdef", ""):
        assert in_words(given, "runs", line) == given
    config = SampleConfig(prompts=("a",))
    assert with_clips(config, "runs", partial(rephrased, "sample", [])) is config
    with pytest.raises(ValueError, match="was made by train_tokenizer; give what train_clip made"):
        in_words("runs/train_tokenizer/0123456789abcdef", "runs", line)


def test_what_was_made_before_there_was_a_clip_keeps_its_id():
    """As the commit before says them."""
    inputs = [Artifact(f"s/x/{name}", {"id": name, "step": "x"}) for name in "abc"]
    assert evaluate.identity(ReportConfig(title="t"), inputs) == "3eb1861624af789d"
    assert calibrate.identity(CalibrateConfig(), inputs[:2]) == "43191f3c68df4f83"
    assert fingerprint(CompareConfig())[:16] == "aba4081aab309eec"
    assert fingerprint(yardstick())[:16] == "65b96f35592684b8"


def test_another_clip_in_the_same_place_is_another_report(tmp_path):
    config = ReportConfig(clip=exported(tmp_path / "clip"))
    before = evaluate.identity(config, [])
    exported(tmp_path / "clip", seed=2)
    assert evaluate.identity(config, []) != before


def rows(count, draw):
    return [{"prompt": tiny.caption(row), "image": encode_png(draw(row))} for row in range(count)]


def test_scores_are_those_of_the_functions(folder):
    """By a CLIP that knows nothing, over prompts that come twice."""
    drawn = rows(24, lambda row: tiny.picture(row, (16, 16)))
    real = [(each["prompt"], tiny.picture(number + 1, (16, 16))) for number, each in enumerate(drawn[:10])]
    scores = alignment_scores(folder, drawn, real)
    embedder = Embedder(folder)
    pictures = [tiny.picture(row, (16, 16)) for row in range(24)], [picture for _, picture in real]
    texts = [each["prompt"] for each in drawn], [prompt for prompt, _ in real]
    for prefix, seen, read in zip(("", "real_"), pictures, texts, strict=True):
        images, words = embedder.embed_images(seen).numpy(), embedder.embed_texts(read).numpy()
        wanted = {"clip_score": clip_score(images, words)}
        found = retrieval(images, words, read, read, ks=(1,))
        wanted |= {f"retrieval_{name}": each for name, each in found.items()}
        for name, each in wanted.items():
            assert scores[f"{prefix}{name}"] == pytest.approx(each.value)
            assert scores[f"{prefix}{name}_interval"] == pytest.approx(each.interval)
            assert scores[f"{prefix}{name}_n"] == each.n
    assert scores["clip_cut"] == 0


def test_few_pictures_and_none(folder):
    (drawn,) = rows(1, lambda row: np.zeros((16, 16, 3), np.uint8))
    scores = alignment_scores(folder, [drawn | {"prompt": "red over blue " * 9}])
    assert scores["clip_cut"] == scores["clip_score_n"] == scores["retrieval_text_r@1"] == 1
    assert "clip_score_interval" not in scores  # of one picture nothing is known
    assert not [name for name in scores if name.startswith("real_")]
    assert alignment_scores("nowhere", [], []) == {}
    with pytest.raises(FileNotFoundError, match="There is no CLIP at"):
        alignment_scores(str(clips.__file__) + ".x/", [drawn])
