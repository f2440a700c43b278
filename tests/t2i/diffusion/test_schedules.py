"""Schedules and ladders against the papers' numbers, diffusers, and their own inverses."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_ddpm_wuerstchen import DDPMWuerstchenScheduler
from hypothesis import given
from hypothesis import strategies as st

from t2i.diffusion.ladder import consistency_times, even, karras, ladder, respaced, spaced
from t2i.diffusion.schedules import EDM, Betas, Cosine, Flow, Sigmoid, alpha_sigma

LINEAR = Betas()
STABLE = Betas(shape="scaled_linear", beta_first=0.00085, beta_last=0.012)
ALL = {
    "linear": LINEAR,
    "stable": STABLE,
    "betas cosine": Betas(shape="cosine"),
    "betas sigmoid": Betas(shape="sigmoid"),
    "zero": Betas(shape="scaled_linear", zero_terminal_snr=True),
    "cosine": Cosine(),
    "sigmoid": Sigmoid(start=-3, end=3, tau=0.7),
    "edm": EDM(),
    "flow": Flow(),
}


def alpha_bar(schedule, t):
    return alpha_sigma(schedule.path, schedule.lambda_at(torch.tensor(t, dtype=torch.float64)))[0] ** 2


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LINEAR, [0.9999, 0.999780092, 0.521423031, 0.0777966584, 0.00330015836, 4.03582977e-5]),
        (Betas(shape="cosine"), [0.999958716, 0.999912576, 0.845887986, 0.492285172, 0.143178646, 2.42876691e-9]),
        (STABLE, [0.99915, 0.998296028, 0.673792625, 0.276332684, 0.056169848, 0.00466009851]),
        (
            Betas(shape="scaled_linear", beta_first=0.0015, beta_last=0.0195),
            [0.9985, 0.996994427, 0.50842433, 0.114922001, 0.00833413595, 1.42303975e-4],
        ),
    ],
    ids=["ddpm", "iddpm", "stable diffusion", "latent diffusion"],
)
def test_what_is_left_is_what_the_papers_code_computes(schedule, expected):
    assert alpha_bar(schedule, [0, 1, 250, 500, 750, 999]).tolist() == pytest.approx(expected, rel=2e-8)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("shape", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_betas_are_those_of_diffusers(shape, zero):
    name = {"cosine": "squaredcos_cap_v2"}.get(shape, shape)
    theirs = DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero).alphas_cumprod.double()
    ours = alpha_bar(Betas(shape=shape, zero_terminal_snr=zero), list(range(1000)))
    # Theirs are products in float32; and their rescaling divides each by the one before.
    assert torch.allclose(ours, theirs, rtol=3e-5, atol=2e-7)
    if zero:
        assert ours[-1] == 0


def test_the_continuous_cosine_is_wuerstchens():
    theirs = DDPMWuerstchenScheduler()
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    expected = theirs._alpha_cumprod(t, "cpu").double()
    assert torch.allclose(alpha_bar(Cosine(least=1e-4), t.tolist()), expected, atol=1e-6)
    assert alpha_bar(Cosine(), [0.25, 0.5, 0.75]).tolist() == pytest.approx([0.8470122, 0.4938436, 0.1442720], abs=1e-6)


def test_the_sigmoid_runs_from_all_to_nothing_and_is_even():
    schedule = Sigmoid()
    assert alpha_bar(schedule, [0.0, 0.5, 1.0]).tolist() == pytest.approx([1, 0.5, 0], abs=1e-8)
    place = 1 / (1 + math.exp(-(-3 + 6 * 0.2)))
    high, low = 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(3))
    assert float(alpha_bar(schedule, 0.2)) == pytest.approx((high - place) / (high - low))


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())
def test_lambda_falls_and_time_is_its_inverse(schedule):
    t = torch.linspace(schedule.last, schedule.first, 1203, dtype=torch.float64)
    lambda_ = schedule.lambda_at(t)
    assert (lambda_[1:] < lambda_[:-1]).all() or schedule in (ALL["zero"], ALL["cosine"], ALL["sigmoid"])
    inner = lambda_.isfinite() & ((lambda_ - lambda_[0]).abs() > 1e-6) & ((lambda_ - lambda_[-1]).abs() > 1e-6)
    assert inner.sum() > 1195
    assert torch.allclose(schedule.time_at(lambda_[inner]), t[inner], atol=1e-6)


@given(st.sampled_from(list(ALL)), st.floats(-40, 40))
def test_signal_and_noise_lie_on_the_path(name, lambda_):
    alpha, sigma = alpha_sigma(ALL[name].path, torch.tensor(lambda_, dtype=torch.float64))
    assert float(alpha.log() - sigma.log()) == pytest.approx(lambda_, abs=1e-9)
    whole = {"preserving": alpha**2 + sigma**2, "exploding": alpha, "straight": alpha + sigma}[ALL[name].path]
    assert float(whole) == pytest.approx(1, abs=1e-12)


def test_the_ends_are_exact():
    ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    for path in ("preserving", "straight"):
        assert [each.tolist() for each in alpha_sigma(path, ends)] == [[0, 1], [1, 0]]
    assert alpha_sigma("exploding", ends[1:])[1].tolist() == [0]
    assert ALL["zero"].lambda_at(torch.tensor([999, 998.5, 998])).tolist()[:2] == [-math.inf, -math.inf]
    assert ALL["zero"].time_at(ends).tolist() == [999, 0]
    assert Flow().lambda_at(torch.tensor([1.0, 0.0])).tolist() == [-math.inf, math.inf]


def test_times_for_training_have_their_law():
    uniforms = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert torch.bincount(LINEAR.drawn(uniforms).long()).tolist() == [100] * 1000
    log_sigma = 4 * EDM().drawn(uniforms)
    assert [float(log_sigma.mean()), float(log_sigma.std())] == pytest.approx([-1.2, 1.2], abs=1e-3)
    assert torch.equal(Flow().drawn(uniforms), uniforms)
    logit = torch.logit(Flow(mean=0.5, deviation=2.0).drawn(uniforms))
    assert [float(logit.mean()), float(logit.std())] == pytest.approx([0.5, 2.0], abs=1e-3)
    assert float(Flow(shift=3.0).drawn(torch.tensor(0.5))) == pytest.approx(0.75)
    for schedule in (EDM(), Flow(deviation=1.0)):
        assert schedule.drawn(torch.tensor([0.0, 1 - 2**-24])).isfinite().all()


def test_spacings_are_those_of_the_paper():
    assert spaced(LINEAR, 10, "leading") == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert spaced(LINEAR, 10, "linspace") == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert spaced(LINEAR, 10, "trailing") == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert spaced(LINEAR, 3, "leading", offset=1) == [667, 334, 1]
    assert consistency_times(LINEAR, 4) == [999, 759, 499, 259]


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [2, 7, 30, 64, 999, 1000])
def test_spacings_are_those_of_diffusers(spacing, steps):
    theirs = DDPMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    assert spaced(LINEAR, steps, spacing) == theirs.timesteps.tolist()


def test_adms_sections():
    assert respaced(LINEAR, "250")[::-1][:4] == [0, 4, 8, 12]
    assert respaced(LINEAR, "250")[:2] == [999, 995]
    assert respaced(LINEAR, "ddim25") == list(range(960, -1, -40))
    fast27 = [0, 22, 44, 66, 88, 111, 133, 155, 177, 199, 200, 222, 244, 266, 288, 311, 333, 355, 377, 399]
    assert respaced(LINEAR, "10,10,3,2,2")[::-1] == [*fast27, 400, 500, 599, 600, 799, 800, 999]
    assert respaced(LINEAR, "2,2,2") == [999, 667, 666, 334, 333, 0]  # what is left over goes to the first
    for wrong in ("ddim600", "2000", "0,5"):
        with pytest.raises(ValueError, match=r"steps"):
            respaced(LINEAR, wrong)


def test_karras_steps_are_those_of_the_paper_and_of_diffusers():
    steps = karras(EDM(), 18)
    index = torch.arange(18)
    sigma = (80 ** (1 / 7) + index / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(torch.exp(-steps.lambdas[:-1]).float(), sigma, rtol=1e-5)
    assert torch.allclose(steps.times.float(), sigma.log() / 4, atol=1e-5)
    assert steps.lambdas[-1] == math.inf
    theirs = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    theirs.set_timesteps(10)
    ours = karras(LINEAR, 10)
    assert torch.allclose(torch.exp(-ours.lambdas).float(), theirs.sigmas, rtol=1e-4)
    assert torch.allclose(ours.times.round().long(), theirs.timesteps, atol=1)
    assert torch.allclose(LINEAR.lambda_at(ours.times), ours.lambdas[:-1])


def test_even_steps_run_from_end_to_end():
    assert even(Flow(), 4).times.tolist() == [1, 0.75, 0.5, 0.25]
    assert even(Flow(shift=3.0), 2).times.tolist() == [1, 0.75]
    assert even(Cosine(), 2, to_zero=False).lambdas.isfinite().all()
    assert even(Cosine(), 2).lambdas[-1] == math.inf


def test_a_part_of_a_ladder_keeps_its_numbers():
    whole = ladder(LINEAR, spaced(LINEAR, 10, "trailing"))
    part = whole.part(2, 9).part(1, 3)
    assert part.times.tolist() == [699, 599]
    assert torch.equal(part.lambdas, whole.lambdas[3:6])
    assert part.begun == 3
    with pytest.raises(ValueError, match="no part from 3 to 11"):
        whole.part(3, 11)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Betas(steps=1), "at least 2 steps"),
        (lambda: Betas(beta_first=0.5, beta_last=0.1), "Betas rise"),
        (lambda: Cosine(least=0.0), "least"),
        (lambda: Sigmoid(tau=0.0), "tau"),
        (lambda: EDM(sigma_min=0.0), "sigma_min"),
        (lambda: Flow(shift=0.0), "shift"),
        (lambda: ladder(LINEAR, [3, 5]), "fall"),
        (lambda: ladder(LINEAR, []), "at least one"),
        (lambda: spaced(LINEAR, 1001, "leading"), "Between 1 and 1000"),
        (lambda: consistency_times(LINEAR, 51), "51 of 50"),
        (lambda: karras(Flow(), 5), "finite noise"),
        (lambda: even(Flow(), 0), "at least one"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
