"""Tokenizers alone: what is left of real pictures, against what real pictures are from each other."""

import numpy as np
import pytest

from infra import storage
from infra.cluster import Cluster
from infra.store import Store
from t2i.evaluate import distances
from t2i.tokenizers.patch_vqgan import PatchVQGANConfig
from t2i.tokenizers.quantizers import FiniteScalarConfig
from t2i.tokenizers.task import build_tokenizer, save_tokenizer
from tests.workflows.test_evaluate import make
from tests.workflows.test_yardstick import calibrated, silent  # noqa: F401 -- a fixture
from workflows import rebuild as module
from workflows.options import WORK, further_inputs
from workflows.rebuild import RebuildConfig, rebuild, rfid

CLUSTER = Cluster(name="test", actors=(1, 1))


def table(made, *tokenizers, out, names=()):
    config = RebuildConfig(names=names)
    return rebuild.work(config, made, *tokenizers, out=str(out), cluster=CLUSTER, report=silent)["table"]


def through(**changes):
    """In a tokenizer's place, by its folder's name."""
    return lambda tokenizer, images: (
        [changes[tokenizer.path.split("/")[-3]](image) for image in images],
        {"code_usage": 0.5},
    )


def test_what_nothing_is_lost_of_is_real_pictures(calibrated, tmp_path, monkeypatch):  # noqa: F811
    kept, dark, black = (
        make(tmp_path / name, "train_tokenizer", config={"model": {}}) for name in ("kept", "dark", "black")
    )
    monkeypatch.setattr(
        module, "reconstruct", through(kept=lambda i: i, dark=lambda i: i // 8 * 7, black=np.zeros_like)
    )
    monkeypatch.setattr(module, "sizes_of", lambda *_: {"parameters": 1})
    lines = table(calibrated, kept, dark, black, out=tmp_path / "out", names=("kept", "dark", "black"))
    real, same, darker, none = lines
    assert [line["name"] for line in lines] == ["real pictures", "kept", "dark", "black"]
    by = {"corpus", "extractor", "rows", "yardstick"}
    assert {name: real[name] for name in by} == {name: same[name] for name in by}
    for name in ("fid", "kid", "precision", "recall", "density", "coverage"):
        assert same[name] == real[name] == calibrated.summary["real"][name][0]
    assert same["rfid"] == pytest.approx(0, abs=1e-6)
    assert (same["psnr"], same["ssim"]) == (100, pytest.approx(1))
    assert same["scene_score"] == real["scene_score"] == 1
    assert "psnr" not in real
    assert same["fid"] < darker["fid"] < none["fid"]
    assert 0 < darker["rfid"] < none["rfid"]
    assert darker["psnr"] > none["psnr"]
    assert darker["rfid_interval"][0] <= darker["rfid"] <= darker["rfid_interval"][1]
    assert none["scene_score"] == none["skill_colors"] == 0
    assert storage.read_json(str(tmp_path / "out" / "table.json"))[2]["rfid"] == darker["rfid"]


def test_a_tokenizer_of_ours(calibrated, tmp_path):  # noqa: F811
    """That has learned nothing, through the store, and found again."""
    config = PatchVQGANConfig(patch=8, channels=16, quantizer=FiniteScalarConfig(levels=(3, 3)))
    tokenizer = make(tmp_path, "train_tokenizer", config={"model": {"class": "PatchVQGANConfig"}})
    model = build_tokenizer(config)
    (tmp_path / "train_tokenizer" / tokenizer.id / "model").mkdir()
    save_tokenizer(model, tokenizer.url("model"))
    store = Store(str(tmp_path / "runs"), CLUSTER)
    made = store.step(rebuild, RebuildConfig(), calibrated, tokenizer)
    line = made.summary["table"][1]
    assert line["name"] == f"train_tokenizer {tokenizer.id}"
    assert (line["values"], line["codes"]) == (16, 9)
    assert line["parameters"] == sum(each.numel() for each in model.parameters())
    assert 0 < line["code_usage"] <= 1 <= line["code_perplexity"] <= 9
    assert line["rfid"] > 0
    assert line["n"] == 60
    assert store.step(rebuild, RebuildConfig(), calibrated, tokenizer).path == made.path


def test_rfid_draws_a_picture_with_what_became_of_it():
    """A shift of all features is the same in every draw, however much pictures differ; two sets apart would not say."""
    real = np.random.default_rng(0).normal(size=(300, 6))
    found = rfid(real, real + 0.1)
    assert found.value == pytest.approx(6 * 0.1**2)
    assert found.interval == pytest.approx((found.value, found.value), abs=1e-9)
    low, high = distances.fid(real, real + 0.1).interval
    assert high - low > 0.05


def test_what_cannot_be_rebuilt_is_said(calibrated, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="at least one tokenizer: 0"):
        table(calibrated, out=tmp_path)
    pixels = make(tmp_path / "p", "train_tokenizer", config={"model": {"class": "PixelsConfig"}})
    with pytest.raises(ValueError, match="rebuilds nothing"):
        table(calibrated, pixels, out=tmp_path)
    with pytest.raises(ValueError, match="1, named"):
        table(calibrated, pixels, out=tmp_path, names=("a", "b"))


def test_it_is_a_command():
    assert WORK["rebuild"] is rebuild
    assert list(rebuild.input_names) == ["yardstick"]
    assert further_inputs(rebuild) == ["tokenizers"]
