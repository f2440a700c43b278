"""Word overlap and reconstruction error against their closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2i.evaluate.reconstruction import mean_squared_error, psnr, reconstruction_scores
from t2i.evaluate.words import overlap, tokens, word_scores


def test_tokens_ignore_case_and_punctuation():
    assert tokens("A high-heeled Shoe, woman’s.") == ["a", "high", "heeled", "shoe", "woman", "s"]
    assert tokens(" -- ") == []


@pytest.mark.parametrize(
    ("caption", "reference", "expected"),
    [
        ("red heart", "red heart", (1, 1, 1)),
        ("red", "red heart", (1, 1 / 2, 2 / 3)),
        ("red red red", "red heart", (1 / 3, 1 / 2, 2 / 5)),
        ("dog", "red heart", (0, 0, 0)),
        ("", "red heart", (0, 0, 0)),
        ("", "", (1, 1, 1)),
    ],
)
def test_overlap_counts_each_word_once(caption, reference, expected):
    assert overlap(caption, reference) == pytest.approx(expected)


def test_scores_are_means_and_exact_wants_the_order():
    scores = word_scores(["heart red", "Red Heart!", None, "red"], ["red heart"] * 4)
    assert scores == pytest.approx(
        {"precision": 3 / 4, "recall": 2.5 / 4, "f1": (2 + 2 / 3) / 4, "exact": 1 / 4, "n": 4}
    )


def test_no_captions_score_zero():
    assert word_scores([], []) == {"precision": 0, "recall": 0, "f1": 0, "exact": 0, "n": 0}


@given(st.text(), st.text())
def test_overlap_is_symmetric_and_bounded(one, other):
    precision, recall, f1 = overlap(one, other)
    assert overlap(other, one) == (recall, precision, f1)
    assert 0 <= min(precision, recall) <= f1 <= max(precision, recall) <= 1


def test_error_of_known_images():
    black, white = np.zeros((4, 6, 3), np.uint8), np.full((4, 6, 3), 255, np.uint8)
    assert mean_squared_error(black, white) == 1
    assert mean_squared_error(black, black) == 0
    half = black.copy()
    half[:2] = 255
    assert mean_squared_error(black, half) == 0.5


def test_psnr_of_known_errors():
    assert psnr(1.0) == 0
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(1 / 255**2) == pytest.approx(48.1308, abs=1e-4)  # off by one level everywhere
    assert psnr(0.0) == math.inf


def test_reconstruction_pools_pixels_of_images_of_any_size():
    small, large = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 6, 3), np.uint8)
    scores = reconstruction_scores([small, large], [small + 255, large])
    assert scores == pytest.approx({"mse": 1 / 4, "psnr": 10 * math.log10(4), "n": 2})
    assert math.isfinite(reconstruction_scores([small], [small])["psnr"])


def test_images_must_agree_in_size():
    with pytest.raises(ValueError, match="differ in size"):
        mean_squared_error(np.zeros((2, 3, 3), np.uint8), np.zeros((3, 2, 3), np.uint8))
