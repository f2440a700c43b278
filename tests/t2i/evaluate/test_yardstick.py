"""Tables name what they measure by, and refuse to compare what cannot be compared."""

from dataclasses import replace

import numpy as np
import pytest

from t2i.evaluate.yardstick import Measured, Yardstick, distances_of, table


def features(n=60, shift=0.0, seed=0):
    return np.random.default_rng(seed).normal(shift, 1, (n, 4))


@pytest.fixture(scope="module")
def yardstick():
    real = distances_of(features(), features(seed=1))
    return Yardstick(corpus="shapes 12", extractor="train_extractor 34", rows=60, real=real)


def measured(yardstick, name="mine", shift=1.0):
    return Measured(name=name, yardstick=yardstick, scores=distances_of(features(), features(shift=shift, seed=2)))


def test_real_against_real_heads_every_table(yardstick):
    near, far = measured(yardstick, "near", 0.5), measured(yardstick, "far", 2)
    lines = table([near, far])
    assert [line["name"] for line in lines] == ["real pictures", "near", "far"]
    assert lines[0]["fid"] < lines[1]["fid"] < lines[2]["fid"]
    assert lines[0]["kid"] < lines[1]["kid"] < lines[2]["kid"]
    for line in lines:
        assert (line["corpus"], line["extractor"], line["rows"]) == ("shapes 12", "train_extractor 34", 60)
        assert {"fid_interval", "kid_interval", "precision", "recall", "density", "coverage"} <= line.keys()
        assert line["fid_interval"][0] < line["fid"] < line["fid_interval"][1]


@pytest.mark.parametrize(
    ("field", "other", "what"),
    [
        ("corpus", "nlvr 56", "corpora"),
        ("extractor", "train_clip 9", "extractors"),
        ("rows", 50, "numbers of pictures"),
        ("yardstick", "calibrate/78", "yardsticks"),
    ],
)
def test_distances_of_two_yardsticks_are_not_compared(yardstick, field, other, what):
    with pytest.raises(ValueError, match=f"two {what} say nothing about each other: .* and {other}"):
        table([measured(yardstick), measured(replace(yardstick, **{field: other}))])
    with pytest.raises(ValueError, match="at least one model"):
        table([])


def test_sets_of_other_sizes_are_not_measured():
    with pytest.raises(ValueError, match="as many as there are real ones, 60, and not 59"):
        distances_of(features(), features(59))
