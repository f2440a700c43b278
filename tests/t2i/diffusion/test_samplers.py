"""Samplers against what is known of Gaussian data: the ODE's solution, the chain's moments; and rows alone."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i.diffusion.ladder import Ladder, even, karras, ladder, spaced
from t2i.diffusion.process import Process, posterior
from t2i.diffusion.samplers import (
    ancestral,
    beginning,
    consistency,
    consistent,
    ddim,
    dpm_solver_2m,
    dpm_solver_2s,
    heun,
    invert,
)
from t2i.diffusion.schedules import EDM, Betas, Cosine, Flow, Sigmoid, alpha_sigma
from t2i.random import keys_of
from tests.t2i.diffusion.gaussian import Gaussian

DOUBLE = torch.float64
DATA = Gaussian(torch.tensor([0.3], dtype=DOUBLE), torch.tensor([0.5], dtype=DOUBLE))
PROCESSES = {
    "epsilon": Process(schedule=Cosine(least=1e-3)),
    "v": Process(schedule=Cosine(least=1e-3), prediction="v"),
    "x0": Process(schedule=Sigmoid(least=1e-3), prediction="x0"),
    "betas": Process(schedule=Betas(beta_last=0.01), prediction="v"),
    "edm": Process(schedule=EDM(sigma_min=0.05, sigma_max=10.0), prediction="v"),
    "flow": Process(schedule=Flow(), prediction="velocity"),
}


def unfolded(process, count):
    """A ladder between finite ends, even in lambda where the schedule allows, on which a method shows its order."""
    if isinstance(process.schedule, Flow):
        t = torch.linspace(0.98, 0.02, count + 1, dtype=DOUBLE)
        return Ladder(t[:-1], process.schedule.lambda_at(t))
    return karras(process.schedule, count, to_zero=False)


@pytest.mark.parametrize(
    ("sampler", "order"),
    [(ddim, 1), (dpm_solver_2m, 2), (dpm_solver_2s, 2), (heun, 2)],
    ids=["ddim", "2m", "2s", "heun"],
)
@pytest.mark.parametrize("name", PROCESSES)
def test_the_error_falls_with_the_order_of_the_method(name, sampler, order):
    process = PROCESSES[name]
    errors = [DATA.error(sampler, process, unfolded(process, count)) for count in (128, 256)]
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(order, abs=0.25), errors
    assert errors[-1] < {1: 2e-2, 2: 1e-3}[order]


def test_flows_begin_without_signal():
    """A flow's ladder has lambda = -inf first and inf last: Euler has order 1 on it, and Heun 2."""
    process = PROCESSES["flow"]
    for sampler, order in ((ddim, 1), (heun, 2)):
        errors = [DATA.error(sampler, process, even(Flow(), count)) for count in (32, 64, 128)]
        assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.3), errors
    for sampler in (dpm_solver_2m, dpm_solver_2s):
        assert DATA.error(sampler, process, even(Flow(), 128)) < 0.02


@pytest.mark.parametrize("sampler", [ddim, dpm_solver_2m, dpm_solver_2s, heun], ids=["ddim", "2m", "2s", "heun"])
@pytest.mark.parametrize("prediction", ["v", "x0", "velocity"])
def test_zero_terminal_snr_is_sampled_from_its_first_step(prediction, sampler):
    process = Process(schedule=Betas(shape="scaled_linear", zero_terminal_snr=True), prediction=prediction)
    steps = ladder(process.schedule, spaced(process.schedule, 200, "trailing"))
    assert DATA.error(sampler, process, steps) < 0.03


def test_points_are_drawn_exactly():
    """Data of one value: every sampler arrives there, whatever the steps."""
    point = Gaussian(torch.tensor([0.7], dtype=DOUBLE), torch.tensor([1e-9], dtype=DOUBLE))
    keys, process = keys_of(range(5)), Process()
    steps = ladder(Betas(), spaced(Betas(), 7, "leading"))
    x = beginning(process, steps, keys, (1,)).double()
    for sampler in (
        ddim, dpm_solver_2m, dpm_solver_2s, heun,
        partial(ancestral, keys_B=keys), partial(ddim, keys_B=keys, eta=0.6), partial(consistency, keys_B=keys),
        partial(heun, keys_B=keys, churn=0.3),
    ):  # fmt: skip
        assert torch.allclose(sampler(process, point.denoiser(process), x, steps), torch.full_like(x, 0.7), atol=1e-6)


@pytest.mark.parametrize("variance", ["least", "largest"])
@pytest.mark.parametrize("name", ["betas", "edm", "flow"])
def test_the_chains_moments(name, variance):
    """Mean and variance pass through each step in closed form; the draws have those of the last."""
    process, keys = PROCESSES[name], keys_of(range(20_000))
    steps = karras(process.schedule, 12, to_zero=False) if name != "flow" else unfolded(process, 12)
    mean, spread = torch.tensor(0.0, dtype=DOUBLE), DATA.spread(process, steps.lambdas[0])
    x = spread.sqrt() * beginning(Process(), steps, keys, (1,)).double()
    for before, after in itertools.pairwise(steps.lambdas):
        exact = posterior(process.schedule, before, after)
        alpha, _ = alpha_sigma(process.schedule.path, before)
        gain = alpha * DATA.deviation**2 / DATA.spread(process, before)
        through = exact.of_x0 * gain + exact.of_x
        mean = through * mean + exact.of_x0 * (1 - gain * alpha) * DATA.mean
        added = (exact.log_least if variance == "least" else exact.log_largest).exp()
        spread = through**2 * spread + added
    x = ancestral(process, DATA.denoiser(process), x, steps, keys, variance=variance)
    assert float(x.mean()) == pytest.approx(float(mean), abs=4 * math.sqrt(float(spread) / 20_000))
    assert float(x.var()) == pytest.approx(float(spread), rel=4 * math.sqrt(2 / 20_000))


def test_a_learned_variance_makes_few_steps_exact():
    """With the true variance of x_s given x_t each step, however large, keeps the data's own spread."""
    process, keys = Process(learned_variance=True), keys_of(range(20_000))
    steps = ladder(Betas(), [999, 600, 300, 100, 40])
    ideal = DATA.denoiser(process)
    after = dict(zip(steps.times.tolist(), steps.lambdas[1:], strict=True))

    def denoise(x, t):
        prediction, _ = ideal(x, t)
        lambda_ = process.schedule.lambda_at(t[0])
        exact = posterior(process.schedule, lambda_, after[float(t[0])])
        _, sigma = alpha_sigma("preserving", lambda_)
        true = exact.log_least.exp() + exact.of_x0**2 * DATA.deviation**2 * sigma**2 / DATA.spread(process, lambda_)
        share = (true.log() - exact.log_least) / (exact.log_largest - exact.log_least) * 2 - 1
        assert share.isnan().all() or -1 <= float(share) <= 1
        return prediction, share.nan_to_num().expand_as(x)

    alpha, _ = alpha_sigma("preserving", steps.lambdas[0])
    x = (
        alpha * DATA.mean
        + DATA.spread(process, steps.lambdas[0]).sqrt() * beginning(process, steps, keys, (1,)).double()
    )
    for stop in range(1, 5):
        part = steps.part(0, stop)
        drawn = ancestral(process, denoise, x, part, keys)
        alpha, _ = alpha_sigma("preserving", part.lambdas[-1])
        assert float(drawn.var()) == pytest.approx(float(DATA.spread(process, part.lambdas[-1])), rel=0.04)
        assert float(drawn.mean()) == pytest.approx(float(alpha * DATA.mean), abs=0.03)
        if stop == 4:
            plain = ancestral(process, ideal, x, part, keys)
            assert float(plain.var()) < 0.8 * float(drawn.var())


def test_churn_keeps_the_spread():
    """EDM's noise, of share S_noise = 1, and the ODE's steps leave the law of x_t as it is."""
    process, keys = PROCESSES["edm"], keys_of(range(20_000))
    steps = karras(process.schedule, 40, to_zero=False)
    x = DATA.mean + DATA.spread(process, steps.lambdas[0]).sqrt() * beginning(Process(), steps, keys, (1,)).double()
    drawn = heun(process, DATA.denoiser(process), x, steps, keys, churn=0.3)
    still = heun(process, DATA.denoiser(process), x, steps)
    assert float(drawn.var()) == pytest.approx(float(DATA.spread(process, steps.lambdas[-1])), rel=0.05)
    assert abs(float(torch.corrcoef(torch.stack([drawn[:, 0], still[:, 0]]))[0, 1])) < 0.1  # it forgot where it began
    outside = heun(process, DATA.denoiser(process), x, steps, keys, churn=0.3, churn_within=(20.0, 30.0))
    assert torch.equal(outside, still)


@pytest.mark.parametrize("name", ["epsilon", "v", "edm", "flow"])
def test_ancestral_is_ddim_with_eta_one(name):
    process, keys = PROCESSES[name], keys_of(range(4))
    steps = even(process.schedule, 9)
    x = beginning(process, steps, keys, (3, 2)).double()
    denoise = DATA.denoiser(process)
    one = ancestral(process, denoise, x, steps, keys)
    assert torch.allclose(one, ddim(process, denoise, x, steps, keys, eta=1.0), atol=1e-9)
    assert not torch.allclose(one, ancestral(process, denoise, x, steps, keys, variance="largest"), atol=1e-2)


def test_inversion_finds_the_noise_again():
    process, x = Process(), torch.linspace(-1, 1.5, 7, dtype=DOUBLE)[:, None]
    errors = []
    for count in (50, 100, 200):
        steps = ladder(Betas(), spaced(Betas(), count, "leading"))
        noise = invert(process, DATA.denoiser(process), x, steps)
        errors.append(float((ddim(process, DATA.denoiser(process), noise, steps) - x).abs().max()))
        expected = DATA.led(process, x, steps.lambdas[-1], steps.lambdas[0])
        assert torch.allclose(noise, expected, atol=8 / count)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.3), errors


def test_a_consistency_function_needs_one_step():
    """The ODE's own map to the data: after any number of steps the draws have the data's law."""
    process, keys = Process(), keys_of(range(20_000))

    def denoise(x, t):
        lambda_ = Betas().lambda_at(t)[:, None]
        x0 = DATA.led(process, x, lambda_, torch.full_like(lambda_, math.inf))
        (alpha, sigma) = alpha_sigma("preserving", lambda_)
        return (x - alpha * x0) / sigma, None

    for times in ([999], [999, 500], [999, 759, 499, 259]):
        steps = ladder(Betas(), times)
        drawn = consistency(process, denoise, beginning(process, steps, keys, (1,)).double(), steps, keys)
        assert float(drawn.mean()) == pytest.approx(0.3, abs=0.02)
        assert float(drawn.std()) == pytest.approx(0.5, abs=0.015)


def test_a_consistent_denoiser_is_the_identity_at_no_noise():
    process, x = Process(), torch.linspace(-1, 1, 5, dtype=DOUBLE)[:, None]
    function = consistent(process, DATA.denoiser(process))
    t = torch.zeros(5, dtype=DOUBLE)
    assert torch.allclose(process.estimate(function(x, t)[0], x, Betas().lambda_at(t)).x0, x)
    late = process.estimate(function(x, t + 900)[0], x, Betas().lambda_at(t + 900)).x0
    plain = process.estimate(DATA.denoiser(process)(x, t + 900)[0], x, Betas().lambda_at(t + 900)).x0
    assert torch.allclose(late, plain, atol=1e-4)
    with pytest.raises(ValueError, match="schedule of Betas"):
        consistent(PROCESSES["flow"], DATA.denoiser(process))


SAMPLERS = {
    "ancestral": ancestral,
    "ddim": partial(ddim, eta=0.7),
    "2m": lambda process, denoise, x, steps, keys: dpm_solver_2m(process, denoise, x, steps),
    "2s": lambda process, denoise, x, steps, keys: dpm_solver_2s(process, denoise, x, steps),
    "heun": partial(heun, churn=0.2),
    "consistency": consistency,
}


@given(st.sampled_from(list(SAMPLERS)), st.permutations(range(6)), st.integers(1, 6))
@settings(max_examples=30)
def test_rows_stand_alone(name, order, size):
    process, keys = Process(prediction="v"), keys_of(range(6))
    steps = ladder(Betas(), spaced(Betas(), 5, "trailing"))
    x, denoise = beginning(process, steps, keys, (2, 2)), Gaussian().denoiser(process)
    whole = SAMPLERS[name](process, denoise, x, steps, keys)
    for start in range(0, 6, size):
        rows = torch.tensor(order[start : start + size])
        assert torch.equal(beginning(process, steps, keys[rows], (2, 2)), x[rows])
        assert torch.allclose(SAMPLERS[name](process, denoise, x[rows], steps, keys[rows]), whole[rows], atol=1e-6)


@pytest.mark.parametrize("name", ["ancestral", "ddim", "heun", "consistency"])
@pytest.mark.parametrize("cut", [1, 4])
def test_a_ladder_may_be_cut(name, cut):
    process, keys = Process(prediction="v"), keys_of(range(3))
    steps = ladder(Betas(), spaced(Betas(), 6, "trailing"))
    x, denoise = beginning(process, steps, keys, (4,)), Gaussian().denoiser(process)
    halfway = SAMPLERS[name](process, denoise, x, steps.part(0, cut), keys)
    whole = SAMPLERS[name](process, denoise, x, steps, keys)
    assert torch.allclose(SAMPLERS[name](process, denoise, halfway, steps.part(cut, 6), keys), whole, atol=1e-6)


def test_calls_are_counted_as_said():
    asked = []

    def counting(x, t):
        asked.append(t.tolist())
        return torch.zeros_like(x), None

    process, keys = Process(), keys_of([0, 1])
    steps = ladder(Betas(), [999, 666, 333, 1])
    x = beginning(process, steps, keys, (2,))
    for name, sampler in SAMPLERS.items():
        asked.clear()
        if name == "heun":
            heun(process, counting, x, steps)
            expected = [999, 666, 666, 333, 333, 1, 1]
        else:
            sampler(process, counting, x, steps, keys)
            expected = [999, 666, 333, 1]
        assert asked == [[t, t] for t in expected], name


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_that_leads_nowhere_is_no_trouble(name):
    """Where a schedule is held off its ends lambda stands still; and latent diffusion ends where t = 0 lies."""
    keys, shares = keys_of(range(3)), torch.full((3, 2), 0.2, dtype=DOUBLE)
    schedule = Cosine(least=0.02)
    for process, steps in (
        (Process(schedule=schedule), even(schedule, 40, to_zero=False)),
        (Process(learned_variance=True), ladder(Betas(), [999, 500, 0], to_zero=False)),
    ):
        assert (steps.lambdas[1:] == steps.lambdas[:-1]).any()
        ideal = DATA.denoiser(process)
        x = beginning(process, steps, keys, (2,)).double()

        def denoise(x, t, ideal=ideal, process=process):
            return ideal(x, t)[0], shares if process.learned_variance else None

        assert SAMPLERS[name](process, denoise, x, steps, keys).isfinite().all()


def test_what_cannot_be_is_refused():
    process, x, denoise = Process(prediction="x0"), torch.zeros(1, 1), Gaussian().denoiser(Process())
    steps = ladder(Betas(), [999, 1])
    with pytest.raises(ValueError, match="needs a key"):
        ddim(process, denoise, x, steps, eta=0.5)
    with pytest.raises(ValueError, match="needs a key"):
        heun(process, denoise, x, steps, churn=0.1)
    with pytest.raises(ValueError, match="along sigma / alpha"):
        heun(PROCESSES["flow"], denoise, x, even(Flow(), 3), keys_of([0]), churn=0.1)
    with pytest.raises(ValueError, match="to_zero=False"):
        invert(process, denoise, x, steps)
