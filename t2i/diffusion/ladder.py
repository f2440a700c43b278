"""The ladder of a sampler: from which noise to which, in how many steps.

steps = ladder(schedule, spaced(schedule, 50, "trailing"))
steps = karras(EDM(), 18)
steps = even(Flow(shift=3.0), 28)
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from t2i.diffusion.schedules import Betas, Flow, Schedule


class Ladder(NamedTuple):
    """S steps; float64, on the CPU, where the samplers work out their coefficients."""

    times: torch.Tensor  # (S,): what the network is told in each step
    lambdas: torch.Tensor  # (S + 1,): where x lies before each step, and at the end; it rises
    begun: int = 0  # how many steps another part of the same ladder did before

    def part(self, start: int, stop: int) -> "Ladder":
        """Steps start .. stop - 1, which draw the noise that they would within the whole ladder."""
        if not 0 <= start < stop <= len(self.times):
            raise ValueError(f"A ladder of {len(self.times)} steps has no part from {start} to {stop}.")
        return Ladder(self.times[start:stop], self.lambdas[start : stop + 1], self.begun + start)

    def until(self, schedule: Schedule, time: float) -> "Ladder":
        """What leads to the noise of `time`: the place between steps that lies nearest moves there.

        A base stops so, and leaves the rest to a refiner, `since` the same time, of this ladder or another one.
        """
        t, lambda_ = _at(schedule, time)
        if not self.lambdas[0] < lambda_ <= self.lambdas[-1]:
            raise ValueError(f"Steps from time {float(self.times[0])} on do not lead to time {time}.")
        stop = max(1, self._nearest(schedule, t))
        return Ladder(self.times[:stop], torch.cat([self.lambdas[:stop], lambda_[None]]), self.begun)

    def since(self, schedule: Schedule, time: float) -> "Ladder":
        """What is left from the noise of `time` on: the place between steps that lies nearest moves there.

        Image-to-image begins so. Its steps have other numbers, and so other noise, than those `until` there.
        """
        t, lambda_ = _at(schedule, time)
        if not lambda_ < self.lambdas[-1]:
            raise ValueError(f"At time {time} these steps have nothing left to draw.")
        nearest = self._nearest(schedule, t)
        start, begun = min(nearest, len(self.times) - 1), max(1, nearest) if t < self.times[0] else 0
        times, lambdas = self.times[start + 1 :], self.lambdas[start + 1 :]
        return Ladder(torch.cat([t[None], times]), torch.cat([lambda_[None], lambdas]), self.begun + begun)

    def _nearest(self, schedule: Schedule, t: torch.Tensor) -> int:
        """Which of the S + 1 places lies nearest in time."""
        end = schedule.time_at(self.lambdas[-1:]).clamp(min=schedule.last)
        return int((torch.cat([self.times, end]) - t).abs().argmin())


def ladder(schedule: Schedule, times: Sequence[float] | torch.Tensor, to_zero: bool = True) -> Ladder:
    """One step at each of `times`, which fall; at the end no noise is left, or that of the schedule's last time.

    The latter, without `to_zero`, is what latent diffusion does (`set_alpha_to_one=False` in diffusers).
    """
    t = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if not len(t) or (t[1:] >= t[:-1]).any():
        raise ValueError(f"The times of a ladder fall, and there is at least one, but these are {t.tolist()}.")
    lambdas = schedule.lambda_at(torch.cat([t, t.new_tensor([schedule.last])]))
    if to_zero:
        lambdas[-1] = torch.inf
    return Ladder(t, lambdas)


def _at(schedule: Schedule, time: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A time and its lambda, float64 as those of a ladder."""
    if not schedule.last <= time <= schedule.first:
        raise ValueError(f"Times of this schedule lie within [{schedule.last}, {schedule.first}], but not {time}.")
    t = torch.tensor(time, dtype=torch.float64, device="cpu")
    return t, schedule.lambda_at(t)


def spaced(
    schedule: Betas, steps: int, spacing: Literal["leading", "linspace", "trailing"], offset: int = 0
) -> list[int]:
    """Whole times, falling (arXiv 2305.08891, table 2, as diffusers has them): of 10 steps of 1000,

    leading 900 .. 100, 0 (plus `offset`: Stable Diffusion has 1); linspace 999, 888 .. 0; trailing 999, 899 .. 99.
    """
    T = schedule.steps
    if not 1 <= steps <= T:
        raise ValueError(f"Between 1 and {T} steps can be taken, not {steps}.")
    if spacing == "leading":
        return [index * (T // steps) + offset for index in reversed(range(steps))]
    if spacing == "linspace":
        return torch.linspace(T - 1, 0, steps, dtype=torch.float64).round().long().tolist()
    return [round(T - index * (T / steps)) - 1 for index in range(steps)]


def respaced(schedule: Betas, sections: str) -> list[int]:
    """Whole times, falling, as ADM's strings say them (guided-diffusion, respace.py).

    "250": so many over all of T, both ends among them; "10,10,5": so many in each equal part, the first of least noise;
    "ddim50": with the one stride that gives so many.
    """
    T = schedule.steps
    if sections.startswith("ddim"):
        wanted = int(sections.removeprefix("ddim"))
        fitting = [stride for stride in range(1, T) if len(range(0, T, stride)) == wanted]
        if not fitting:
            raise ValueError(f"No whole stride gives {wanted} steps of {T}.")
        return list(range(0, T, fitting[0]))[::-1]
    counts = [int(count) for count in sections.split(",")]
    times: list[int] = []
    start = 0
    for index, count in enumerate(counts):
        size = T // len(counts) + (index < T % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"A section of {size} steps cannot be taken in {count}.")
        stride = 1.0 if count == 1 else (size - 1) / (count - 1)
        times += [start + round(stride * step) for step in range(count)]
        start += size
    return times[::-1]


def consistency_times(schedule: Betas, steps: int, solver_steps: int = 50) -> list[int]:
    """Whole times, falling, of LCM (arXiv 2310.04378): even in index among those that the distillation knew."""
    if not 1 <= steps <= solver_steps <= schedule.steps:
        raise ValueError(f"{steps} of {solver_steps} of {schedule.steps} steps cannot be taken.")
    known = [(index + 1) * (schedule.steps // solver_steps) - 1 for index in reversed(range(solver_steps))]
    return [known[index * solver_steps // steps] for index in range(steps)]


def karras(
    schedule: Schedule,
    steps: int,
    rho: float = 7.0,
    sigma_max: float | None = None,
    sigma_min: float | None = None,
    to_zero: bool = True,
) -> Ladder:
    """Even steps in (sigma / alpha)^(1 / rho) (arXiv 2206.00364, eq. 5), by default between the schedule's ends.

    Without `to_zero` the last of the `steps` + 1 places is `sigma_min`; with it, `steps` places, then no noise.
    """
    ends = torch.exp(-schedule.lambda_at(torch.tensor([schedule.first, schedule.last], dtype=torch.float64)))
    high, low = sigma_max or float(ends[0]), sigma_min or float(ends[1])
    if not (0 < low < high < float("inf") and steps >= 1):
        raise ValueError(
            f"Karras' steps lie between finite noise of sigma {low} and {high}, and there is at least one."
        )
    ramp = torch.linspace(0, 1, steps if to_zero else steps + 1, dtype=torch.float64)
    sigma = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    end = torch.full((1 if to_zero else 0,), torch.inf, dtype=torch.float64)
    lambdas = torch.cat([-sigma.log(), end])
    return Ladder(schedule.time_at(lambdas[:steps]), lambdas)


def even(schedule: Schedule, steps: int, to_zero: bool = True) -> Ladder:
    """Even steps in t between the schedule's ends, a flow's shifted; with `to_zero` no noise is left."""
    if steps < 1:
        raise ValueError("A ladder has at least one step.")
    t = torch.linspace(schedule.first, schedule.last, steps + 1, dtype=torch.float64)
    lambdas = schedule.lambda_at(t := schedule.shifted(t) if isinstance(schedule, Flow) else t)
    if to_zero:
        lambdas[-1] = torch.inf
    return Ladder(t[:-1], lambdas)
