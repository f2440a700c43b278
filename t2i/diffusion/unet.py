"""A U-Net (diffusers' blocks) that hears a vector beside the time, tokens by cross-attention, and planes beside x."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from t2i.conditions.hearing import Conditions
from t2i.nn.transformer import Block, rotary
from t2i.nn.weights import begins, constant
from t2i.pixels import patches
from t2i.protocol import Space, Told


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes; the defaults suit pictures of 32x32 and less."""

    channels: int = 64  # of the first level
    multipliers: tuple[int, ...] = (1, 2)  # of each level; every level but the last halves its rows and columns
    blocks: int = 2  # residual blocks a level; on the way up there is one more
    attention_levels: tuple[int, ...] = (1,)  # whose places attend to each other and to the tokens; the middle does
    width: int = 256  # of the time, and of the vector and the tokens that it is told
    head_width: int = 32
    groups: int = 16
    patch: int = 1  # pixels a side that are folded into channels at first (arXiv 2301.11093, section 2.3)
    token_layers: int = 0  # of a transformer that reads the tokens before they are attended to (arXiv 2112.10741)

    hears = frozenset({"vector", "tokens", "seen", "planes"})

    def __post_init__(self) -> None:
        if not self.multipliers or min(self.channels, self.blocks, self.patch, self.groups, *self.multipliers) < 1:
            raise ValueError("A U-Net has at least one level, and sizes of at least 1.")
        if self.channels % self.groups or self.channels % self.head_width or self.width % self.head_width:
            raise ValueError(
                f"Heads of {self.head_width} divide the channels and the width, and {self.groups} norm groups the "
                f"channels, but these are {self.channels} and {self.width}."
            )
        if unknown := [level for level in self.attention_levels if level not in range(len(self.multipliers))]:
            raise ValueError(f"There is no level {unknown[0]} to attend: there are {len(self.multipliers)}.")

    def build(self, space: Space, conditions: Conditions, outputs: int, times: float) -> "UNet":
        """The network of a space (C, h, w), with `outputs` times as many channels out; it is told `times` t."""
        return UNet(self, space, conditions, outputs, times)


class UNet(nn.Module):
    """x (B, C, h, w) at times (B,) to (B, outputs C, h, w): of its input nothing at first, its last layer being 0."""

    _rotary: torch.Tensor

    def __init__(
        self, config: UNetConfig, space: Space, conditions: Conditions, outputs: int = 1, times: float = 1.0
    ) -> None:
        from diffusers.models.resnet import ResnetBlock2D  # slow to import, and seldom wanted
        from diffusers.models.transformers.transformer_2d import Transformer2DModel
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        super().__init__()
        if space.codes or len(space.shape) != 3:
            raise ValueError(f"A U-Net draws values with channels, rows and columns, but these are of {space}.")
        patches(space.shape[1:], config.patch * 2 ** (len(config.multipliers) - 1))  # type: ignore[arg-type]
        self.config, self.hears, self._times = config, config.hears, times
        levels, folded = range(len(config.multipliers)), config.patch**2
        widths = tuple(config.channels * multiplier for multiplier in config.multipliers)
        attends = [level in config.attention_levels for level in levels]
        shared: Any = {
            "in_channels": (space.shape[0] + conditions.channels) * folded,
            "out_channels": space.shape[0] * outputs * folded,
            "down_block_types": tuple("CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attends),
            "up_block_types": tuple("CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)),
            "block_out_channels": widths,
            "layers_per_block": config.blocks,
            "norm_num_groups": config.groups,
            "cross_attention_dim": config.width,
            "attention_head_dim": tuple(width // config.head_width for width in widths),  # heads, by another name
            "time_embedding_dim": config.width,
            "class_embed_type": "identity",
        }
        self.unet = UNet2DConditionModel(**shared)
        for module in self.unet.modules():  # residual branches begin at 0 (arXiv 2105.05233)
            if isinstance(module, ResnetBlock2D):
                begins(module.conv2, weight=constant(0.0), bias=constant(0.0))
            elif isinstance(module, Transformer2DModel):
                begins(module.proj_out, weight=constant(0.0), bias=constant(0.0))  # type: ignore[arg-type]
        begins(self.unet.conv_out, weight=constant(0.0), bias=constant(0.0))
        layers = config.token_layers if conditions.length else 0
        heads = config.width // config.head_width
        self.readers = nn.ModuleList(Block(config.width, heads) for _ in range(layers))
        places = torch.arange(max(1, conditions.length))[:, None]
        self.register_buffer("_rotary", rotary(places, config.head_width), persistent=False)

    def forward(self, x: torch.Tensor, t: torch.Tensor, told: Told) -> torch.Tensor:
        planes = [] if told.planes is None else [told.planes.to(x.dtype)]
        tokens, seen = self._read(told, x)
        vector = x.new_zeros(len(x), self.config.width) if told.vector is None else told.vector
        x = functional.pixel_unshuffle(torch.cat([x, *planes], dim=1), self.config.patch)
        (x,) = self.unet(
            x, t * self._times, tokens, class_labels=vector, encoder_attention_mask=seen, return_dict=False
        )
        return functional.pixel_shuffle(x, self.config.patch)

    def _read(self, told: Told, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens (B, S, D) and which are there; where none are told, one of zeros."""
        if told.tokens is None:
            return x.new_zeros(len(x), 1, self.config.width), None
        tokens, seen = told.tokens, told.seen
        mask = None if seen is None else seen[:, None, None]
        for layer in self.readers:
            tokens = layer(tokens, self._rotary[:, : tokens.shape[1]], mask)
        return tokens, seen
