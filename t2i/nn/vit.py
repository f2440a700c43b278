"""The transformer block of vision transformers: layer norms, biases and GELU (arXiv 2010.11929).

Shapes: B rows, S positions, D width, H heads.
"""

import torch
from torch import nn
from torch.nn import functional

from t2i.nn.weights import begins, constant, xavier


class ViTBlock(nn.Module):
    """Attention, then a network four times as wide, each of the normed input; counts as timm's `Block`."""

    def __init__(self, width: int, heads: int, expansion: int = 4) -> None:
        super().__init__()
        self._heads = heads
        self.norm_attention = nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = linear(width, expansion * width), linear(expansion * width, width)

    def forward(self, x_BSD: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Same shape out as in; `mask` broadcasts to (B, H, S, S), true where a query may look."""
        batch, length, width = x_BSD.shape
        qkv = self.qkv(self.norm_attention(x_BSD)).view(batch, length, 3, self._heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x_BSD = x_BSD + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x_BSD + self.down(functional.gelu(self.up(self.norm_mlp(x_BSD))))


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that begins by Xavier's rule, without bias."""
    return begins(nn.Linear(inputs, outputs), weight=xavier(), bias=constant(0.0))
