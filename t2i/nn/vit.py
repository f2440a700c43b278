"""The transformer block of vision transformers: layer norms, biases and GELU (arXiv 2010.11929).

Shapes: B rows, S positions, D width, H heads, h by w grid.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from t2i.nn.weights import begins, constant, xavier


class ViTBlock(nn.Module):
    """Attention, then a network four times as wide, each of the normed input; counts as timm's `Block`.

    `head_width` is that of a head where the heads do not share `width`; `qkv_bias` is of the attention's inputs alone.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        expansion: int = 4,
        *,
        head_width: int | None = None,
        qkv_bias: bool = True,
        activation: Callable[[torch.Tensor], torch.Tensor] = functional.gelu,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self._heads, self._activation = heads, activation
        inner = heads * head_width if head_width else width
        self.norm_attention = nn.LayerNorm(width, eps=eps)
        self.qkv, self.out = linear(width, 3 * inner, qkv_bias), linear(inner, width)
        self.norm_mlp = nn.LayerNorm(width, eps=eps)
        self.up, self.down = linear(width, expansion * width), linear(expansion * width, width)

    def forward(self, x_BSD: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Same shape out as in; `mask` broadcasts to (B, H, S, S), true where a query may look."""
        batch, length, _ = x_BSD.shape
        qkv = self.qkv(self.norm_attention(x_BSD)).view(batch, length, 3, self._heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x_BSD = x_BSD + self.out(seen.transpose(1, 2).reshape(batch, length, -1))
        return x_BSD + self.down(self._activation(self.up(self.norm_mlp(x_BSD))))


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer that begins by Xavier's rule, with a bias of 0 if any."""
    layer = begins(nn.Linear(inputs, outputs, bias=bias), weight=xavier())
    return begins(layer, bias=constant(0.0)) if bias else layer


def sincos(grid: tuple[int, int], width: int, device: torch.device | None = None) -> torch.Tensor:
    """Fixed positions (h * w, D) of a grid, in raster order: half of D says the column, half the row.

    Of each half first sines, then cosines, of wavelengths from 2 pi up to 10,000 times that (arXiv 1706.03762; in two
    dimensions as in arXiv 2111.06377).
    """
    steps = torch.arange(width // 4, dtype=torch.float64, device=device) / (width / 4)
    places_2hw = torch.meshgrid(*(torch.arange(side, device=device) for side in grid), indexing="ij")
    angles = [place.flatten()[:, None] * 10_000.0**-steps for place in reversed(places_2hw)]
    return torch.cat([wave for each in angles for wave in (each.sin(), each.cos())], dim=1).float()
