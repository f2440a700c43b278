"""Reconstruction error and structural similarity in closed form."""

import math

import numpy as np
import pytest

from t2i.evaluate.reconstruction import mean_squared_error, psnr, reconstruction_scores, ssim


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
    low, high = scores.pop("psnr_interval")
    assert scores.pop("mse_interval") == (0, 1)
    assert scores == pytest.approx({"mse": 1 / 4, "psnr": 10 * math.log10(4), "n": 2})  # too small for SSIM
    assert low == 0  # two of two may be the wrong one
    assert high == 100
    assert math.isfinite(reconstruction_scores([small], [small])["psnr"])


def test_images_must_agree_in_size():
    with pytest.raises(ValueError, match="differ in size"):
        mean_squared_error(np.zeros((2, 3, 3), np.uint8), np.zeros((3, 2, 3), np.uint8))


def plain(level):
    return np.full((16, 20, 3), level, np.uint8)


def test_ssim_in_closed_form():
    """Of plain images only the means differ: (2 a b + c) / (a² + b² + c), c = (0.01 · 255)²."""
    a, b, c = 100, 180, 2.55**2
    assert ssim(plain(a), plain(b)) == pytest.approx((2 * a * b + c) / (a * a + b * b + c), rel=1e-9)
    noise = np.random.default_rng(0).integers(0, 256, (16, 20, 3)).astype(np.uint8)
    assert ssim(noise, noise) == pytest.approx(1)
    assert ssim(noise, 255 - noise) < -0.5
    assert ssim(noise, plain(128)) == pytest.approx(0, abs=0.05)


def test_ssim_by_its_formula():
    """Each window by itself: Gaussian means, variances and covariance (Wang et al. 2004, equation 13)."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (7, 8, 3)).astype(np.uint8)
    other = np.clip(image + rng.normal(0, 40, image.shape), 0, 255).astype(np.uint8)
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line)[..., None] / line.sum() ** 2
    wide, other_wide = (np.pad(each.astype(float), [(5, 5), (5, 5), (0, 0)], "reflect") for each in (image, other))
    c1, c2, found = 2.55**2, 7.65**2, []
    for y in range(7):
        for x in range(8):
            a, b = (each[y : y + 11, x : x + 11] for each in (wide, other_wide))
            ma, mb = ((weights * each).sum((0, 1)) for each in (a, b))
            va, vb = ((weights * (each - m) ** 2).sum((0, 1)) for each, m in ((a, ma), (b, mb)))
            ab = (weights * (a - ma) * (b - mb)).sum((0, 1))
            found.append((2 * ma * mb + c1) * (2 * ab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert ssim(image, other) == pytest.approx(np.mean(found), rel=1e-9)


def test_scores_of_images_that_are_large_enough_have_ssim():
    scores = reconstruction_scores([plain(100), plain(100)], [plain(100), plain(180)])
    assert scores["ssim"] == pytest.approx((1 + ssim(plain(100), plain(180))) / 2)
    assert scores["ssim_interval"][0] < scores["ssim"] < scores["ssim_interval"][1]
    assert scores["psnr_interval"][0] < scores["psnr"] < scores["psnr_interval"][1]
    assert "ssim" not in reconstruction_scores([plain(1)[:5]], [plain(1)[:5]])
    with pytest.raises(ValueError, match="at least 6 pixels"):
        ssim(plain(1)[:5], plain(1)[:5])
