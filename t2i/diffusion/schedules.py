"""Noise schedules: how much of the data is left at a time t, as lambda(t) = log(alpha / sigma), and back.

Noised data are x_t = alpha x_0 + sigma epsilon. A schedule is lambda(t), which falls with t (half of the log
signal-to-noise ratio; arXiv 2206.00927, eq. 2.3), and the path on which alpha and sigma lie:

* `preserving`: alpha^2 + sigma^2 = 1 (DDPM, arXiv 2006.11239);
* `exploding`:  alpha = 1 (EDM, arXiv 2206.00364);
* `straight`:   alpha + sigma = 1 (flow matching, arXiv 2210.02747, 2209.03003).

So t is what a network is told, and lambda is where x lies. Both are float64 tensors of any shape. A schedule has:

* `first`, `last`: the times of most and of least noise;
* `lambda_at(t)`, and its inverse `time_at(lambda)`, which stays between the two where the network knows no others;
* `drawn(uniforms)`: times for training from numbers in [0, 1).
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch

Path = Literal["preserving", "exploding", "straight"]
_LEAST = 2.0**-25  # of a uniform number that a normal one is made of


def alpha_sigma(path: Path, lambda_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signal and noise at lambda, which may be infinite: (0, 1) at -inf, (1, 0) at inf."""
    if path == "preserving":
        return torch.sigmoid(2 * lambda_).sqrt(), torch.sigmoid(-2 * lambda_).sqrt()
    if path == "exploding":
        return torch.ones_like(lambda_), torch.exp(-lambda_)
    return torch.sigmoid(lambda_), torch.sigmoid(-lambda_)


@dataclass(frozen=True, kw_only=True)
class Betas:
    """T steps t = 0 .. T - 1 of variance beta_t; between two of them lambda is a straight line in t.

    `linear`: DDPM. `scaled_linear`: linear in the square root (latent diffusion). `cosine`: arXiv 2102.09672, eq. 17,
    with beta capped at 0.999. `sigmoid`: arXiv 2203.02923. The last step may keep a little of the data;
    `zero_terminal_snr` shifts and scales sqrt(alpha bar) so that it keeps none (arXiv 2305.08891, algorithm 1).
    """

    shape: Literal["linear", "scaled_linear", "cosine", "sigmoid"] = "linear"
    steps: int = 1000
    beta_first: float = 1e-4  # both are idle in `cosine`
    beta_last: float = 0.02
    zero_terminal_snr: bool = False

    path: ClassVar[Path] = "preserving"

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"A diffusion has at least 2 steps, but steps={self.steps}.")
        if not 0 < self.beta_first <= self.beta_last < 1:
            raise ValueError(
                f"Betas rise within (0, 1), but beta_first={self.beta_first} and beta_last={self.beta_last}."
            )

    @property
    def first(self) -> float:
        """The time of most noise."""
        return self.steps - 1.0

    @property
    def last(self) -> float:
        """The time of least noise."""
        return 0.0

    def lambda_at(self, t: torch.Tensor) -> torch.Tensor:
        """lambda(t) for t within [0, T - 1]; times beyond count as the nearest within."""
        table_T = _table(self, t.device)
        t = t.double().clamp(0, self.first)
        low, share = t.long(), t.frac()
        below, above = table_T[low], table_T[(low + 1).clamp(max=self.steps - 1)]
        return torch.where(share == 0, below, below + share * (above - below))

    def time_at(self, lambda_: torch.Tensor) -> torch.Tensor:
        """t within [0, T - 1], with its fraction, of lambda."""
        table_T = _table(self, lambda_.device)
        low = (torch.searchsorted(-table_T, -lambda_.contiguous(), right=True) - 1).clamp(0, self.steps - 2)
        below, above = table_T[low], table_T[low + 1]
        share = ((below - lambda_) / (below - above)).clamp(0, 1)
        return low + torch.where(lambda_ <= above, torch.ones_like(share), share)

    def drawn(self, uniforms: torch.Tensor) -> torch.Tensor:
        """Whole t, all equally likely."""
        return (uniforms.double() * self.steps).floor()


@cache
def _table(schedule: Betas, device: torch.device) -> torch.Tensor:
    """lambda (T,) float64."""
    T, first, last = schedule.steps, schedule.beta_first, schedule.beta_last
    place = torch.linspace(0, 1, T, dtype=torch.float64, device="cpu")
    if schedule.shape == "linear":
        beta_T = first + (last - first) * place
    elif schedule.shape == "scaled_linear":
        beta_T = (first**0.5 + (last**0.5 - first**0.5) * place) ** 2
    elif schedule.shape == "cosine":
        angle = (torch.arange(T + 1, dtype=torch.float64, device="cpu") / T + 0.008) / 1.008 * math.pi / 2
        left = angle.cos() ** 2
        beta_T = (1 - left[1:] / left[:-1]).clamp(max=0.999)
    else:
        beta_T = first + (last - first) * torch.sigmoid(12 * place - 6)
    root_T = (1 - beta_T).cumprod(0).sqrt()
    if schedule.zero_terminal_snr:
        root_T = (root_T - root_T[-1]) * (root_T[0] / (root_T[0] - root_T[-1]))
    return (root_T.log() - (1 - root_T**2).log() / 2).to(device)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """alpha bar(t) = cos^2((t + s) / (1 + s) pi / 2) / cos^2(s / (1 + s) pi / 2) for t in [0, 1] (arXiv 2102.09672)."""

    s: float = 0.008
    least: float = 1e-9  # alpha bar stays so far from 0 and 1; Wuerstchen (arXiv 2306.00637): 1e-4

    path: ClassVar[Path] = "preserving"
    first: ClassVar[float] = 1.0
    last: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        _check_least(self.least)

    def lambda_at(self, t: torch.Tensor) -> torch.Tensor:
        """lambda(t) for t within [0, 1]."""
        left = (((t.double() + self.s) / (1 + self.s) * math.pi / 2).cos() / self._start()) ** 2
        return torch.logit(left.clamp(self.least, 1 - self.least)) / 2

    def time_at(self, lambda_: torch.Tensor) -> torch.Tensor:
        """t within [0, 1]."""
        angle = (torch.sigmoid(2 * lambda_).sqrt() * self._start()).acos()
        return (angle / (math.pi / 2) * (1 + self.s) - self.s).clamp(0, 1)

    def drawn(self, uniforms: torch.Tensor) -> torch.Tensor:
        """t, all of [0, 1) equally likely."""
        return uniforms.double()

    def _start(self) -> float:
        return math.cos(self.s / (1 + self.s) * math.pi / 2)


@dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """alpha bar(t) falls as a sigmoid over [start, end] / tau for t in [0, 1] (arXiv 2212.11972, algorithm 1)."""

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0
    least: float = 1e-9

    path: ClassVar[Path] = "preserving"
    first: ClassVar[float] = 1.0
    last: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        _check_least(self.least)
        if not (self.start < self.end and self.tau > 0):
            raise ValueError("A sigmoid schedule has start < end and tau > 0.")

    def lambda_at(self, t: torch.Tensor) -> torch.Tensor:
        """lambda(t) for t within [0, 1]."""
        high, low = self._ends()
        left = (high - torch.sigmoid((self.start + t.double() * (self.end - self.start)) / self.tau)) / (high - low)
        return torch.logit(left.clamp(self.least, 1 - self.least)) / 2

    def time_at(self, lambda_: torch.Tensor) -> torch.Tensor:
        """t within [0, 1]."""
        high, low = self._ends()
        place = self.tau * torch.logit(high - torch.sigmoid(2 * lambda_) * (high - low))
        return ((place - self.start) / (self.end - self.start)).clamp(0, 1)

    def drawn(self, uniforms: torch.Tensor) -> torch.Tensor:
        """t, all of [0, 1) equally likely."""
        return uniforms.double()

    def _ends(self) -> tuple[float, float]:
        return 1 / (1 + math.exp(-self.end / self.tau)), 1 / (1 + math.exp(-self.start / self.tau))


@dataclass(frozen=True, kw_only=True)
class EDM:
    """sigma of any size and alpha = 1; a network is told t = ln(sigma) / 4 (arXiv 2206.00364, table 1).

    Training draws ln(sigma) from N(mean, deviation^2); sampling begins at `sigma_max`. `data_deviation` is that of the
    data, which their preconditioning rests on: it is the prediction `v`, with c_skip, c_out and, up to sign, F.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    data_deviation: float = 0.5
    mean: float = -1.2
    deviation: float = 1.2

    path: ClassVar[Path] = "exploding"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max or self.data_deviation <= 0 or self.deviation <= 0:
            raise ValueError("EDM has 0 < sigma_min < sigma_max, and deviations above 0.")

    @property
    def first(self) -> float:
        """The time of most noise."""
        return math.log(self.sigma_max) / 4

    @property
    def last(self) -> float:
        """The time of least noise."""
        return math.log(self.sigma_min) / 4

    def lambda_at(self, t: torch.Tensor) -> torch.Tensor:
        """lambda(t) = -4 t."""
        return -4 * t.double()

    def time_at(self, lambda_: torch.Tensor) -> torch.Tensor:
        """t, not held within first and last."""
        return -lambda_ / 4

    def drawn(self, uniforms: torch.Tensor) -> torch.Tensor:
        """t of log-normal noise."""
        return (self.mean + self.deviation * _normal(uniforms)) / 4


@dataclass(frozen=True, kw_only=True)
class Flow:
    """sigma = t and alpha = 1 - t for t in [0, 1]: straight lines from noise to data.

    Training draws t uniformly, or, with a `deviation`, as the sigmoid of N(mean, deviation^2) (arXiv 2403.03206,
    eq. 19). `shift` moves times, drawn and in the ladder, towards noise: t' = s t / (1 + (s - 1) t) (their eq. 23).
    """

    shift: float = 1.0
    mean: float = 0.0
    deviation: float = 0.0

    path: ClassVar[Path] = "straight"
    first: ClassVar[float] = 1.0
    last: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if self.shift <= 0 or self.deviation < 0:
            raise ValueError("A flow has a shift above 0 and a deviation of at least 0.")

    def lambda_at(self, t: torch.Tensor) -> torch.Tensor:
        """lambda(t) = log((1 - t) / t)."""
        return torch.logit(1 - t.double())

    def time_at(self, lambda_: torch.Tensor) -> torch.Tensor:
        """t within [0, 1]."""
        return torch.sigmoid(-lambda_)

    def drawn(self, uniforms: torch.Tensor) -> torch.Tensor:
        """t, shifted."""
        t = torch.sigmoid(self.mean + self.deviation * _normal(uniforms)) if self.deviation else uniforms.double()
        return self.shifted(t)

    def shifted(self, t: torch.Tensor) -> torch.Tensor:
        """t' of t."""
        return self.shift * t / (1 + (self.shift - 1) * t)


Schedule = Betas | Cosine | Sigmoid | EDM | Flow


def _normal(uniforms: torch.Tensor) -> torch.Tensor:
    return torch.special.ndtri(uniforms.double().clamp(_LEAST, 1 - _LEAST))


def _check_least(least: float) -> None:
    if not 0 < least < 0.5:
        raise ValueError(f"`least` lies in (0, 0.5), but it is {least}.")
