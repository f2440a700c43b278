"""A diffusion prior: a network, the process that it undoes, and the conditions that it is told.

Shapes: B rows of values (B, *shape) of a space without codes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import nn

from t2i.conditions.hearing import Conditions
from t2i.diffusion.guidance import at_once, classifier_free, held, thresholded
from t2i.diffusion.ladder import Ladder, consistency_times, even, karras, ladder, spaced
from t2i.diffusion.process import Denoised, Denoiser, Process
from t2i.diffusion.samplers import (
    ancestral,
    beginning,
    consistency,
    consistent,
    ddim,
    dpm_solver_2m,
    dpm_solver_2s,
    heun,
)
from t2i.diffusion.schedules import EDM, Betas
from t2i.diffusion.unet import UNetConfig
from t2i.pixels import scale
from t2i.protocol import Asked, Batch, ConditionConfig, Space, Start, Told, Turn, joined
from t2i.random import keys_of, normals, uniforms

_NO_CODES = "A diffusion draws continuous values, but these are {}."


@dataclass(frozen=True, kw_only=True)
class DiffusionSampling:
    """How values are drawn from a diffusion prior."""

    sampler: Literal["ddim", "ancestral", "dpm_solver_2m", "dpm_solver_2s", "heun", "consistency"] = "ddim"
    steps: int = 50
    solver_steps: int = 50  # of consistency: among whose times the distillation was
    eta: float = 0.0  # of ddim: 1 is DDPM's noise
    guidance: float = 1.0  # classifier-free guidance (arXiv 2207.12598): 1 is the plain conditional
    guided: tuple[str, ...] | None = None  # conditions that guidance moves away from; None: those that training dropped
    interval: tuple[float, float] | None = None  # of sigma / alpha, where alone there is guidance (arXiv 2404.07724)
    rescale: float = 0.0  # phi of arXiv 2305.08891
    percentile: float | None = None  # of dynamic thresholding (arXiv 2205.11487), for values that have a bound
    stops: float | None = None  # a time of the process: drawing ends there, and what is left is another's to do
    # How far, from 0 to 1, the pictures that conditions hear are noised, by a condition's name (arXiv 2205.11487, 2.4).
    noised: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Values are drawn in at least one step, but steps is {self.steps}.")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta is ddim's, but the sampler is {self.sampler}: choose ddim, or leave eta out.")
        if any(not 0 <= amount <= 1 for amount in self.noised.values()):
            raise ValueError(f"A picture is noised by an amount from 0 to 1, but noised is {self.noised}.")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """A network, and the process that it undoes."""

    sampling: ClassVar[type] = DiffusionSampling
    network: UNetConfig = field(default_factory=UNetConfig)
    process: Process = field(default_factory=Process)

    def build(self, space: Space, conditions: Sequence[ConditionConfig]) -> "DiffusionPrior":
        """The prior of a continuous space."""
        if space.codes:
            raise ValueError(_NO_CODES.format(space))
        told = Conditions(conditions, self.network.width, space, self.network.hears)
        outputs = 2 if self.process.learned_variance else 1
        times = 1.0 if isinstance(self.process.schedule, Betas) else 1000.0  # networks tell steps of a thousand apart
        return DiffusionPrior(self.network.build(space, told, outputs, times), self.process, space, told)


class Network(Protocol):
    """Says what it predicts of x. A module."""

    hears: frozenset[str]  # fields of Told that it knows of

    def __call__(self, x: torch.Tensor, t: torch.Tensor, told: Told) -> torch.Tensor:
        """x (B, *shape) and times (B,) to (B, *shape); with a learned variance, twice as many along axis 1."""
        ...


class Hearing(Protocol):
    """What tells a network more at each step: an adapter that was attached."""

    says: frozenset[str]  # fields of Told

    def hear(self, x: torch.Tensor, t: torch.Tensor, told: Told, batch: Batch) -> Told:
        """What it adds to what is told of x at time t, both as the network has them."""
        ...


class DiffusionPrior(nn.Module):
    """p(values | told), as the process says, undone step by step by a network."""

    def __init__(self, network: nn.Module, process: Process, space: Space, conditions: Conditions) -> None:
        super().__init__()
        if space.codes:
            raise ValueError(_NO_CODES.format(space))
        for name, condition in conditions.each.items():
            _check_heard(network, f"The condition '{name}'", condition)
        self.network, self.conditions = network, conditions
        self.process, self.space = process, space
        self._attached: list[Hearing] = []  # no parameters of this prior

    def attach(self, adapter: Hearing) -> None:
        """Have the network hear an adapter, too, beside what is told and after those that were attached before.

        ValueError where it says what the network does not hear.
        """
        _check_heard(self.network, f"The adapter {type(adapter).__name__}", adapter)
        self._attached.append(adapter)

    def turns(self) -> list[Turn]:
        """Its own, alone."""
        return [Turn("prior", self)]

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Rows, for each loss."""
        names = ("error", "bound") if self.process.learned_variance else ("error",)
        return dict.fromkeys(names, batch["weight"].sum())

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Sums over rows of the process's losses on `values` (B, *shape), noised by `noise_key` (B,).

        Values that are uint8 are pixels.
        """
        x0, epsilon, t = self.drawn(batch)
        x = self.process.noised(x0, epsilon, self.process.schedule.lambda_at(t))
        losses = self.process.losses(self.denoise(x, t, self.conditions(batch), batch), x0, epsilon, t)
        return {name: (loss_B * batch["weight"]).sum() for name, loss_B in losses.items()}

    def drawn(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x_0 and epsilon (B, *shape), and times (B,) of a training step."""
        values, keys_B = batch["values"], batch["noise_key"]
        x0 = scale(values) if values.dtype == torch.uint8 else values.float()
        t = self.process.schedule.drawn(uniforms(keys_B, (1,), "time", dtype=torch.float64)[:, 0])
        return x0, normals(keys_B, x0.shape[1:], "noise").to(x0.device), t

    def denoise(self, x: torch.Tensor, t: torch.Tensor, told: Told, batch: Batch) -> Denoised:
        """The network's prediction of x at times t, and its share of the variance where it learns that."""
        scale = self.process.input_scale(self.process.schedule.lambda_at(t)).to(x.dtype)
        x, t = x * scale.view(-1, *[1] * (x.dim() - 1)), t.to(torch.float32)
        for adapter in self._attached:
            told = joined([told, adapter.hear(x, t, told, batch)])
        said = self.network(x, t, told)
        said = said.to(torch.promote_types(said.dtype, torch.float32))  # 16 bits do not hold what is worked out of it
        if not self.process.learned_variance:
            return said, None
        prediction, share = said.chunk(2, dim=1)
        return prediction, share

    @torch.no_grad()
    def sample(
        self, asked: Asked, seeds: Sequence[int], sampling: DiffusionSampling, start: Start | None = None
    ) -> torch.Tensor:
        """Values (B, *shape), row b drawn from `seeds[b]` alone; with `sampling.stops`, at that time's noise.

        What a start keeps is without noise, also where the rest of its values is `noised`.
        """
        device = next(self.parameters()).device
        keys_B, process, steps = keys_of(seeds, device), self.process, self.ladder(sampling)
        denoise = self.denoiser(self._noised(asked, sampling.noised).to(device), sampling)
        values, keep = (None, None) if start is None else (start.values.to(device), start.keep)
        if values is not None and keep is not None:
            keep = keep.to(device)
            denoise = held(process, denoise, values, keep)
        if start is not None and start.at is not None:
            steps = steps.since(process.schedule, start.at)
        if sampling.stops is not None:
            steps = steps.until(process.schedule, sampling.stops)
        if start is None or values is None or start.at is None:
            x = beginning(process, steps, keys_B, self.space.shape)
        else:
            x = process.noised(values, normals(keys_B, self.space.shape, "start"), steps.lambdas[0])
            if start.noised:
                x = values if keep is None else torch.where(keep, x, values)
        x = self._along(sampling, denoise, x, steps, keys_B)
        if values is not None and keep is not None and sampling.stops is None:
            x = torch.where(keep, values.to(x), x)  # to the bit, not up to rounding
        return x

    def _noised(self, asked: Asked, amounts: Mapping[str, float]) -> Asked:
        """With what conditions are told of how far their pictures are noised, where nobody brought it."""
        hearing = dict(self.conditions.each.items())
        if wrong := [name for name in amounts if getattr(hearing.get(name), "amount", None) is None]:
            raise ValueError(
                f"The sampling noises the condition '{wrong[0]}', but this prior did not learn one that is noised."
            )
        told = {f"{name}_amount": torch.full((asked.rows,), amount) for name, amount in amounts.items()}
        return replace(asked, batch={**told, **asked.batch})

    def denoiser(self, asked: Asked, sampling: DiffusionSampling) -> Denoiser:
        """The network told what is asked, guided and held within the space's bound.

        ValueError where something is asked that would change nothing.
        """
        process, batch = self.process, asked.batch
        if asked.without and sampling.guidance == 1:
            raise ValueError("Guidance moves away from negative prompts, but it is 1: raise it, or leave them out.")
        if sampling.percentile is not None and self.space.bound is None:
            raise ValueError(f"A percentile is of values that have a bound, but those of {self.space} have none.")
        told = self.conditions.asked(asked)

        def alone(x: torch.Tensor, t: torch.Tensor) -> Denoised:
            return self.denoise(x, t, told, batch)

        denoise: Denoiser = alone
        if sampling.guidance != 1:
            both = self.conditions.pair(asked, sampling.guided)
            twice = {name: torch.cat([column, column]) for name, column in batch.items() if column.dim()}

            pair = at_once(lambda x, t: self.denoise(x, t, both, twice))
            interval = sampling.interval or (0.0, math.inf)
            denoise = classifier_free(
                process, pair, sampling.guidance, interval=interval, alone=alone, rescale=sampling.rescale
            )
        if self.space.bound is not None:
            denoise = thresholded(process, denoise, self.space.bound, sampling.percentile)
        return denoise

    def ladder(self, sampling: DiffusionSampling) -> Ladder:
        """The steps of a sampler: trailing ones of Betas, Karras' of EDM, even ones of others."""
        schedule = self.process.schedule
        if isinstance(schedule, Betas):
            if sampling.sampler == "consistency":
                return ladder(schedule, consistency_times(schedule, sampling.steps, sampling.solver_steps))
            return ladder(schedule, spaced(schedule, sampling.steps, "trailing"))
        return karras(schedule, sampling.steps) if isinstance(schedule, EDM) else even(schedule, sampling.steps)

    def _along(
        self, sampling: DiffusionSampling, denoise: Denoiser, x: torch.Tensor, steps: Ladder, keys_B: torch.Tensor
    ) -> torch.Tensor:
        process = self.process
        if sampling.sampler == "ddim":
            return ddim(process, denoise, x, steps, keys_B, sampling.eta)
        if sampling.sampler == "ancestral":
            return ancestral(process, denoise, x, steps, keys_B)
        if sampling.sampler == "consistency":
            return consistency(process, consistent(process, denoise), x, steps, keys_B)
        without_keys: dict[str, Any] = {"dpm_solver_2m": dpm_solver_2m, "dpm_solver_2s": dpm_solver_2s, "heun": heun}
        return without_keys[sampling.sampler](process, denoise, x, steps)


def _check_heard(network: nn.Module, who: str, speaker: Any) -> None:
    hears: frozenset[str] = network.hears  # type: ignore[assignment]
    if unheard := sorted(speaker.says - hears):
        raise ValueError(
            f"{who} says {', '.join(unheard)}, which this network does not hear. "
            f"It hears {', '.join(sorted(hears)) or 'nothing'}."
        )
