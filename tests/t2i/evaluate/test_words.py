"""Word overlap against its closed forms."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
