"""The process: that its parts agree, its weights against their papers, its bound against IDDPM's own numbers."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st

from t2i.diffusion.process import Process, posterior, spread
from t2i.diffusion.schedules import EDM, Betas, Cosine, Flow, Sigmoid, alpha_sigma
from tests.t2i.diffusion.gaussian import Gaussian

ZERO = Betas(zero_terminal_snr=True)
SCHEDULES = {"betas": Betas(), "cosine": Cosine(), "sigmoid": Sigmoid(), "edm": EDM(), "flow": Flow()}
KINDS = [
    (name, prediction)
    for name in SCHEDULES
    for prediction in ("epsilon", "x0", "v", "velocity")
    if (name, prediction) != ("flow", "epsilon")
]
DOUBLE = torch.float64


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@given(st.sampled_from(KINDS), st.lists(st.floats(-6, 6), min_size=4, max_size=4))
def test_an_estimate_undoes_its_target(kind, lambdas):
    process = Process(schedule=SCHEDULES[kind[0]], prediction=kind[1])
    x0, epsilon, lambda_ = rows(4, 3, 2), rows(4, 3, 2, seed=1), torch.tensor(lambdas, dtype=DOUBLE)
    x = process.noised(x0, epsilon, lambda_)
    target = process.target(x0, epsilon, lambda_)
    found = process.estimate(target, x, lambda_)
    assert torch.allclose(found.x0, x0, atol=1e-9)
    assert torch.allclose(found.epsilon, epsilon, atol=1e-9)
    by = rows(4, 3, 2, seed=2)
    moved = process.estimate(process.moved(target, by, lambda_), x, lambda_)
    assert torch.allclose(moved.x0, x0 + by, atol=1e-9)
    alpha, sigma = (each.view(-1, 1, 1) for each in alpha_sigma(process.schedule.path, lambda_))
    assert torch.allclose(alpha * moved.x0 + sigma * moved.epsilon, x, atol=1e-7)


def test_targets_are_those_of_the_papers():
    x0, epsilon, t = rows(1, 5), rows(1, 5, seed=1), torch.tensor([400])
    alpha, sigma = alpha_sigma("preserving", Betas().lambda_at(t))
    theirs = DDPMScheduler()
    noised = theirs.add_noise(x0, epsilon, t)
    assert torch.allclose(Process().noised(x0, epsilon, Betas().lambda_at(t)), noised, atol=1e-5)
    velocity = theirs.get_velocity(x0, epsilon, t)
    v = Process(prediction="v").target(x0, epsilon, Betas().lambda_at(t))
    assert torch.allclose(v, velocity, atol=1e-5)
    assert torch.allclose(v, alpha * epsilon - sigma * x0)
    flow = Process(schedule=Flow(), prediction="velocity")
    at = Flow().lambda_at(torch.tensor([0.3]))
    assert torch.allclose(flow.noised(x0, epsilon, at), 0.7 * x0 + 0.3 * epsilon, atol=1e-7)
    assert torch.allclose(flow.target(x0, epsilon, at), epsilon - x0)


def test_v_on_an_edm_schedule_is_edms_preconditioning():
    """D = c_skip x + c_out F with table 1 of arXiv 2206.00364, and loss weight times c_out^2 = 1."""
    process, sigma = Process(schedule=EDM(data_deviation=0.5), prediction="v"), torch.tensor([0.1, 3.0], dtype=DOUBLE)
    x, network = rows(2, 4), rows(2, 4, seed=1)
    found = process.estimate(-network, x, -sigma.log()).x0
    skip = 0.25 / (sigma**2 + 0.25)
    out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    assert torch.allclose(found, skip[:, None] * x + out[:, None] * network)
    assert torch.allclose(process.input_scale(-sigma.log()), 1 / (sigma**2 + 0.25).sqrt())
    weighed = process.weight(sigma.log() / 4)
    assert torch.allclose(weighed, (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * out**2)
    x0 = 0.5 * rows(100_000, 1)
    for level in sigma:  # what the network hears and says has unit variance
        at = (-level.log()).expand(len(x0))
        epsilon = rows(len(x0), 1, seed=5)
        heard = process.noised(x0, epsilon, at) * process.input_scale(at)[:, None]
        assert float(heard.std()) == pytest.approx(1, abs=0.02)
        assert float(process.target(x0, epsilon, at).std()) == pytest.approx(1, abs=0.02)


def test_nothing_left_is_no_trouble():
    t = torch.tensor([999.0])
    x0, epsilon = rows(1, 3), rows(1, 3, seed=1)
    for prediction in ("v", "velocity", "x0"):
        for schedule, at in ((ZERO, t), (Flow(), t / 999)):
            process, lambda_ = Process(schedule=schedule, prediction=prediction), schedule.lambda_at(at)
            target = process.target(x0, epsilon, lambda_)
            assert torch.equal(process.noised(x0, epsilon, lambda_), epsilon)
            assert torch.allclose(process.estimate(target, epsilon, lambda_).x0, x0)
            assert torch.allclose(process.estimate(target, epsilon, lambda_).epsilon, epsilon)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_weights_are_those_of_the_papers(prediction):
    t = torch.tensor([20, 100, 500, 900])  # before these their float32 rounds 1 - alpha bar
    snr = compute_snr(DDPMScheduler(), t).double()
    of_x0 = {"epsilon": 1 / snr, "x0": torch.ones(4), "v": 1 / (snr + 1)}[prediction]

    def weight(name, **settings):
        return Process(prediction=prediction, weighting=name, **settings).weight(t)

    assert torch.equal(weight("simple"), torch.ones(4, dtype=DOUBLE))
    assert torch.allclose(weight("snr"), snr * of_x0, rtol=3e-4)
    assert torch.allclose(weight("min_snr"), snr.clamp(max=5) * of_x0, rtol=3e-4)
    assert torch.allclose(weight("min_snr", gamma=2.0), snr.clamp(max=2) * of_x0, rtol=3e-4)
    assert torch.allclose(weight("p2"), snr / (1 + snr) * of_x0, rtol=3e-4)
    assert torch.allclose(weight("p2", gamma=0.5), snr / (1 + snr) ** 0.5 * of_x0, rtol=3e-4)
    beta = DDPMScheduler().betas.double()[t]
    bar, before = (DDPMScheduler().alphas_cumprod.double()[each] for each in (t, t - 1))
    tilde = beta * (1 - before) / (1 - bar)
    of_epsilon = beta**2 / (2 * tilde * (1 - beta) * (1 - bar))  # DDPM, eq. 12
    assert torch.allclose(weight("vlb"), of_epsilon * snr * of_x0, rtol=2e-3)
    first = Process(prediction=prediction, weighting="vlb")
    assert first.weight(torch.tensor([0])).isfinite().all()


def test_the_bound_of_continuous_time_is_the_limit_of_many_steps():
    process = Process(schedule=Cosine(), prediction="x0", weighting="vlb")
    t, h = torch.tensor([0.2, 0.5, 0.8], dtype=DOUBLE), 1e-4
    snr = [torch.exp(2 * Cosine().lambda_at(t + step)) for step in (-h / 2, h / 2)]
    assert torch.allclose(process.weight(t), (snr[0] - snr[1]) / (2 * h), rtol=1e-5)


def test_the_posterior_is_ddpms():
    t = torch.tensor([1, 10, 999])
    betas, bar = DDPMScheduler().betas.double()[t], DDPMScheduler().alphas_cumprod.double()
    bar, before = bar[t], bar[t - 1]
    found = posterior(Betas(), Betas().lambda_at(t), Betas().lambda_at(t - 1))
    for ours, theirs in (
        (found.of_x0, before.sqrt() * betas / (1 - bar)),
        (found.of_x, (1 - betas).sqrt() * (1 - before) / (1 - bar)),
        (found.log_least.exp(), (1 - before) / (1 - bar) * betas),
        (found.log_largest.exp(), betas),
    ):
        assert torch.allclose(ours, theirs, rtol=1e-3)
    ends = spread(found, torch.tensor([[-1.0], [0.0], [1.0]], dtype=DOUBLE)).flatten()
    assert torch.allclose(
        ends, torch.stack([found.log_least[0], (found.log_least + found.log_largest)[1] / 2, found.log_largest[2]])
    )


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_the_posterior_is_bayes_rule(schedule):
    """For data of N(0, 1): q(x_s | x_t) from the joint Gaussian, by the linear estimate of x_0."""
    low, high = torch.tensor(0.4, dtype=DOUBLE), torch.tensor(-0.7, dtype=DOUBLE)
    (a_s, s_s), (a_t, s_t) = alpha_sigma(schedule.path, low), alpha_sigma(schedule.path, high)
    found = posterior(schedule, high, low)
    gain = a_t / (a_t**2 + s_t**2)  # E[x0 | x_t] = gain x_t
    through = found.of_x0 * gain + found.of_x
    kept = a_s * a_t + (a_t / a_s) * s_s**2  # cov(x_s, x_t), x_t = (a_t / a_s) x_s + fresh noise
    assert float(through) == pytest.approx(float(kept / (a_t**2 + s_t**2)))
    left = a_s**2 + s_s**2 - kept**2 / (a_t**2 + s_t**2)
    spread_of_x0 = s_t**2 / (a_t**2 + s_t**2)
    assert float(found.log_least.exp() + found.of_x0**2 * spread_of_x0) == pytest.approx(float(left))


def test_the_bound_is_the_divergence_in_bits():
    process = Process(learned_variance=True)
    t, x0, epsilon = torch.tensor([1, 400]), rows(2, 6), rows(2, 6, seed=1)
    lambda_ = Betas().lambda_at(t)
    x = process.noised(x0, epsilon, lambda_)
    prediction, share = rows(2, 6, seed=2), rows(2, 6, seed=3).clamp(-1, 1)
    found = process.bound((prediction, share), x0, x, t)
    exact = posterior(Betas(), lambda_, Betas().lambda_at(t - 1))
    guess = process.estimate(prediction, x, lambda_).x0
    ours, true = (
        torch.distributions.Normal(exact.of_x0[:, None] * each + exact.of_x[:, None] * x, deviation)
        for each, deviation in (
            (guess, torch.exp(spread(exact, share) / 2)),
            (x0, torch.exp(exact.log_least / 2)[:, None].expand(2, 6)),
        )
    )
    kl = torch.distributions.kl_divergence(true, ours).mean(1) / math.log(2)
    assert torch.allclose(found, kl)
    right = process.bound((epsilon, -torch.ones_like(x)), x0, x, t)
    assert torch.allclose(right, torch.zeros(2, dtype=DOUBLE), atol=1e-9)


def test_the_first_step_is_the_likelihood_of_pixels():
    """The probabilities of all 256 values of a pixel sum to 1, and the bound is that of the one that is there."""
    process, t = Process(learned_variance=True), torch.zeros(256, dtype=torch.int64)
    pixels = torch.linspace(-1, 1, 256, dtype=DOUBLE)[:, None]
    x = torch.full((256, 1), 0.437, dtype=DOUBLE)
    for share in (-1.0, 1.0):
        said = process.target(torch.full_like(x, 0.43), torch.zeros_like(x), Betas().lambda_at(t)) * 0
        bits = process.bound((said, torch.full_like(x, share)), pixels, x, t)
        assert float((2**-bits).sum()) == pytest.approx(1, abs=1e-8)
        assert abs(int(bits.argmin()) - (0.437 / Betas().lambda_at(t).mul(2).sigmoid().sqrt()[0] + 1) * 127.5) < 0.6
    edge = process.bound((x * 0, x), torch.ones_like(x), torch.full_like(x, 1.5), t)
    assert float(edge.max()) == pytest.approx(0, abs=1e-9)  # all that lies beyond white is white


def test_the_hybrid_loss_moves_the_variance_alone_by_the_bound():
    process = Process(learned_variance=True, schedule=Betas(steps=500), weighting="min_snr")
    t, x0, epsilon = torch.tensor([0, 1, 400]), rows(3, 6), rows(3, 6, seed=1)
    prediction = rows(3, 6, seed=2).requires_grad_()
    share = torch.zeros(3, 6, dtype=DOUBLE, requires_grad=True)
    losses = process.losses((prediction, share), x0, epsilon, t)
    error = (prediction - epsilon).square().mean(1)
    assert torch.allclose(losses["error"], error * process.weight(t))
    x = process.noised(x0, epsilon, process.schedule.lambda_at(t))
    assert torch.allclose(losses["bound"], process.bound((prediction, share), x0, x, t) / 2)
    losses["bound"].sum().backward()
    assert prediction.grad is None or not prediction.grad.any()
    assert (share.grad != 0).any(dim=1).all()


def test_the_best_share_is_the_true_variance():
    """Of Gaussian data the bound is least where the variance is that of x_s given x_t."""
    data, process, t = Gaussian(0.0, 0.7), Process(learned_variance=True), torch.full((40_000,), 30)
    lambda_ = Betas().lambda_at(t)
    x0 = 0.7 * rows(40_000, 1, seed=1)
    x = process.noised(x0, rows(40_000, 1, seed=2), lambda_)
    prediction, _ = data.denoiser(process)(x, t)
    exact = posterior(Betas(), lambda_[0], Betas().lambda_at(t[0] - 1))
    alpha, sigma = alpha_sigma("preserving", lambda_[0])
    true = exact.log_least.exp() + exact.of_x0**2 * 0.49 * sigma**2 / (alpha**2 * 0.49 + sigma**2)
    best = float((true.log() - exact.log_least) / (exact.log_largest - exact.log_least)) * 2 - 1
    bounds = [
        float(process.bound((prediction, torch.full_like(x, share)), x0, x, t).mean())
        for share in (best - 0.3, best, best + 0.3)
    ]
    assert bounds[1] < min(bounds[0], bounds[2])


def test_tables_that_sampling_made_serve_training():
    schedule = Betas(beta_last=0.0199)
    with torch.inference_mode():
        schedule.lambda_at(torch.tensor([3]))
    process, x0 = Process(schedule=schedule), rows(1, 2).requires_grad_()
    process.noised(x0, x0, schedule.lambda_at(torch.tensor([3]))).sum().backward()
    assert x0.grad is not None


def test_values_keep_their_type():
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    assert Process().noised(x, x, Betas().lambda_at(torch.tensor([3, 4]))).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schedule": ZERO}, "predict v"),
        ({"schedule": Flow()}, "predict v"),
        ({"schedule": Cosine(), "learned_variance": True}, "needs a schedule of Betas"),
        ({"gamma": 5.0}, "belongs to min_snr"),
        ({"gamma": -1.0, "weighting": "p2"}, "above 0"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Process(**settings)


def test_a_silent_network_is_refused():
    with pytest.raises(ValueError, match="says nothing of it"):
        Process(learned_variance=True).losses((rows(1, 2), None), rows(1, 2), rows(1, 2), torch.tensor([5]))
