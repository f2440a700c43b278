"""Usage and perplexity of codes in closed form."""

import numpy as np
import pytest

from t2i.evaluate.codes import code_scores, perplexity


def test_usage_and_perplexity_of_known_codes():
    even = code_scores(np.arange(16).reshape(4, 2, 2), 16)
    assert even["code_usage"].value == 1
    assert even["code_perplexity"].value == pytest.approx(16)
    one = code_scores(np.full((4, 2, 2), 3), 16)
    assert one["code_usage"].value == 1 / 16
    assert one["code_perplexity"].value == pytest.approx(1)
    assert perplexity(np.array([2, 1, 1, 0])) == pytest.approx(2**1.5)  # 1.5 bits


def test_perplexity_never_exceeds_the_codes_in_use():
    codes = np.random.default_rng(0).zipf(1.5, (300, 9)) % 64
    found = code_scores(codes, 64)
    assert 1 <= found["code_perplexity"].value <= 64 * found["code_usage"].value
    assert found["code_perplexity"].interval[0] < found["code_perplexity"].value < found["code_perplexity"].interval[1]
    assert found["code_usage"].n == 300


@pytest.mark.parametrize("codes", [np.zeros((0, 4), int), np.array([[16]]), np.array([[-1]])])
def test_codes_of_another_book(codes):
    with pytest.raises(ValueError, match=r"within \[0, 16\)"):
        code_scores(codes, 16)


def test_pictures_may_have_any_number_of_codes():
    found = code_scores([np.array([[0, 1]]), np.array([2, 2, 3, 3])], 4)
    assert found["code_usage"].value == 1
    assert found["code_perplexity"].value == pytest.approx(np.exp(2 / 6 * np.log(6) + 4 / 6 * np.log(3)))
    with pytest.raises(ValueError, match="at least one"):
        code_scores([], 4)
