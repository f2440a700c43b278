"""Consistency distillation in the space of a prior (LCM, arXiv 2310.04378): a student that draws in a few steps."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from t2i.diffusion.prior import DiffusionPrior, DiffusionSampling
from t2i.diffusion.samplers import consistent
from t2i.diffusion.schedules import Betas
from t2i.nn.denoising_mlp import time_waves
from t2i.nn.weights import begins, constant
from t2i.protocol import Asked, Batch, Start, Told, Turn
from t2i.random import uniforms

SCALE = "guidance_scale"  # the column that says how far the teacher is guided


class GuidanceScale(nn.Module):
    """What tells a network how far it is guided, beside the time; it begins at nothing (LCM, eq. 13)."""

    says = frozenset({"vector"})

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tell = begins(nn.Linear(256, width, bias=False), weight=constant(0.0))

    def hear(self, x: torch.Tensor, t: torch.Tensor, told: Told, batch: Batch) -> Told:
        """A vector."""
        return Told(vector=self.tell(time_waves(batch[SCALE] * 1000).to(self.tell.weight.dtype)))


class Consistency(nn.Module):
    """A student that says at once where the teacher's guided path leads, and an average of it that it learns from.

    Student and target begin with the teacher's weights; the target is `decay` target + (1 - `decay`) student after
    each step that was taken. The teacher's scale is w of U(low, high), with which its path is the conditional moved by
    w (conditional - unconditional): w is guidance - 1 elsewhere. No row's condition is dropped.
    """

    def __init__(
        self,
        teacher: DiffusionPrior,
        student: DiffusionPrior,
        target: DiffusionPrior,
        width: int,
        *,
        solver_steps: int = 50,
        scales: tuple[float, float] = (5.0, 15.0),
        decay: float = 0.95,
        huber: float = 1e-3,
    ) -> None:
        super().__init__()
        if not isinstance(teacher.process.schedule, Betas) or teacher.process.schedule.steps % solver_steps:
            raise ValueError("A consistency is distilled along whole strides of a schedule of Betas.")
        self.teacher, self.target = teacher.requires_grad_(False), target.requires_grad_(False)
        self.student = student
        self.told_scale, self._target_scale = GuidanceScale(width), GuidanceScale(width).requires_grad_(False)
        student.attach(self.told_scale)
        target.attach(self._target_scale)
        self.process, self.space = teacher.process, teacher.space
        self._stride, self._solver_steps = teacher.process.schedule.steps // solver_steps, solver_steps
        self._scales, self._decay, self._huber = scales, decay, huber

    @torch.no_grad()
    def begin(self) -> None:
        """Student and target are the teacher."""
        for each in (self.student, self.target):
            each.load_state_dict(self.teacher.state_dict())
        self._target_scale.load_state_dict(self.told_scale.state_dict())

    def turns(self) -> list[Turn]:
        """The student's."""
        return [Turn("student", self, rebuilt=("teacher",))]

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Rows."""
        return {"consistency": batch["weight"].sum()}

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The summed pseudo-Huber distance, of a row a mean, between where student and target say the path leads."""
        x0, epsilon, _ = self.student.drawn(batch)
        draws_B2 = uniforms(batch["noise_key"], (2,), "consistency", dtype=torch.float64)
        t = ((draws_B2[:, 0] * self._solver_steps).floor() + 1) * self._stride - 1
        w = self._scales[0] + (self._scales[1] - self._scales[0]) * draws_B2[:, 1]
        batch = {**batch, SCALE: w.float()}
        asked = Asked(len(t), batch)
        x = self.process.noised(x0, epsilon, self.process.schedule.lambda_at(t))
        said = self._leads(self.student, x, t, asked)
        with torch.no_grad():
            before, s = self._solved(x, t, w, asked)
            wanted = self._leads(self.target, before, s, asked)
        apart = (said - wanted).float().square() + self._huber**2
        loss_B = (apart.sqrt() - self._huber).flatten(1).mean(1)
        return {"consistency": (loss_B * batch["weight"]).sum()}

    @torch.no_grad()
    def stepped(self, sums: dict[str, torch.Tensor]) -> None:
        """The target follows the student."""
        for mine, other in ((self.target, self.student), (self._target_scale, self.told_scale)):
            for follower, leader in zip(mine.parameters(), other.parameters(), strict=True):
                follower.lerp_(leader, 1 - self._decay)

    @torch.no_grad()
    def sample(
        self, asked: Asked, seeds: Sequence[int], sampling: DiffusionSampling, start: Start | None = None
    ) -> torch.Tensor:
        """Values (B, *shape) in a few steps; `sampling.guidance` - 1 is the scale that the student is told.

        ValueError where that scale was not trained, or guidance is asked for in a way that was not.
        """
        (low, high), plain = self._scales, DiffusionSampling()
        if not low - 1e-6 <= sampling.guidance - 1 <= high + 1e-6:
            raise ValueError(
                f"This student was told of guidance within [{1 + low:g}, {1 + high:g}] when it was trained, but not of "
                f"{sampling.guidance:g}."
            )
        if asked.without or any(
            getattr(sampling, name) != getattr(plain, name) for name in ("guided", "interval", "rescale")
        ):
            raise ValueError(
                "A student knows its teacher's guidance, away from the nulls alone: leave out negative prompts, "
                "guided, interval and rescale."
            )
        scale = torch.full((asked.rows,), sampling.guidance - 1, device=next(self.parameters()).device)
        few = replace(sampling, sampler="consistency", guidance=1.0, solver_steps=self._solver_steps)
        return self.student.sample(Asked(asked.rows, {**asked.batch, SCALE: scale}), seeds, few, start)

    def _leads(self, prior: DiffusionPrior, x: torch.Tensor, t: torch.Tensor, asked: Asked) -> torch.Tensor:
        """x_0 by the consistency function."""
        told = prior.conditions.asked(asked)
        denoise = consistent(self.process, lambda x, t: prior.denoise(x, t, told, asked.batch))
        return self.process.estimate(denoise(x, t)[0], x, self.process.schedule.lambda_at(t)).x0

    def _solved(
        self, x: torch.Tensor, t: torch.Tensor, w: torch.Tensor, asked: Asked
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One DDIM step of the guided teacher from t to the solver's place before it; 0 is before the first."""
        conditions = self.teacher.conditions
        told, without = conditions.asked(asked), conditions.without(asked)
        s = (t - self._stride).clamp(min=0)
        first, second = (self.teacher.denoise(x, t, each, asked.batch)[0] for each in (told, without))
        guided = first + w.view(-1, *[1] * (x.dim() - 1)).to(x.dtype) * (first - second)
        lambda_t, lambda_s = (self.process.schedule.lambda_at(each) for each in (t, s))
        estimate = self.process.estimate(guided, x, lambda_t)
        return self.process.noised(estimate.x0, estimate.epsilon, lambda_s), s
