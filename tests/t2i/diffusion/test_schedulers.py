"""Samplers against the schedulers of diffusers, on the same network, from the same noise."""

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_lcm

from t2i.diffusion.guidance import thresholded
from t2i.diffusion.ladder import consistency_times, even, karras, ladder, respaced, spaced
from t2i.diffusion.process import Process
from t2i.diffusion.samplers import (
    ancestral,
    consistency,
    consistent,
    ddim,
    dpm_solver_2m,
    dpm_solver_2s,
    heun,
    invert,
)
from t2i.diffusion.schedules import EDM, Betas, Flow, alpha_sigma
from t2i.random import keys_of, normals

DOUBLE = torch.float64
KEYS = keys_of(range(3))
SHAPE = (2, 4, 4)
X = normals(KEYS, SHAPE, "x", dtype=DOUBLE)
MIX = normals(keys_of([9]), (32, 32), "mix", dtype=DOUBLE)[0] / 32**0.5
TYPES = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
STABLE = Betas(shape="scaled_linear", beta_first=0.00085, beta_last=0.012)
STABLE_THEIRS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def network(x, t):
    """Any function of x and t will do; this one is neither linear nor small."""
    phase = (t.double() / 150).view(-1, 1)
    return torch.tanh(x.flatten(1) @ MIX + torch.sin(phase)).view_as(x)


def denoise(x, t):
    return network(x, t), None


def run(scheduler, x=X, learned=False, **options):
    """A scheduler's whole loop; its tables, which are float32, are made as exact as ours."""
    exact(scheduler)
    for t in scheduler.timesteps:
        heard = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        said = network(heard, t.expand(len(x)))
        if learned:
            said = torch.cat([said, share(heard)], dim=1)
        x = scheduler.step(said, t, x, **options).prev_sample
    return x


def share(x):
    return torch.sin(3 * x)


def exact(scheduler):
    """float64 in place of float32 where a scheduler keeps its noise; the values are not changed beyond that."""
    if hasattr(scheduler, "alphas_cumprod"):
        betas = scheduler.betas.double()
        scheduler.alphas_cumprod = (1 - betas).cumprod(0)
        scheduler.one = torch.tensor(1.0, dtype=DOUBLE)
        for name in ("final_alpha_cumprod", "initial_alpha_cumprod"):
            if hasattr(scheduler, name):
                setattr(
                    scheduler, name, scheduler.one if getattr(scheduler, name) == 1 else scheduler.alphas_cumprod[0]
                )
    return scheduler


@pytest.fixture
def same_noise(monkeypatch):
    """What a scheduler draws is what our sampler draws in the same step."""

    def use(salt):
        drawn = iter(range(10_000))

        def randn_tensor(shape, **_):
            return normals(KEYS, shape[1:], salt, next(drawn), dtype=DOUBLE)

        for module in (scheduling_ddpm, scheduling_ddim, scheduling_lcm):
            monkeypatch.setattr(module, "randn_tensor", randn_tensor)

    return use


def close(ours, theirs, atol=1e-5):
    assert theirs.abs().max() > 0.1
    assert torch.allclose(ours, theirs, atol=atol, rtol=1e-5), float((ours - theirs).abs().max())


@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("variance", ["least", "largest", "learned"])
def test_ancestral_is_ddpm(prediction, variance, same_noise):
    same_noise("ancestral")
    kind = {"least": "fixed_small", "largest": "fixed_large", "learned": "learned_range"}[variance]
    theirs = DDPMScheduler(variance_type=kind, prediction_type=TYPES[prediction], clip_sample=False)
    theirs.set_timesteps(20)
    process = Process(prediction=prediction, learned_variance=variance == "learned")
    steps = ladder(Betas(), spaced(Betas(), 20, "leading"))
    if variance == "learned":
        ours = ancestral(process, lambda x, t: (network(x, t), share(x)), X, steps, KEYS)
    else:
        ours = ancestral(process, denoise, X, steps, KEYS, variance=variance)
    close(ours, run(theirs, learned=variance == "learned"))


def test_ancestral_of_adms_steps(same_noise):
    same_noise("ancestral")
    theirs = DDPMScheduler(clip_sample=True, beta_schedule="squaredcos_cap_v2")
    times = respaced(Betas(shape="cosine"), "10,5")
    theirs.set_timesteps(timesteps=times)
    process = Process(schedule=Betas(shape="cosine"))
    ours = ancestral(process, thresholded(process, denoise), X, ladder(process.schedule, times), KEYS)
    close(ours, run(theirs))


@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim(prediction, eta, same_noise):
    same_noise("ancestral")
    process = Process(schedule=STABLE, prediction=prediction)
    for spacing, offset, to_zero in (("leading", 1, False), ("trailing", 0, True)):
        theirs = DDIMScheduler(
            **STABLE_THEIRS, clip_sample=False, set_alpha_to_one=to_zero, steps_offset=offset,
            timestep_spacing=spacing, prediction_type=TYPES[prediction],
        )  # fmt: skip
        theirs.set_timesteps(10)
        steps = ladder(STABLE, spaced(STABLE, 10, spacing, offset), to_zero=to_zero)
        same_noise("ancestral")
        close(ddim(process, denoise, X, steps, KEYS, eta=eta), run(theirs, eta=eta))


def test_ddim_of_clipped_pixels_and_of_zero_terminal_snr():
    theirs = DDIMScheduler(clip_sample=True)
    theirs.set_timesteps(10)
    steps = ladder(Betas(), spaced(Betas(), 10, "leading"))
    close(ddim(Process(), thresholded(Process(), denoise), X, steps), run(theirs, use_clipped_model_output=True))
    theirs = DDIMScheduler(
        **STABLE_THEIRS, clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing",
        prediction_type="v_prediction",
    )  # fmt: skip
    theirs.set_timesteps(10)
    theirs.betas = theirs.betas.double()
    theirs.betas[-1] = 1
    schedule = Betas(shape="scaled_linear", beta_first=0.00085, beta_last=0.012, zero_terminal_snr=True)
    steps = ladder(schedule, spaced(schedule, 10, "trailing"))
    close(ddim(Process(schedule=schedule, prediction="v"), denoise, X, steps), run(theirs))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_inversion(prediction):
    theirs = DDIMInverseScheduler(clip_sample=False, prediction_type=TYPES[prediction])
    theirs.set_timesteps(10)
    steps = ladder(Betas(), spaced(Betas(), 10, "leading"))
    close(invert(Process(prediction=prediction), denoise, X, steps), run(theirs))


@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("count", [5, 10])
@pytest.mark.parametrize("to_zero", [True, False])
def test_dpm_solver_of_several_steps(prediction, count, to_zero):
    theirs = DPMSolverMultistepScheduler(
        **STABLE_THEIRS, prediction_type=TYPES[prediction], final_sigmas_type="zero" if to_zero else "sigma_min",
        lower_order_final=False,
    )  # fmt: skip
    theirs.set_timesteps(count)
    steps = ladder(STABLE, theirs.timesteps, to_zero)
    process = Process(schedule=STABLE, prediction=prediction)
    close(dpm_solver_2m(process, denoise, X, steps), run(theirs))


@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("count", [5, 10])
def test_dpm_solver_of_single_steps(prediction, count):
    theirs = DPMSolverSinglestepScheduler(**STABLE_THEIRS, prediction_type=TYPES[prediction], lower_order_final=True)
    theirs.set_timesteps(count)
    steps = ladder(STABLE, theirs.timesteps)
    process = Process(schedule=STABLE, prediction=prediction)
    close(dpm_solver_2s(process, denoise, X, steps), run(theirs))


@pytest.mark.parametrize("prediction", TYPES)
def test_heun(prediction):
    theirs = HeunDiscreteScheduler(**STABLE_THEIRS, prediction_type=TYPES[prediction], timestep_spacing="linspace")
    theirs.set_timesteps(timesteps=(times := spaced(STABLE, 10, "linspace")))
    steps = ladder(STABLE, times)
    alpha, _ = alpha_sigma("preserving", steps.lambdas[0])
    sigmas = torch.exp(-steps.lambdas)
    sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    assert torch.allclose(theirs.sigmas.double(), sigmas, rtol=1e-4)  # float32 rounds 1 - alpha bar
    theirs.sigmas = sigmas
    process = Process(schedule=STABLE, prediction=prediction)
    close(heun(process, denoise, X, steps), run(theirs, x=X / alpha))


def edm(x, t):
    return network(x * EDM_V.input_scale(EDM_V.schedule.lambda_at(t))[:, None, None, None], t), None


EDM_V = Process(schedule=EDM(), prediction="v")


def test_euler_of_edm():
    theirs = EDMEulerScheduler(sigma_data=0.5, prediction_type="v_prediction")
    theirs.set_timesteps(12)
    close(ddim(EDM_V, edm, X * 80, karras(EDM(), 12)), run(theirs, x=X * 80))


def test_churn_is_algorithm_2_of_edm():
    """Written out; diffusers' own churn tells the network of the noise before it, and so is no oracle."""
    steps, churn = karras(EDM(), 9), 0.25
    sigma = [float(each) for each in torch.exp(-steps.lambdas)]

    def d(x, s):
        at = torch.full((3,), s, dtype=DOUBLE)
        return (x - EDM_V.estimate(edm(x, at.log() / 4)[0], x, -at.log()).x0) / s

    x = X * 80
    for i in range(9):
        gamma = churn if 0.01 <= sigma[i] <= 50 else 0.0
        raised = sigma[i] * (1 + gamma)
        noise = 1.007 * normals(KEYS, SHAPE, "churn", i, dtype=DOUBLE)
        x = x + (raised**2 - sigma[i] ** 2) ** 0.5 * noise
        slope = d(x, raised)
        there = x + (sigma[i + 1] - raised) * slope
        if sigma[i + 1]:
            there = x + (sigma[i + 1] - raised) * (slope + d(there, sigma[i + 1])) / 2
        x = there
    ours = heun(EDM_V, edm, X * 80, steps, KEYS, churn=churn, churn_noise=1.007, churn_within=(0.01, 50.0))
    close(ours, x, atol=1e-9)


def test_dpm_solver_of_edm():
    theirs = EDMDPMSolverMultistepScheduler(sigma_data=0.5, prediction_type="v_prediction")
    theirs.set_timesteps(12)
    steps = karras(EDM(), 12)
    assert torch.allclose(theirs.sigmas.double(), torch.exp(-steps.lambdas), rtol=1e-6)
    theirs.sigmas = torch.exp(-steps.lambdas)
    close(dpm_solver_2m(EDM_V, edm, X * 80, steps), run(theirs, x=X * 80))


@pytest.mark.parametrize("count", [1, 4])
def test_consistency(count, same_noise):
    same_noise("consistency")
    theirs = LCMScheduler(**STABLE_THEIRS, clip_sample=False)
    theirs.set_timesteps(count)
    process = Process(schedule=STABLE)
    steps = ladder(STABLE, consistency_times(STABLE, count))
    assert steps.times.tolist() == theirs.timesteps.tolist()
    close(consistency(process, consistent(process, denoise), X, steps, KEYS), run(theirs))


@pytest.mark.parametrize(("theirs", "ours"), [
    (FlowMatchEulerDiscreteScheduler, ddim), (FlowMatchHeunDiscreteScheduler, heun)
])  # fmt: skip
def test_flows(theirs, ours):
    scheduler = theirs(shift=3.0)
    scheduler.set_timesteps(8)
    scheduler.sigmas = scheduler.sigmas.double()
    t = scheduler.sigmas.unique().flip(0)[:-1]
    process = Process(schedule=Flow(shift=3.0), prediction="velocity")
    steps = ladder(process.schedule, t)
    close(ours(process, lambda x, t: (network(x, t * 1000), None), X, steps), run(scheduler))
    if theirs is FlowMatchEulerDiscreteScheduler:
        scheduler.set_timesteps(sigmas=[1 - index / 8 for index in range(8)])
        assert torch.allclose(scheduler.sigmas[:-1].double(), even(process.schedule, 8).times, atol=1e-6)
