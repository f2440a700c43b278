"""MAR: tokens in random order, several at a time, each drawn by a small diffusion of its own (arXiv 2406.11838).

Shapes: B rows, N = h * w tokens of C channels, K of them known, P places whose tokens are denoised, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from t2i.conditions.hearing import Conditions
from t2i.conditions.labels import LabelConfig
from t2i.diffusion.guidance import at_once, classifier_free
from t2i.diffusion.ladder import ladder, respaced
from t2i.diffusion.process import Denoised, Denoiser, Process
from t2i.diffusion.samplers import ancestral
from t2i.diffusion.schedules import Betas
from t2i.nn.denoising_mlp import DenoisingMLP
from t2i.nn.vit import ViTBlock, linear
from t2i.nn.weights import begins, normal
from t2i.protocol import Asked, Batch, ConditionConfig, Space, Start, Told, Turn
from t2i.random import child, keys_of, normals, permutations, uniforms

HEARS = frozenset({"vector", "tokens", "seen"})


@dataclass(frozen=True, kw_only=True)
class MARSampling:
    """How tokens are drawn."""

    rounds: int = 64  # in which all tokens are drawn, few at first
    steps: int = 100  # of a token's diffusion
    temperature: float = 1.0  # of the noise of these steps
    guidance: float = 1.0  # at the end; it rises from 1 with the share of tokens that are drawn
    guided: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if min(self.rounds, self.steps) < 1 or self.temperature < 0:
            raise ValueError("rounds and steps are at least 1, and the temperature is not negative.")


@dataclass(frozen=True, kw_only=True)
class MARConfig:
    """Sizes of the two transformers and of the head; the defaults are MAR-B's."""

    width: int = 768
    encoder_layers: int = 12
    decoder_layers: int = 12
    heads: int = 12
    patch: int = 1  # latents to a side of a token
    buffer: int = 64  # tokens before the picture, which are told what rows are told
    head_width: int = 1024
    head_layers: int = 6
    repeats: int = 4  # times and noises that a token is trained with at a time
    least_masked: float = (
        0.7  # the share of masked tokens is drawn from a normal of mean 1 and deviation 0.25, cut here
    )
    process: Process = field(default_factory=lambda: Process(schedule=Betas(shape="cosine"), learned_variance=True))
    sampling: ClassVar = MARSampling  # how it draws

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"The width must be a multiple of the heads, but {self.width} is not one of {self.heads}.")
        if not 0 < self.least_masked <= 1 or min(self.buffer, self.repeats, self.patch) < 1:
            raise ValueError("least_masked lies in (0, 1]; buffer, repeats and patch are at least 1.")
        if not isinstance(self.process.schedule, Betas):
            raise ValueError("The head draws a token in steps of DDPM: its process needs a schedule of Betas.")

    def build(self, space: Space, conditions: Sequence[ConditionConfig]) -> "MAR":
        """The prior of a space of latents (C, h, w)."""
        return MAR(self, space, conditions)


def mar_b() -> tuple[MARConfig, Space, tuple[LabelConfig]]:
    """MAR-B, of ImageNet at 256 pixels: 207,924,768 parameters.

    arXiv 2406.11838; its sizes, and which tables it learns, are those of its authors' code, LTH14/mar.
    """
    return _imagenet(MARConfig())


def mar_l() -> tuple[MARConfig, Space, tuple[LabelConfig]]:
    """MAR-L, of ImageNet at 256 pixels: 478,326,304 parameters.

    arXiv 2406.11838; its sizes, and which tables it learns, are those of its authors' code, LTH14/mar.
    """
    sizes = MARConfig(width=1024, encoder_layers=16, decoder_layers=16, heads=16, head_width=1280, head_layers=8)
    return _imagenet(sizes)


def mar_h() -> tuple[MARConfig, Space, tuple[LabelConfig]]:
    """MAR-H, of ImageNet at 256 pixels: 942,403,104 parameters.

    arXiv 2406.11838; its sizes, and which tables it learns, are those of its authors' code, LTH14/mar.
    """
    sizes = MARConfig(width=1280, encoder_layers=20, decoder_layers=20, heads=16, head_width=1536, head_layers=12)
    return _imagenet(sizes)


def _imagenet(config: MARConfig) -> tuple[MARConfig, Space, tuple[LabelConfig]]:
    """With the latents of KL-16, and one of 1,000 classes."""
    return config, Space((16, 16, 16)), (LabelConfig(labels=tuple(map(str, range(1000)))),)


class MAR(nn.Module):
    """p(tokens | told): a transformer encodes the known tokens, another says something of each masked place, of which a
    small network denoises that place's token.

    Of a training step all rows have one number of masked tokens, drawn by the step; which they are is each row's draw.
    """

    def __init__(self, config: MARConfig, space: Space, conditions: Sequence[ConditionConfig]) -> None:
        super().__init__()
        if space.codes or len(space.shape) != 3 or any(side % config.patch for side in space.shape[1:]):
            raise ValueError(
                f"MAR draws latents (C, h, w) of which patches of {config.patch} make tokens, not {space}."
            )
        width, patch = config.width, config.patch
        self.config, self.space = config, space
        self.channels = space.shape[0] * patch**2
        self.places = space.places // self.channels
        self.conditions = Conditions(conditions, width, space, HEARS)
        self.enter, self.enter_norm = linear(self.channels, width), nn.LayerNorm(width, eps=1e-6)
        self.encoder = nn.ModuleList(ViTBlock(width, config.heads) for _ in range(config.encoder_layers))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.between = linear(width, width)
        self.decoder = nn.ModuleList(ViTBlock(width, config.heads) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        total = config.buffer + self.places
        self.encoder_place, self.decoder_place, self.head_place, self.masked = (
            nn.Parameter(torch.zeros(count, width)) for count in (total, total, self.places, 1)
        )
        begins(self, **dict.fromkeys(("encoder_place", "decoder_place", "head_place", "masked"), normal(0.02)))
        outputs = self.channels * (2 if config.process.learned_variance else 1)
        self.head = DenoisingMLP(self.channels, width, outputs, config.head_width, config.head_layers)

    def turns(self) -> list[Turn]:
        """Its own, alone."""
        return [Turn("prior", self)]

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Masked tokens, for each loss."""
        names = ("error", "bound") if self.config.process.learned_variance else ("error",)
        return dict.fromkeys(names, batch["weight"].sum() * self.masked_at(int(batch["step"])))

    def masked_at(self, step: int) -> int:
        """How many tokens are masked in a training step; of all trainings the same, whatever their seed."""
        low = 0.5 * math.erfc((1 - self.config.least_masked) / 0.25 / math.sqrt(2))
        chance = uniforms(child(keys_of([0]), "masked", step), (1,), "share", dtype=torch.float64)
        share = 1 + 0.25 * float(torch.special.ndtri(low + (0.5 - low) * chance))
        return min(self.places, math.ceil(self.places * share))

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Sums over masked tokens of the process's losses on `values` (B, C, h, w)."""
        keys_B, process, repeats = batch["noise_key"], self.config.process, self.config.repeats
        tokens_BNC = self.to_tokens(batch["values"].float())
        order_BN = permutations(keys_B, self.places, "order")
        masked = self.masked_at(int(batch["step"]))
        said_BPD = self.said(self.conditions(batch), tokens_BNC, order_BN, masked, masked)
        rows, place_BP = len(keys_B), order_BN[:, :masked]
        x0 = tokens_BNC.gather(1, place_BP[..., None].expand(-1, -1, self.channels)).flatten(0, 1)
        sums: dict[str, torch.Tensor] = {}
        for repeat in range(repeats):
            keys_P = self._keys(keys_B, place_BP, repeat)
            t = process.schedule.drawn(uniforms(keys_P, (1,), "time", dtype=torch.float64)[:, 0])
            epsilon = normals(keys_P, (self.channels,), "noise")
            x = process.noised(x0, epsilon, process.schedule.lambda_at(t))
            losses = process.losses(self._denoise(x, t, said_BPD.flatten(0, 1)), x0, epsilon, t)
            for name, loss_P in losses.items():
                summed = (loss_P.view(rows, -1).sum(1) * batch["weight"]).sum() / repeats
                sums[name] = sums.get(name, summed.new_zeros(())) + summed
        return sums

    @torch.no_grad()
    def sample(
        self, asked: Asked, seeds: Sequence[int], sampling: MARSampling, start: Start | None = None
    ) -> torch.Tensor:
        """Latents (B, C, h, w), row b drawn from `seeds[b]` alone."""
        if start is not None:
            raise ValueError("MAR draws its tokens one after another and cannot begin from given ones.")
        device = self.masked.device
        keys_B, rows, guided = keys_of(seeds, device), asked.rows, sampling.guidance != 1
        asked = asked.to(device)
        told = self.conditions.pair(asked, sampling.guided) if guided else self.conditions.asked(asked)
        process, schedule = self.config.process, self.config.process.schedule
        assert isinstance(schedule, Betas)
        steps = ladder(schedule, respaced(schedule, str(sampling.steps)))
        order_BN = permutations(keys_B, self.places, "order")
        tokens_BNC, masked = self.masked.new_zeros(rows, self.places, self.channels), self.places
        twice = 2 if guided else 1
        for number in range(sampling.rounds):
            left = int(self.places * math.cos(math.pi / 2 * (number + 1) / sampling.rounds))
            left = 0 if number + 1 == sampling.rounds else max(1, min(left, masked - 1))
            if left == masked:  # more rounds than tokens
                continue
            said = self.said(told, tokens_BNC.repeat(twice, 1, 1), order_BN.repeat(twice, 1), masked, masked - left)
            place_BP = order_BN[:, left:masked]
            scale = 1 + (sampling.guidance - 1) * (self.places - left) / self.places
            denoise = self._told(said.flatten(0, 1))
            if guided:
                denoise = classifier_free(process, at_once(denoise), scale)
            keys_P = self._keys(keys_B, place_BP, 0)
            x = normals(keys_P, (self.channels,), "beginning")
            x = ancestral(process, denoise, x, steps, keys_P, temperature=sampling.temperature)
            index = place_BP[..., None].expand(-1, -1, self.channels)
            tokens_BNC.scatter_(1, index, x.view(rows, -1, self.channels))
            masked = left
        return self.to_latents(tokens_BNC)

    def said(
        self, told: Told, tokens_BNC: torch.Tensor, order_BN: torch.Tensor, masked: int, wanted: int
    ) -> torch.Tensor:
        """(B, wanted, D) of the last `wanted` of the first `masked` places of each row's order, which are not known."""
        rows, buffer = len(tokens_BNC), self.config.buffer
        known_BK = order_BN[:, masked:]
        tokens = tokens_BNC.gather(1, known_BK[..., None].expand(-1, -1, self.channels))
        x = self.enter(tokens) + self.encoder_place[buffer + known_BK]
        first = self.encoder_place[:buffer].expand(rows, -1, -1)
        if told.vector is not None:
            first = first + told.vector[:, None]
        prefix = [] if told.tokens is None else [told.tokens]
        ahead = 0 if told.tokens is None else told.tokens.shape[1]
        seen = None if told.seen is None else told.seen
        x = self.enter_norm(torch.cat([*prefix, first, x], dim=1))
        for block in self.encoder:
            x = block(x, _mask(seen, x.shape[1]))
        x = self.between(self.encoder_norm(x))
        every = (
            self.masked.to(x.dtype)
            .expand(rows, self.places, -1)
            .scatter(1, known_BK[..., None].expand(-1, -1, x.shape[2]), x[:, ahead + buffer :])
        )
        y = torch.cat([x[:, ahead : ahead + buffer], every], dim=1) + self.decoder_place
        y = torch.cat([x[:, :ahead], y], dim=1)
        for block in self.decoder:
            y = block(y, _mask(seen, y.shape[1]))
        y = self.decoder_norm(y)[:, ahead + buffer :] + self.head_place
        return y.gather(1, order_BN[:, masked - wanted : masked, None].expand(-1, -1, y.shape[2]))

    def to_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, N, C'), patch by patch in raster order."""
        return functional.pixel_unshuffle(latents, self.config.patch).flatten(2).transpose(1, 2)

    def to_latents(self, tokens_BNC: torch.Tensor) -> torch.Tensor:
        """The way back."""
        side = (self.space.shape[1] // self.config.patch, self.space.shape[2] // self.config.patch)
        return functional.pixel_shuffle(tokens_BNC.transpose(1, 2).unflatten(2, side), self.config.patch)

    def _keys(self, keys_B: torch.Tensor, place_BP: torch.Tensor, repeat: int) -> torch.Tensor:
        """A key a token."""
        return child(keys_B.repeat_interleave(place_BP.shape[1]), "token", place_BP.flatten(), repeat)

    def _denoise(self, x: torch.Tensor, t: torch.Tensor, said: torch.Tensor) -> Denoised:
        out = self.head(x, t, said).float()  # a variance's bounds lie too near for 16 bits
        if not self.config.process.learned_variance:
            return out, None
        prediction, share = out.chunk(2, dim=1)
        return prediction, share

    def _told(self, said: torch.Tensor) -> Denoiser:
        return lambda x, t: self._denoise(x, t, said)


def _mask(seen: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """(B, 1, 1, S): padding of the prefix is never looked at."""
    return None if seen is None else functional.pad(seen, (0, length - seen.shape[1]), value=True)[:, None, None, :]
