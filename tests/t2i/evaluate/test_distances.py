"""Distances of sets against closed forms, torchmetrics and what must hold of any distance."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from t2i.evaluate.distances import fid, frechet, frechet_distance, inception_score, kernel_distance, kid

pytestmark = pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features:UserWarning")


def gaussian(n=300, width=4, shift=0.0, scale=1.0, seed=0):
    return np.random.default_rng(seed).normal(shift, scale, (n, width))


def with_moments(mean, covariance, n=50):
    """Rows that have exactly this mean and this unbiased covariance."""
    rows = np.random.default_rng(1).normal(size=(n, len(mean)))
    rows -= rows.mean(0)
    rows = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return rows @ np.linalg.cholesky(np.array(covariance)).T + np.array(mean)


class Shown(torch.nn.Module):
    """An extractor for torchmetrics: pictures (N, D, 1, 1) are their own features."""

    def forward(self, images):
        return images.flatten(1)


def shown(rows):
    return torch.from_numpy(np.asarray(rows))[..., None, None]


# ---- FID


def test_fid_in_closed_form():
    one, four = np.eye(2), 4 * np.eye(2)
    assert frechet(np.zeros(2), one, np.array([1.0, 0]), four) == pytest.approx(3)  # 1 + 2 + 8 - 2 * 4
    wide, other = np.array([[2, 0.5], [0.5, 1]]), np.array([[1, -0.3], [-0.3, 1.5]])
    assert frechet(np.zeros(2), wide, np.array([1.0, 0]), other) == pytest.approx(1.46347119, abs=1e-8)
    sets = with_moments([0, 0], wide), with_moments([1, 0], other)
    assert frechet_distance(*sets) == pytest.approx(1.46347119, abs=1e-8)


@pytest.mark.parametrize(("n", "width"), [(64, 5), (40, 16), (10, 24)])  # the last is singular
def test_fid_is_that_of_torchmetrics(n, width):
    real, drawn = gaussian(n, width), gaussian(n, width, 0.3, 1.4, 1) @ gaussian(width, width, seed=2) / width
    metric = FrechetInceptionDistance(Shown(), input_img_size=(width, 1, 1)).set_dtype(torch.float64)
    metric.update(shown(real), real=True)
    metric.update(shown(drawn), real=False)
    assert frechet_distance(real, drawn) == pytest.approx(float(metric.compute()), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(2, 30), st.integers(1, 6))
def test_fid_is_a_distance_of_sets(seed, n, width):
    rows, others = gaussian(n, width, seed=seed), gaussian(n + 3, width, 0.5, 2, seed + 1)
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6)
    there, back = frechet_distance(rows, others), frechet_distance(others, rows)
    assert there == pytest.approx(back, rel=1e-6, abs=1e-8)
    order = np.random.default_rng(seed).permutation(n)
    assert frechet_distance(rows[order], others) == pytest.approx(there, rel=1e-6, abs=1e-8)
    turn = np.linalg.qr(gaussian(width, width, seed=3))[0]
    assert frechet_distance(rows @ turn + 7, others @ turn + 7) == pytest.approx(there, rel=1e-5, abs=1e-6)


def test_fid_grows_with_what_is_wrong():
    real = gaussian()
    shifted = [frechet_distance(real, gaussian(shift=shift, seed=1)) for shift in (0, 0.2, 0.5, 1, 3)]
    assert shifted == sorted(shifted)
    dropped = [frechet_distance(real, np.where(np.arange(300)[:, None] < n, real, real[0])) for n in (300, 200, 50)]
    assert dropped == sorted(dropped)
    assert dropped[0] == pytest.approx(0, abs=1e-9)


def test_few_rows_are_far_from_their_own_kind():
    """Why sets of one size are compared, and real against real stands beside."""
    assert frechet_distance(gaussian(20, 8), gaussian(20, 8, seed=1)) > 10 * frechet_distance(
        gaussian(2000, 8), gaussian(2000, 8, seed=1)
    )


def test_the_interval_of_a_fid():
    near, far = fid(gaussian(), gaussian(seed=1)), fid(gaussian(), gaussian(shift=1, seed=1))
    assert near.n == 300
    for each in (near, far):
        assert each.interval[0] < each.value < each.interval[1]
    assert near.interval[1] < far.interval[0]
    assert fid(gaussian(), gaussian(seed=1)) == near
    wide = fid(gaussian(30), gaussian(30, shift=1, seed=1))
    assert np.ptp(wide.interval) > 2 * np.ptp(far.interval)


# ---- KID


def test_kid_is_the_unbiased_mmd_of_torchmetrics():
    real, drawn = gaussian(70, 6), gaussian(70, 6, 0.4, seed=1)
    assert kernel_distance(real, drawn) == pytest.approx(float(poly_mmd(*map(torch.from_numpy, (real, drawn)))))
    metric = KernelInceptionDistance(Shown(), subsets=3, subset_size=70).set_dtype(torch.float64)
    metric.update(shown(real), real=True)
    metric.update(shown(drawn), real=False)
    assert kernel_distance(real, drawn, subsets=3) == pytest.approx(float(metric.compute()[0]))


def test_kid_pair_by_pair():
    real, drawn = gaussian(4, 3), gaussian(5, 3, 1, seed=1)

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    within = [np.mean([k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (real, drawn)]
    across = np.mean([k(a, b) for a in real for b in drawn])
    assert kernel_distance(real, drawn) == pytest.approx(sum(within) - 2 * across)


def test_kid_has_no_bias_and_fid_has():
    pairs = [(gaussian(15, 4, seed=2 * seed), gaussian(15, 4, seed=2 * seed + 1)) for seed in range(400)]
    kids, fids = ([measure(*pair) for pair in pairs] for measure in (kernel_distance, frechet_distance))
    assert abs(np.mean(kids)) < 3 * np.std(kids) / 20  # twenty: the root of 400
    assert min(kids) < 0
    assert np.mean(fids) > 20 * np.std(fids) / 20


def test_subsets_are_drawn_by_their_seed():
    real, drawn = gaussian(200), gaussian(200, shift=0.5, seed=1)
    one = kernel_distance(real, drawn, subsets=20, size=50, seed=3)
    assert kernel_distance(real, drawn, subsets=20, size=50, seed=3) == one
    assert kernel_distance(real, drawn, subsets=20, size=50, seed=4) != one
    assert one == pytest.approx(kernel_distance(real, drawn), rel=0.3)
    assert kernel_distance(real, drawn, subsets=2, size=9999) == pytest.approx(kernel_distance(real, drawn))


def test_the_interval_of_a_kid():
    near, far = kid(gaussian(), gaussian(seed=1)), kid(gaussian(), gaussian(shift=1, seed=1))
    assert near.interval[0] < 0 < near.interval[1]
    assert far.interval[0] < far.value < far.interval[1]
    assert near.interval[1] < far.interval[0]


def test_blocks_change_nothing(monkeypatch):
    real, drawn = gaussian(31), gaussian(29, shift=1, seed=1)
    whole = kid(real, drawn, resamples=5)
    monkeypatch.setattr("t2i.evaluate.distances.BLOCK", 7)
    parts = kid(real, drawn, resamples=5)
    assert parts.value == pytest.approx(whole.value)
    assert parts.interval == pytest.approx(whole.interval)


# ---- Inception score


@pytest.mark.filterwarnings("ignore:std:UserWarning")  # torchmetrics': of the one part
def test_inception_score_in_closed_form():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    assert inception_score(probabilities) == pytest.approx(1.33395505, abs=1e-7)
    metric = InceptionScore(Shown(), splits=1)
    metric.update(shown(np.log(probabilities)).float())
    assert inception_score(probabilities) == pytest.approx(float(metric.compute()[0]), rel=1e-5)
    assert inception_score(np.eye(7)) == pytest.approx(7)
    assert inception_score(np.full((5, 4), 0.25)) == pytest.approx(1)


@pytest.mark.parametrize("wrong", [np.zeros((0, 3)), np.ones((2, 2)), np.array([[2.0, -1.0]]), np.ones(3)])
def test_what_are_no_probabilities(wrong):
    with pytest.raises(ValueError, match="rows of at least 0 that sum to 1"):
        inception_score(wrong)


# ---- What cannot be measured


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, fid, kid])
def test_what_has_no_distance(measure):
    with pytest.raises(ValueError, match=r"at least two rows each; found \(1, 4\) and \(300, 4\)"):
        measure(gaussian(1), gaussian())
    with pytest.raises(ValueError, match="two sets of features"):
        measure(gaussian(), gaussian(width=5))
    broken = gaussian()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        measure(gaussian(), broken)
