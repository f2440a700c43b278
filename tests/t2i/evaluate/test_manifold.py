"""Neighbourhoods by brute force, and what the four scores must say of plain cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i.evaluate import manifold
from t2i.evaluate.manifold import manifold_scores, neighbours

NAMES = ("precision", "recall", "density", "coverage")


def rows(n, width=3, shift=0.0, seed=0):
    return np.random.default_rng(seed).normal(shift, 1, (n, width))


def by_hand(real, drawn, k):
    """The papers' definitions, a row and a neighbour at a time."""

    def radius(row, own):
        return sorted(np.linalg.norm(row - other) for other in own)[k]  # the nearest is the row itself

    real_radii, drawn_radii = [radius(row, real) for row in real], [radius(row, drawn) for row in drawn]
    near = [[np.linalg.norm(x - y) for y in drawn] for x in real]
    held = [[near[i][j] < real_radii[i] for j in range(len(drawn))] for i in range(len(real))]
    return {
        "precision": np.mean([any(line[j] for line in held) for j in range(len(drawn))]),
        "recall": np.mean([any(near[i][j] < drawn_radii[j] for j in range(len(drawn))) for i in range(len(real))]),
        "density": sum(map(sum, held)) / k / len(drawn),
        "coverage": np.mean([min(near[i]) < real_radii[i] for i in range(len(real))]),
    }


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(6, 25), st.integers(6, 25), st.integers(1, 5), st.sampled_from([0.0, 0.7, 3.0]))
def test_the_four_are_those_of_the_papers(seed, n, m, k, shift):
    real, drawn = rows(n, seed=seed), rows(m, shift=shift, seed=seed + 1)
    found = {name: each.value for name, each in manifold_scores(real, drawn, k).items()}
    assert found == pytest.approx(by_hand(real, drawn, k))
    order = np.random.default_rng(seed).permutation(m)
    assert {name: each.value for name, each in manifold_scores(real, drawn[order], k).items()} == pytest.approx(found)


def test_precision_and_recall_change_places_with_the_sets():
    real, drawn = rows(40), rows(50, shift=0.8, seed=1)
    there, back = neighbours(real, drawn), neighbours(drawn, real)
    np.testing.assert_array_equal(there["precision"], back["recall"])
    np.testing.assert_array_equal(there["recall"], back["precision"])


def test_plain_cases():
    real = rows(200)
    same = {name: each.value for name, each in manifold_scores(real, real).items()}
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    far = manifold_scores(real, rows(200, shift=50, seed=1))
    assert {name: far[name].value for name in NAMES} == dict.fromkeys(NAMES, 0)
    assert far["precision"].interval[1] > 0  # 200 of 200 are no proof
    again = manifold_scores(real, rows(200, seed=1))
    assert again["density"].value == pytest.approx(1, abs=0.15)
    assert again["density"].interval[0] < 1 < again["density"].interval[1]
    assert (again["precision"].n, again["recall"].n) == (200, 200)


def test_a_half_that_is_never_drawn_costs_recall_and_coverage_alone():
    half = np.concatenate([rows(150), rows(150, shift=30)])
    found = manifold_scores(half, rows(300, seed=1))
    assert found["precision"].value > 0.9
    assert found["coverage"].value < 0.55
    assert found["recall"].value < 0.55


def test_blocks_change_nothing(monkeypatch):
    real, drawn = rows(41), rows(37, seed=1)
    whole = neighbours(real, drawn, 3)
    monkeypatch.setattr(manifold, "BLOCK", 8)
    for name, each in neighbours(real, drawn, 3).items():
        np.testing.assert_array_equal(each, whole[name])


def test_what_has_no_neighbours():
    with pytest.raises(ValueError, match="k is 5: of 5 and 9 rows it is 1 to 4"):
        manifold_scores(rows(5), rows(9))
    with pytest.raises(ValueError, match="k is 0"):
        neighbours(rows(9), rows(9), 0)
    with pytest.raises(ValueError, match=r"\(9, 3\) and \(9, 4\)"):
        neighbours(rows(9), rows(9, 4))
