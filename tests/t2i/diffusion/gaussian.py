"""Gaussian data, of which all is known: what an ideal network says, where the ODE leads, how the chain spreads."""

from dataclasses import dataclass

import torch

from t2i.diffusion.ladder import Ladder
from t2i.diffusion.process import Denoised, Denoiser, Process
from t2i.diffusion.schedules import alpha_sigma


@dataclass(frozen=True)
class Gaussian:
    """x_0 of N(mean, deviation^2), each value for itself."""

    mean: float | torch.Tensor = 0.3
    deviation: float | torch.Tensor = 0.5

    def spread(self, process: Process, lambda_: torch.Tensor) -> torch.Tensor:
        """The variance of x_t."""
        alpha, sigma = alpha_sigma(process.schedule.path, lambda_)
        return alpha**2 * self.deviation**2 + sigma**2

    def denoiser(self, process: Process) -> Denoiser:
        """The network of no error: it predicts the mean of its target given x_t."""

        def denoise(x: torch.Tensor, t: torch.Tensor) -> Denoised:
            lambda_ = process.schedule.lambda_at(t).view(-1, *[1] * (x.dim() - 1))
            alpha, sigma = alpha_sigma(process.schedule.path, lambda_)
            offset = (x - alpha * self.mean) / self.spread(process, lambda_)
            x0 = self.mean + alpha * self.deviation**2 * offset
            return process.target(x0, sigma * offset, lambda_.flatten()), None

        return denoise

    def led(self, process: Process, x: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Where the probability-flow ODE takes x (arXiv 2011.13456, eq. 13): it keeps the place within the spread."""
        alpha, _ = alpha_sigma(process.schedule.path, before)
        alpha_after, _ = alpha_sigma(process.schedule.path, after)
        ratio = (self.spread(process, after) / self.spread(process, before)).sqrt()
        return alpha_after * self.mean + ratio * (x - alpha * self.mean)

    def error(self, sampler, process: Process, steps: Ladder) -> float:
        """The largest error of a sampler at the ladder's end, over places of x within three deviations."""
        alpha, _ = alpha_sigma(process.schedule.path, steps.lambdas[0])
        places = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
        x = alpha * self.mean + places * self.spread(process, steps.lambdas[0]).sqrt()
        found = sampler(process, self.denoiser(process), x, steps)
        return float((found - self.led(process, x, steps.lambdas[0], steps.lambdas[-1])).abs().max())
