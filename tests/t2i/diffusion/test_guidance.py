"""Guidance against its closed forms: where it leads Gaussian data, and the formulas of the papers."""

import math

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from t2i.diffusion.guidance import apart, by_gradient, classifier_free, shift_of, thresholded
from t2i.diffusion.ladder import ladder, spaced
from t2i.diffusion.process import Process
from t2i.diffusion.samplers import ancestral, beginning
from t2i.diffusion.schedules import EDM, Betas, Cosine, Flow, alpha_sigma
from t2i.random import keys_of, normals
from tests.t2i.diffusion.gaussian import Gaussian

DOUBLE = torch.float64
PROCESS = Process(prediction="v")
KEYS = keys_of(range(4))
X = normals(KEYS, (4, 3, 3), "x", dtype=DOUBLE)
T = torch.tensor([900.0, 500.0, 100.0, 3.0], dtype=DOUBLE)
SHARE = torch.full_like(X, 0.3)


def said(value):
    return lambda x, t: (value * torch.cos(x), SHARE * value)


PAIR = apart(said(1.0), said(-0.5))


def test_the_formula_and_the_variance():
    (told, share), (without, _) = PAIR(X, T)
    found = classifier_free(PROCESS, PAIR, 3.0)(X, T)
    assert torch.allclose(found[0], without + 3 * (told - without))
    assert found[1] is not None
    assert torch.equal(found[1], share)
    assert torch.allclose(classifier_free(PROCESS, PAIR, 1.0)(X, T)[0], told)
    each = torch.tensor([1.0, 2.0, 0.0, 7.5], dtype=DOUBLE)
    by_row = classifier_free(PROCESS, PAIR, each)(X, T)[0]
    for row, scale in enumerate(each.tolist()):
        assert torch.allclose(by_row[row], classifier_free(PROCESS, PAIR, scale)(X, T)[0][row])


def test_it_is_the_same_guidance_of_any_prediction():
    """Epsilon, x_0, v and velocity are linear in one another, so a scale means the same in all."""
    a, b, scale = Gaussian(0.5, 0.4), Gaussian(-0.2, 0.9), 2.5
    estimates = []
    for prediction in ("epsilon", "x0", "v", "velocity"):
        process = Process(schedule=Cosine(), prediction=prediction)
        guided = classifier_free(process, apart(a.denoiser(process), b.denoiser(process)), scale)
        estimates.append(process.estimate(guided(X, T / 1000)[0], X, Cosine().lambda_at(T / 1000)).x0)
    for other in estimates[1:]:
        assert torch.allclose(other, estimates[0])


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
def test_it_leads_gaussian_data_where_the_product_of_densities_lies(scale):
    """p(x|c)^w p(x)^(1-w) of Gaussians of one deviation is a Gaussian of mean w m_c + (1-w) m, at any noise."""
    told, without = Gaussian(1.0, 0.5), Gaussian(0.2, 0.5)
    guided = classifier_free(PROCESS, apart(told.denoiser(PROCESS), without.denoiser(PROCESS)), scale)
    product = Gaussian(scale * 1.0 + (1 - scale) * 0.2, 0.5)
    assert torch.allclose(guided(X, T)[0], product.denoiser(PROCESS)(X, T)[0])


def test_guidance_in_an_interval():
    asked = []

    def alone(x, t):
        asked.append(len(x))
        return PAIR(x, t)[0]

    sigma = torch.exp(-Betas().lambda_at(T))
    low, high = float(sigma[3]), float(sigma[1])  # open below, closed above: rows 1 and 2 are within
    guided = classifier_free(PROCESS, PAIR, 3.0, interval=(low, high), alone=alone, rescale=0.5)
    found, everywhere = guided(X, T)[0], classifier_free(PROCESS, PAIR, 3.0, rescale=0.5)(X, T)[0]
    assert torch.equal(found[1:3], everywhere[1:3])
    assert torch.equal(found[[0, 3]], PAIR(X, T)[0][0][[0, 3]])
    assert not asked
    assert torch.equal(guided(X[:1], T[:1])[0], PAIR(X, T)[0][0][:1])
    assert asked == [1]


def test_rescale_is_that_of_the_paper():
    (told, _), _ = PAIR(X, T)
    plain = classifier_free(PROCESS, PAIR, 5.0)(X, T)[0]
    for phi in (0.3, 0.7, 1.0):
        found = classifier_free(PROCESS, PAIR, 5.0, rescale=phi)(X, T)[0]
        assert torch.allclose(found, rescale_noise_cfg(plain, told, phi))
    assert torch.allclose(found.flatten(1).std(1), told.flatten(1).std(1))
    silent = classifier_free(PROCESS, apart(*[lambda x, t: (torch.zeros_like(x), None)] * 2), 5.0, rescale=1.0)
    assert torch.equal(silent(X, T)[0], torch.zeros_like(X))


def test_some_channels_alone_are_guided():
    guided, plain = classifier_free(PROCESS, PAIR, 2.0, channels=3)(X, T)[0], PAIR(X, T)[0][0]
    assert torch.equal(guided[:, 3:], plain[:, 3:])
    assert torch.allclose(guided[:, :3], classifier_free(PROCESS, PAIR, 2.0)(X, T)[0][:, :3])


def seen(process, mean=0.3, deviation=0.5, told=1.0, doubt=0.4):
    """log p(y | x_t) where y is x_0 with noise of `doubt`: of Gaussian data, exactly."""

    def log_p(x, t):
        lambda_ = process.schedule.lambda_at(t)[:, None]
        alpha, sigma = alpha_sigma(process.schedule.path, lambda_)
        spread = alpha**2 * deviation**2 + sigma**2
        x0 = mean + alpha * deviation**2 / spread * (x - alpha * mean)
        return -((told - x0) ** 2 / (doubt**2 + deviation**2 * sigma**2 / spread) / 2).sum(1)

    return log_p


WEIGHT = 0.25 / (0.25 + 0.16)
CONDITIONAL = Gaussian(0.3 + WEIGHT * 0.7, math.sqrt(0.25 * (1 - WEIGHT)))  # of x_0 given y = 1


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "velocity"])
@pytest.mark.parametrize("schedule", [Betas(), EDM(), Flow()], ids=["betas", "edm", "flow"])
def test_a_gradient_makes_the_conditional(schedule, prediction):
    """Bayes: the denoiser of p(x), led by p(y | x_t), is the denoiser of p(x | y)."""
    if isinstance(schedule, Flow) and prediction == "epsilon":
        return
    process = Process(schedule=schedule, prediction=prediction)
    t = schedule.last + torch.linspace(0.05, 0.95, 5, dtype=DOUBLE) * (schedule.first - schedule.last)
    x = torch.linspace(-2, 2, 5, dtype=DOUBLE)[:, None]
    guided = by_gradient(process, Gaussian().denoiser(process), seen(process), 1.0)
    with torch.no_grad():
        assert torch.allclose(guided(x, t)[0], CONDITIONAL.denoiser(process)(x, t)[0], atol=1e-9)
    assert torch.allclose(
        by_gradient(process, Gaussian().denoiser(process), seen(process), 0.0)(x, t)[0],
        Gaussian().denoiser(process)(x, t)[0],
    )


def test_a_gradient_and_a_variance():
    guided = by_gradient(PROCESS, said(1.0), lambda x, t: -x.square().flatten(1).sum(1), 2.0)
    assert guided(X, T)[1] is not None
    assert torch.equal(guided(X, T)[1], SHARE)


def test_where_nothing_is_left_there_is_nothing_to_follow():
    process = Process(schedule=Betas(zero_terminal_snr=True), prediction="v")
    guided = by_gradient(process, said(1.0), lambda x, t: -x.square().flatten(1).sum(1), 2.0)
    at_the_end = torch.full((4,), 999.0, dtype=DOUBLE)
    assert torch.equal(guided(X, at_the_end)[0], said(1.0)(X, at_the_end)[0])


def test_the_shift_of_the_mean():
    """One step: the mean moves by variance times gradient, the noise stays; and a whole chain ends at p(x | y)."""
    process, scale = Process(), 1.0
    shift = shift_of(seen(process), scale)
    steps = ladder(Betas(), [500, 400])
    x, keys = X[:, 0, 0, :1], KEYS
    denoise = Gaussian().denoiser(process)
    part = steps.part(0, 1)
    moved = ancestral(process, denoise, x, part, keys, shift=shift, variance="largest")
    plain = ancestral(process, denoise, x, part, keys, variance="largest")
    bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=DOUBLE)).cumprod(0)
    assert torch.allclose(moved - plain, (1 - bar[500] / bar[400]) * shift(x, torch.full((4,), 500.0)), rtol=1e-5)
    steps = ladder(Betas(), spaced(Betas(), 250, "leading"))
    keys = keys_of(range(3000))
    x = beginning(process, steps, keys, (1,)).double()
    drawn = ancestral(process, denoise, x, steps, keys, shift=shift)
    assert float(drawn.mean()) == pytest.approx(CONDITIONAL.mean, abs=0.03)
    assert float(drawn.std()) == pytest.approx(CONDITIONAL.deviation, rel=0.05)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_dynamic_thresholding_is_imagens(prediction):
    process, t = Process(prediction=prediction), torch.tensor([300.0], dtype=DOUBLE)
    lambda_ = Betas().lambda_at(t)
    x0 = torch.tensor([[0.1, -0.5, 2.0, 4.0]], dtype=DOUBLE)
    x = process.noised(x0, X[0, 0, 0, :1].expand(1, 4), lambda_)

    def denoise(x, t):
        alpha, sigma = alpha_sigma("preserving", lambda_)
        return process.target(x0, (x - alpha * x0) / sigma, lambda_), None

    def found(**settings):
        return process.estimate(thresholded(process, denoise, **settings)(x, t)[0], x, lambda_).x0[0].tolist()

    assert found(percentile=0.9) == pytest.approx([0.0294118, -0.147059, 0.588235, 1], abs=1e-6)
    assert found(percentile=0.9, bound=2.0) == pytest.approx([0.0588235, -0.294118, 1.176471, 2], abs=1e-6)
    assert found(percentile=0.1) == pytest.approx([0.1, -0.5, 1, 1])  # never less than the bound
    assert found() == pytest.approx([0.1, -0.5, 1, 1])
    assert found(bound=0.25) == pytest.approx([0.1, -0.25, 0.25, 0.25])
    assert found(bound=9.0) == pytest.approx([0.1, -0.5, 2, 4])


def test_rows_are_thresholded_alone():
    denoise = thresholded(PROCESS, lambda x, t: (5 * torch.cos(x), SHARE[: len(x)]), percentile=0.8)
    whole = denoise(X, T)
    for row in range(4):
        assert torch.allclose(denoise(X[row : row + 1], T[row : row + 1])[0][0], whole[0][row])
    assert whole[1] is not None
    assert torch.equal(whole[1], SHARE)


@pytest.mark.parametrize("settings", [{"bound": 0.0}, {"percentile": 1.0}, {"percentile": 0.0}])
def test_what_cannot_be_is_refused(settings):
    with pytest.raises(ValueError, match="percentile"):
        thresholded(PROCESS, said(1.0), **settings)
