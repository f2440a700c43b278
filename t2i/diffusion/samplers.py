"""From noise to data: functions of a denoiser along a ladder.

    x_B = beginning(process, steps, keys_B, (4, 32, 32))
    x_B = ddim(process, denoise, x_B, steps)
    x_B = ancestral(process, denoise, x_B, steps, keys_B)

All take x (B, ...) at the noise of the ladder's first place and return it at its last. They keep nothing between calls.
Noise comes from a row's key and the step's number in the whole ladder, so a row is the same in any batch, and in any
cut of the ladder where a step stands for itself (all but DPM-Solver++). They call the denoiser once a step; `heun`
twice, but once where no noise is left.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from t2i.diffusion.ladder import Ladder
from t2i.diffusion.process import Denoised, Denoiser, Estimate, Posterior, Process, posterior, spread
from t2i.diffusion.schedules import Betas, alpha_sigma
from t2i.random import normals

Shift = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x_t (B, ...), t (B,)) -> the scaled gradient at x_t


def beginning(process: Process, steps: Ladder, keys_B: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Noise (B, *shape) to begin with: N(0, 1), or N(0, sigma^2) of an EDM schedule's first place."""
    _, sigma = alpha_sigma(process.schedule.path, steps.lambdas[0])
    return normals(keys_B, shape, "beginning") * (float(sigma) if process.schedule.path == "exploding" else 1.0)


def ancestral(
    process: Process,
    denoise: Denoiser,
    x: torch.Tensor,
    steps: Ladder,
    keys_B: torch.Tensor,
    variance: Literal["least", "largest"] = "least",
    shift: Shift | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """DDPM (arXiv 2006.11239, algorithm 2): each step draws from q(x_s | x_t, x_0) with the estimated x_0.

    The variance is beta tilde ("least") or beta ("largest"), or what the network says where it says it. With "least" it
    is `ddim` with eta 1. `shift` adds the variance times a gradient to the mean (arXiv 2105.05233, algorithm 1). The
    `temperature` multiplies what is drawn, but not what it begins with (MAR, arXiv 2406.11838, section 3.3).
    """
    for step, before, after in _places(steps):
        (_, share), estimate = _look(process, denoise, x, steps.times[step], before)
        exact = posterior(process.schedule, before, after)
        mean = float(exact.of_x0) * estimate.x0 + float(exact.of_x) * x
        if after in (before, torch.inf):  # nothing is left to draw
            x = mean
            continue
        deviation = _deviation(exact, share, variance)
        if shift is not None:
            mean = mean + deviation**2 * shift(x, _times(steps.times[step], x))
        x = mean + temperature * deviation * _noise(keys_B, x, "ancestral", steps, step)
    return x


def ddim(
    process: Process,
    denoise: Denoiser,
    x: torch.Tensor,
    steps: Ladder,
    keys_B: torch.Tensor | None = None,
    eta: float = 0.0,
) -> torch.Tensor:
    """DDIM (arXiv 2010.02502, eq. 12 and 16); eta 0 draws nothing, and is also Euler's method for EDM and for flows."""
    if eta and keys_B is None:
        raise ValueError(f"DDIM with eta={eta} draws noise, and needs a key for each row.")
    for step, before, after in _places(steps):
        _, estimate = _look(process, denoise, x, steps.times[step], before)
        alpha, sigma = _floats(process, after)
        fresh = eta * sigma * math.sqrt(-torch.expm1(2 * (before - after)))
        x = alpha * estimate.x0 + math.sqrt(max(sigma**2 - fresh**2, 0.0)) * estimate.epsilon
        if fresh and keys_B is not None:
            x = x + fresh * _noise(keys_B, x, "ancestral", steps, step)
    return x


def invert(process: Process, denoise: Denoiser, x: torch.Tensor, steps: Ladder) -> torch.Tensor:
    """DDIM backwards: from data, at the ladder's last place, to the noise that `ddim` (eta 0) draws them from.

    The network is told the time that a step leads to, as it will be on the way back (arXiv 2010.02502, section 4.3).
    """
    if process.prediction == "x0" and steps.lambdas[-1] == torch.inf:
        raise ValueError("A prediction of x0 says no noise where there is none: invert along a ladder to_zero=False.")
    for step, after, before in reversed(list(_places(steps))):
        _, estimate = _look(process, denoise, x, steps.times[step], before)
        alpha, sigma = _floats(process, after)
        x = alpha * estimate.x0 + sigma * estimate.epsilon
    return x


def dpm_solver_2m(process: Process, denoise: Denoiser, x: torch.Tensor, steps: Ladder) -> torch.Tensor:
    """DPM-Solver++ (2M) (arXiv 2211.01095, algorithm 2): second order from the estimate of the step before.

    The first step, and the last where no noise is left, are of first order.
    """
    previous: tuple[torch.Tensor, float] | None = None  # x0, and the size of the step from it
    for step, before, after in _places(steps):
        _, (x0, _) = _look(process, denoise, x, steps.times[step], before)
        size = float(after - before)
        if previous is None or after == torch.inf or not previous[1]:
            x = _exponential(process, x, x0, before, after)
        else:
            ahead = size / (2 * previous[1])  # 0 after a first place without signal
            x = _exponential(process, x, x0 + ahead * (x0 - previous[0]), before, after)
        previous = x0, size
    return x


def dpm_solver_2s(process: Process, denoise: Denoiser, x: torch.Tensor, steps: Ladder) -> torch.Tensor:
    """DPM-Solver++ (2S) (arXiv 2211.01095, algorithm 1): two places of the ladder make one step of second order.

    A single step that is left, and the last two where no noise is left, are of first order.
    """
    places = list(_places(steps))
    while places:
        step, before, middle = places.pop(0)
        _, (x0, _) = _look(process, denoise, x, steps.times[step], before)
        between = _exponential(process, x, x0, before, middle)
        if not places or places[0][2] == torch.inf or before in (middle, -torch.inf):
            x = between
            continue
        step, _, after = places.pop(0)
        _, (x0_middle, _) = _look(process, denoise, between, steps.times[step], middle)
        ahead = float((after - before) / (2 * (middle - before)))
        x = _exponential(process, x, x0 + ahead * (x0_middle - x0), before, after)
    return x


def heun(
    process: Process,
    denoise: Denoiser,
    x: torch.Tensor,
    steps: Ladder,
    keys_B: torch.Tensor | None = None,
    churn: float = 0.0,
    churn_noise: float = 1.0,
    churn_within: tuple[float, float] = (0.0, math.inf),
) -> torch.Tensor:
    """EDM's sampler (arXiv 2206.00364, algorithm 2): Heun's method of second order, with fresh noise where `churn` > 0.

    The ODE is dx = x_0 dalpha + epsilon dsigma. Of any schedule it is followed along alpha = 1 and sigma / alpha, as
    there; but of a flow, and of a ladder whose first place has no signal, along its own alpha and sigma. A step to no
    noise is Euler's. Before a step sigma / alpha rises by the share `churn`, where it lies within `churn_within`:
    min(S_churn / N, sqrt(2) - 1), S_noise and (S_tmin, S_tmax) there.
    """
    straight = process.schedule.path == "straight" or float(steps.lambdas[0]) == -math.inf
    if churn and (keys_B is None or straight):
        raise ValueError("Churn draws noise: it needs a key for each row, and a schedule along sigma / alpha.")

    def place(lambda_: torch.Tensor) -> tuple[float, float, float]:
        """What dx is in, and what x is divided by there."""
        alpha, sigma = _floats(process, lambda_)
        return (alpha, sigma, 1.0) if straight else (1.0, sigma / alpha, alpha)

    for step, before, after in _places(steps):
        t, (alpha, sigma, scale) = steps.times[step], place(before)
        if keys_B is not None and churn and churn_within[0] <= sigma <= churn_within[1]:
            t = process.schedule.time_at(before - math.log1p(churn))
            before = process.schedule.lambda_at(t)  # a schedule of a first time goes no further
            fresh = churn_noise * math.sqrt(max(place(before)[1] ** 2 - sigma**2, 0.0))
            x = place(before)[2] * (x / scale + fresh * _noise(keys_B, x, "churn", steps, step))
            alpha, sigma, scale = place(before)
        _, here = _look(process, denoise, x, t, before)
        alpha_after, sigma_after, scale_after = place(after)
        x = x / scale
        there = scale_after * (x + (alpha_after - alpha) * here.x0 + (sigma_after - sigma) * here.epsilon)
        if after == torch.inf:
            return there
        t = steps.times[step + 1] if step + 1 < len(steps.times) else process.schedule.time_at(after)
        _, ahead = _look(process, denoise, there, t, after)
        x0, epsilon = (here.x0 + ahead.x0) / 2, (here.epsilon + ahead.epsilon) / 2
        x = scale_after * (x + (alpha_after - alpha) * x0 + (sigma_after - sigma) * epsilon)
    return x


def consistency(
    process: Process, denoise: Denoiser, x: torch.Tensor, steps: Ladder, keys_B: torch.Tensor
) -> torch.Tensor:
    """Multistep sampling of a consistency model (arXiv 2303.01469, algorithm 1): its x_0, noised anew each time.

    `denoise` is the consistency function: of a network that LCM trained, `consistent(process, network)`.
    """
    for step, before, after in _places(steps):
        _, (x, _) = _look(process, denoise, x, steps.times[step], before)
        if after != torch.inf:
            alpha, sigma = _floats(process, after)
            x = alpha * x + sigma * _noise(keys_B, x, "consistency", steps, step)
    return x


def consistent(process: Process, denoise: Denoiser, time_scale: float = 10.0, data_deviation: float = 0.5) -> Denoiser:
    """A denoiser whose estimate of x_0 is c_skip x + c_out x_0, so x itself at time 0 (arXiv 2310.04378, eq. 9).

    c_skip = d^2 / (s^2 + d^2), c_out = s / sqrt(s^2 + d^2), of s = `time_scale` t and d = `data_deviation`.
    """
    if not isinstance(process.schedule, Betas):
        raise ValueError("These boundary conditions are those of a schedule of Betas.")

    def function(x: torch.Tensor, t: torch.Tensor) -> Denoised:
        prediction, share = denoise(x, t)
        lambda_ = process.schedule.lambda_at(t)
        scaled = (t.double() * time_scale).view(-1, *[1] * (x.dim() - 1))
        skip = data_deviation**2 / (scaled**2 + data_deviation**2)
        out = scaled / (scaled**2 + data_deviation**2).sqrt()
        x0 = process.estimate(prediction, x, lambda_).x0
        return process.moved(prediction, skip.to(x.dtype) * x + (out - 1).to(x.dtype) * x0, lambda_), share

    return function


def _places(steps: Ladder) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The number of each step, and lambda before and after it."""
    return zip(range(len(steps.times)), steps.lambdas[:-1], steps.lambdas[1:], strict=True)


def _look(
    process: Process, denoise: Denoiser, x: torch.Tensor, t: torch.Tensor, lambda_: torch.Tensor
) -> tuple[Denoised, Estimate]:
    """What the denoiser says when told t, of x that lies at lambda."""
    denoised = denoise(x, _times(t, x))
    return denoised, process.estimate(denoised[0], x, lambda_)


def _times(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """t (B,) on x's device; not in half precision, which does not hold whole numbers to 1000."""
    return torch.full((len(x),), float(t), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _floats(process: Process, lambda_: torch.Tensor) -> tuple[float, float]:
    alpha, sigma = alpha_sigma(process.schedule.path, lambda_)
    return float(alpha), float(sigma)


def _exponential(
    process: Process, x: torch.Tensor, x0: torch.Tensor, before: torch.Tensor, after: torch.Tensor
) -> torch.Tensor:
    """The exact step for a constant x_0 (DPM-Solver++, eq. 9)."""
    alpha, sigma = _floats(process, after)
    return sigma / _floats(process, before)[1] * x - alpha * float(torch.expm1(before - after)) * x0


def _deviation(exact: Posterior, share: torch.Tensor | None, variance: str) -> torch.Tensor:
    if share is not None:
        return torch.exp(spread(exact, share) / 2)
    return torch.exp((exact.log_least if variance == "least" else exact.log_largest) / 2)


def _noise(keys_B: torch.Tensor, x: torch.Tensor, salt: str, steps: Ladder, step: int) -> torch.Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return normals(keys_B, x.shape[1:], salt, steps.begun + step, dtype=dtype)
