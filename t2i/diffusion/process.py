"""What a diffusion learns: the process from data to noise, what its network predicts, and how errors are weighed.

Shapes: B rows of values of any shape. lambda is log(alpha / sigma), a float64 tensor (B,) or a single one for all
rows; `process.schedule.lambda_at(t)` gives it. All is worked out in float64 and applied in the values' own type.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from t2i.diffusion.schedules import EDM, Betas, Flow, Schedule, alpha_sigma

# What a network says of x_t: its prediction, and, if it learns the variance, its v of arXiv 2102.09672, eq. 15, as a
# number in [-1, 1] for each value: from the least log variance of a step to the largest. How far these lie apart
# depends on the step, and so on the sampler's ladder, which a network does not know.
Denoised = tuple[torch.Tensor, torch.Tensor | None]
Denoiser = Callable[[torch.Tensor, torch.Tensor], Denoised]  # (x_t (B, ...), t (B,)) -> both of x's shape


class Estimate(NamedTuple):
    """The two ends of x = alpha x0 + sigma epsilon."""

    x0: torch.Tensor
    epsilon: torch.Tensor


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) = N(of_x0 x_0 + of_x x_t, exp(log_least)); float64, of lambda's shape."""

    of_x0: torch.Tensor
    of_x: torch.Tensor
    log_least: torch.Tensor  # beta tilde: right where x_0 is known
    log_largest: torch.Tensor  # beta: right where x_0 is N(0, 1)


@dataclass(frozen=True, kw_only=True)
class Process:
    """Every choice of a diffusion but its network; it holds no tensor.

    `prediction`, with x_t = alpha x_0 + sigma epsilon and d the data's deviation that an EDM schedule names (else 1):

    * `epsilon`, `x0`;
    * `v`: (alpha d epsilon - sigma x_0 / d) / sqrt(alpha^2 d^2 + sigma^2) (arXiv 2202.00512; -F of EDM's eq. 7);
    * `velocity`: epsilon - x_0 (flow matching; the network's answer points from data to noise).

    `weighting`, of the squared error of x_0, from which that of the prediction follows:

    * `simple`: the prediction's own squared error, weight 1 (DDPM; and EDM's loss, for `v` on an EDM schedule);
    * `snr`: SNR = alpha^2 / sigma^2, which is weight 1 of epsilon;
    * `min_snr`: min(SNR, gamma) (arXiv 2303.09556);
    * `p2`: SNR / (1 + SNR)^gamma (arXiv 2204.00227, with k = 1 and gamma = 1 in the paper);
    * `vlb`: the variational bound in nats a step (arXiv 2107.00630, eq. 13; where t is continuous, eq. 17).
    """

    schedule: Schedule = field(default_factory=Betas)
    prediction: Literal["epsilon", "x0", "v", "velocity"] = "epsilon"
    weighting: Literal["simple", "snr", "min_snr", "p2", "vlb"] = "simple"
    gamma: float | None = None  # None: 5 for min_snr, 1 for p2
    learned_variance: bool = False

    def __post_init__(self) -> None:
        silent = isinstance(self.schedule, Betas) and self.schedule.zero_terminal_snr
        if self.prediction == "epsilon" and (silent or isinstance(self.schedule, Flow)):
            raise ValueError(
                "Where nothing of the data is left, noise says nothing of them: with zero terminal SNR or a flow, "
                "predict v, velocity or x0, not epsilon."
            )
        if self.learned_variance and not isinstance(self.schedule, Betas):
            raise ValueError("A variance is learned for steps: learned_variance needs a schedule of Betas.")
        if self.gamma is not None and (self.gamma <= 0 or self.weighting not in ("min_snr", "p2")):
            raise ValueError("gamma is above 0, and belongs to min_snr and p2.")

    def noised(self, x0: torch.Tensor, epsilon: torch.Tensor, lambda_: torch.Tensor) -> torch.Tensor:
        """x_t = alpha x_0 + sigma epsilon."""
        alpha, sigma = alpha_sigma(self.schedule.path, lambda_)
        return _by(alpha, x0) * x0 + _by(sigma, x0) * epsilon

    def target(self, x0: torch.Tensor, epsilon: torch.Tensor, lambda_: torch.Tensor) -> torch.Tensor:
        """What the network is to predict."""
        of_epsilon, of_x0 = self._parts(*alpha_sigma(self.schedule.path, lambda_))
        return _by(of_epsilon, x0) * epsilon + _by(of_x0, x0) * x0

    def estimate(self, prediction: torch.Tensor, x: torch.Tensor, lambda_: torch.Tensor) -> Estimate:
        """x_0 and epsilon that agree with the prediction and with x."""
        alpha, sigma = alpha_sigma(self.schedule.path, lambda_)
        of_epsilon, of_x0 = self._parts(alpha, sigma)
        whole = alpha * of_epsilon - sigma * of_x0
        x0 = _by(of_epsilon / whole, x) * x - _by(sigma / whole, x) * prediction
        return Estimate(x0, _by(alpha / whole, x) * prediction - _by(of_x0 / whole, x) * x)

    def moved(self, prediction: torch.Tensor, by: torch.Tensor, lambda_: torch.Tensor) -> torch.Tensor:
        """The prediction whose estimate of x_0, at the same x, is larger `by` so much."""
        alpha, sigma = alpha_sigma(self.schedule.path, lambda_)
        of_epsilon, of_x0 = self._parts(alpha, sigma)
        return prediction + _by(of_x0 - of_epsilon * alpha / sigma, by) * by

    def input_scale(self, lambda_: torch.Tensor) -> torch.Tensor:
        """What x is multiplied by where it enters a network, for unit variance: EDM's c_in; 1 elsewhere."""
        if not isinstance(self.schedule, EDM):
            return torch.ones_like(lambda_)
        return (self.schedule.data_deviation**2 + torch.exp(-2 * lambda_)).rsqrt()

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """The weight (B,) float64 of the prediction's squared error at times (B,)."""
        lambda_ = self.schedule.lambda_at(t)
        if self.weighting == "simple":
            return torch.ones_like(lambda_)
        alpha, sigma = alpha_sigma(self.schedule.path, lambda_)
        of_epsilon, of_x0 = self._parts(alpha, sigma)
        of_error = (sigma / (alpha * of_epsilon - sigma * of_x0)) ** 2  # squared errors of x0 in one of the prediction
        snr = torch.exp(2 * lambda_)
        if self.weighting == "snr":
            return snr * of_error
        if self.weighting == "min_snr":
            return snr.clamp(max=self.gamma or 5.0) * of_error
        if self.weighting == "p2":
            return snr / (1 + snr) ** (self.gamma or 1.0) * of_error
        if isinstance(self.schedule, Betas):  # the first step has no bound of this kind, and takes the second's weight
            after = self.schedule.lambda_at(t.double().clamp(min=1) - 1)
            at = torch.exp(2 * self.schedule.lambda_at(t.double().clamp(min=1)))
            return (torch.exp(2 * after) - at) / 2 * of_error
        slope = torch.func.jvp(self.schedule.lambda_at, (t.double(),), (torch.ones_like(t.double()),))[1]
        return -slope * snr * of_error

    def losses(
        self, denoised: Denoised, x0: torch.Tensor, epsilon: torch.Tensor, t: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`error` (B,): the weighted squared error of what a denoiser said of `noised`, a mean over a row's values.

        With a learned variance also `bound` (B,): 0.001 T times the bound's term, in bits a dimension, which moves the
        variance alone (IDDPM's hybrid loss, arXiv 2102.09672, eq. 16). The loss is their sum.
        """
        prediction, share = denoised
        error = (prediction - self.target(x0, epsilon, self.schedule.lambda_at(t))).square().flatten(1).mean(1)
        losses = {"error": self.weight(t).to(error.dtype) * error}
        if self.learned_variance:
            if share is None:
                raise ValueError("The process learns its variance, but the network says nothing of it.")
            x = self.noised(x0, epsilon, self.schedule.lambda_at(t))
            losses["bound"] = self.bound((prediction.detach(), share), x0, x, t) * (self._steps() / 1000)
        return losses

    def bound(self, denoised: Denoised, x0: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The variational bound's term (B,) of whole times t (B,), in bits a dimension (DDPM, eq. 5; IDDPM, eq. 4-7).

        At t = 0 it is the negative log likelihood of data that are 8-bit pixels scaled to [-1, 1].
        """
        prediction, share = denoised
        assert share is not None
        prediction, share, x0, x = (_precise(each) for each in (prediction, share, x0, x))
        before = self.schedule.lambda_at(t)
        after = self.schedule.lambda_at(t.double() - 1).where(t > 0, torch.inf)
        exact = posterior(self.schedule, before, after)
        # At t = 0 the least variance is none; that of t = 1 stands in (IDDPM, section 3.1).
        least = posterior(self.schedule, *(self.schedule.lambda_at(t.new_tensor(each)) for each in (1, 0))).log_least
        exact = exact._replace(log_least=exact.log_least.where(t > 0, least))
        log_variance = spread(exact, share)
        guess = self.estimate(prediction, x, before).x0
        mean, true = (_by(exact.of_x0, x) * each + _by(exact.of_x, x) * x for each in (guess, x0))
        log_least = _by(exact.log_least, x)
        apart = (true - mean).square() * torch.exp(-log_variance)
        kl = (log_variance - log_least + torch.exp(log_least - log_variance) + apart - 1) / 2
        nats = torch.where(t > 0, kl.flatten(1).mean(1), _pixel_nll(x0, mean, log_variance).flatten(1).mean(1))
        return nats / math.log(2)

    def _steps(self) -> int:
        if not isinstance(self.schedule, Betas):
            raise ValueError("Only a schedule of Betas has steps to bound.")
        return self.schedule.steps

    def _parts(self, alpha: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a and b of prediction = a epsilon + b x_0."""
        one, none = torch.ones_like(alpha), torch.zeros_like(alpha)
        if self.prediction == "epsilon":
            return one, none
        if self.prediction == "x0":
            return none, one
        if self.prediction == "velocity":
            return one, -one
        d = self.schedule.data_deviation if isinstance(self.schedule, EDM) else 1.0
        whole = (alpha**2 * d**2 + sigma**2).sqrt()
        return alpha * d / whole, -sigma / (d * whole)


def posterior(schedule: Schedule, before: torch.Tensor, after: torch.Tensor) -> Posterior:
    """From x_t at lambda `before` to x_s at the larger lambda `after` (DDPM, eq. 6-7; arXiv 2107.00630, eq. 30-33)."""
    alpha_t, sigma_t = alpha_sigma(schedule.path, before)
    alpha_s, sigma_s = alpha_sigma(schedule.path, after)
    fresh = -torch.expm1(2 * (before - after))  # the share of x_t's noise that came between s and t
    log_largest = (fresh * sigma_t**2).log()
    log_least = log_largest + 2 * (sigma_s.log() - sigma_t.log())
    return Posterior(alpha_s * fresh, alpha_t / alpha_s * (sigma_s / sigma_t) ** 2, log_least, log_largest)


def spread(posterior: Posterior, share: torch.Tensor) -> torch.Tensor:
    """The learned log variance of `share` in [-1, 1]: between the least and the largest (IDDPM, eq. 15)."""
    share = _precise(share)
    least, largest = _by(posterior.log_least, share), _by(posterior.log_largest, share)
    return least + (share + 1) / 2 * (largest - least)


def _pixel_nll(x0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """-log of the probability of x0's bin, 2 / 255 wide, the outermost without an end (DDPM, eq. 13)."""
    scale = torch.exp(-log_variance / 2)
    above = torch.special.ndtr((x0 - mean + 1 / 255) * scale).where(x0 < 0.999, 1.0)
    below = torch.special.ndtr((x0 - mean - 1 / 255) * scale).where(x0 > -0.999, 0.0)
    return -(above - below).clamp(min=1e-12).log()


def _precise(x: torch.Tensor) -> torch.Tensor:
    """In 32 bits at least: 16 do not tell the log variances of a step apart."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by(coefficient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A coefficient (B,) or () that multiplies x (B, ...), in x's type; a single one may stay on the CPU."""
    if not coefficient.dim():
        return coefficient.to(x.dtype)
    return coefficient.to(x.device, x.dtype).view(-1, *[1] * (x.dim() - 1))
