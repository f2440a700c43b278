"""The logit-Laplace distribution against its closed form."""

import pytest
import torch

from t2i.tokenizers.likelihood import (
    log_density,
    negative_log_likelihood,
    pictures,
    squeezed,
    unsqueezed,
)

KNOWN = [
    (0.1, 0.0, 0.0, -0.482426149),
    (0.5, 0.0, 0.0, 0.693147181),
    (0.9, 1.0, -1.0, -0.539595385),
    (0.3, -0.5, 0.5, 0.156853767),
]


@pytest.mark.parametrize(("x", "mu", "log_b", "wanted"), KNOWN)
def test_the_density_at_known_places(x, mu, log_b, wanted):
    found = log_density(*(torch.tensor(value, dtype=torch.float64) for value in (x, mu, log_b)))
    assert float(found) == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize(("mu", "log_b"), [(0.0, 0.0), (1.0, -1.0), (-0.5, 0.5)])
def test_the_density_is_one_in_all(mu, log_b):
    x = torch.linspace(0, 1, 400_001, dtype=torch.float64)[1:-1]
    density = log_density(x, torch.tensor(mu, dtype=torch.float64), torch.tensor(log_b, dtype=torch.float64)).exp()
    assert float(torch.trapezoid(density, x)) == pytest.approx(1, abs=2e-3)


def test_pixels_are_kept_from_the_bounds_and_come_back():
    images = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
    inner = squeezed(images)
    assert float(inner.min()) == pytest.approx(0.1)
    assert float(inner.max()) == pytest.approx(0.9)
    torch.testing.assert_close(unsqueezed(inner), images)
    torch.testing.assert_close(pictures(torch.cat([torch.logit(inner), inner], 1)), images)


def test_without_a_scale_b_is_one():
    images = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
    mu = torch.linspace(-2, 2, 48).view(1, 3, 4, 4)
    alone = negative_log_likelihood(mu, images)
    assert alone.shape == (1,)
    torch.testing.assert_close(alone, negative_log_likelihood(torch.cat([mu, torch.zeros_like(mu)], 1), images))
