"""A pre-norm transformer block with rotary positions, normalised queries and keys, and a key-value cache.

Shapes: B rows, S positions of this call, T positions seen so far, D width, H heads, K width of a head.
"""

import torch
from torch import nn
from torch.nn import functional

from t2i.nn.weights import begins, constant, normal


class Cache:
    """Keys and values of one layer, for decoding one position after another."""

    def __init__(self) -> None:
        self._kv: tuple[torch.Tensor, torch.Tensor] | None = None

    def extend(self, k_BHSK: torch.Tensor, v_BHSK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new positions; returns all (B, H, T, K)."""
        if self._kv is not None:
            k_BHSK = torch.cat([self._kv[0], k_BHSK], dim=2)
            v_BHSK = torch.cat([self._kv[1], v_BHSK], dim=2)
        self._kv = k_BHSK, v_BHSK
        return self._kv


class Attention(nn.Module):
    """Multi-head attention with rotary positions; queries and keys are normalised, so high rates stay stable.

    Rotary: arXiv 2104.09864. QK-norm: arXiv 2302.05442, with one learned gain a head.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.qkv = begins(nn.Linear(width, 3 * width, bias=False), weight=normal(width**-0.5))
        self.gain = nn.Parameter(torch.ones(heads, 1, 1))
        self.out = begins(nn.Linear(width, width, bias=False), weight=constant(0.0))
        begins(self, gain=constant(1.0))

    def forward(
        self, x_BSD: torch.Tensor, rotary_2SK: torch.Tensor, mask: torch.Tensor | None, cache: Cache | None = None
    ) -> torch.Tensor:
        """`rotary_2SK`, or (2, B, 1, S, K), belongs to these positions.

        `mask` broadcasts to (B, H, S, T), true where a query may look.
        """
        batch, length, width = x_BSD.shape
        qkv = self.qkv(x_BSD).view(batch, length, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        qk, v = _rotate(functional.rms_norm(qkv[:2], qkv.shape[-1:], eps=1e-6), rotary_2SK), qkv[2]
        q, k = qk[0] * self.gain.to(qk.dtype), qk[1]
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.out(_attend(q, k, v, mask).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention, then a squared-ReLU network (arXiv 2109.08668); both start as the identity: their outputs are zero."""

    def __init__(self, width: int, heads: int, expansion: int = 4) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm_mlp = nn.RMSNorm(width, eps=1e-6)
        self.up = begins(nn.Linear(width, expansion * width, bias=False), weight=normal(width**-0.5))
        self.down = begins(nn.Linear(expansion * width, width, bias=False), weight=constant(0.0))

    def forward(
        self, x_BSD: torch.Tensor, rotary_2SK: torch.Tensor, mask: torch.Tensor | None, cache: Cache | None = None
    ) -> torch.Tensor:
        """Same shape out as in; the arguments are those of `Attention`."""
        x_BSD = x_BSD + self.attention(self.norm_attention(x_BSD), rotary_2SK, mask, cache)
        return x_BSD + self.down(functional.relu(self.up(self.norm_mlp(x_BSD))).square())


def rotary(places_SA: torch.Tensor, width: int, base: float = 100.0) -> torch.Tensor:
    """Cosines and sines (2, S, width / 2) of the angles of positions with A coordinates each, for heads of `width`.

    The coordinates share the pairs of a head evenly (arXiv 2104.09864; by axis as in arXiv 2403.13298).
    """
    pairs = width // 2 // places_SA.shape[1]
    frequencies = base ** -(torch.arange(pairs) / pairs)
    angles_SK = (places_SA[:, :, None] * frequencies).flatten(1)
    angles_SK = functional.pad(angles_SK, (0, width // 2 - angles_SK.shape[1]))  # left over: no rotation
    return torch.stack([angles_SK.cos(), angles_SK.sin()])


def _rotate(x: torch.Tensor, rotary_2SK: torch.Tensor) -> torch.Tensor:
    cos, sin = rotary_2SK.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if q.device.type != "cpu":
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # On the CPU the backward pass of torch's fused attention takes half of a training step; these lines, a fifth.
    scores_BHST = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores_BHST = scores_BHST + torch.zeros((), dtype=scores_BHST.dtype).where(mask, -torch.inf)
    return scores_BHST.softmax(dim=-1).to(v.dtype) @ v
