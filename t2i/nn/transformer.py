"""A pre-norm transformer trunk with normalised queries and keys and a key-value cache.

Shapes: B rows, S positions of this call, T positions seen so far, D width, H heads, K width of a head.
"""

import torch
from torch import nn
from torch.nn import functional


class Cache:
    """Keys and values of one layer, for decoding one position after another."""

    def __init__(self) -> None:
        self._k_BHTK: torch.Tensor | None = None
        self._v_BHTK: torch.Tensor | None = None

    def extend(self, k_BHSK: torch.Tensor, v_BHSK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new positions and return all that are held."""
        if self._k_BHTK is not None and self._v_BHTK is not None:
            k_BHSK = torch.cat([self._k_BHTK, k_BHSK], dim=2)
            v_BHSK = torch.cat([self._v_BHTK, v_BHSK], dim=2)
        self._k_BHTK, self._v_BHTK = k_BHSK, v_BHSK
        return k_BHSK, v_BHSK


class Attention(nn.Module):
    """Multi-head attention whose queries and keys are normalised (QK-norm, arXiv 2302.05442): high rates stay stable."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BSD: torch.Tensor, mask: torch.Tensor | None, cache: Cache | None = None) -> torch.Tensor:
        """`mask` is boolean, broadcasts to (B, H, S, T), and is true where a query may look."""
        batch, length, width = x_BSD.shape
        q, k, v = self.qkv(x_BSD).view(batch, length, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.norm_q(q), self.norm_k(k)
        if cache is not None:
            k, v = cache.extend(k, v)
        y_BHSK = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y_BHSK.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention, then a GELU network of four times the width; both start as the identity (zero-initialised outputs)."""

    def __init__(self, width: int, heads: int, expansion: int = 4) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm_mlp = nn.RMSNorm(width, eps=1e-6)
        self.up = nn.Linear(width, expansion * width, bias=False)
        self.down = nn.Linear(expansion * width, width, bias=False)
        for linear in (self.attention.qkv, self.up):
            nn.init.normal_(linear.weight, std=width**-0.5)
        for linear in (self.attention.out, self.down):
            nn.init.zeros_(linear.weight)

    def forward(self, x_BSD: torch.Tensor, mask: torch.Tensor | None, cache: Cache | None = None) -> torch.Tensor:
        """Same shape out as in."""
        x_BSD = x_BSD + self.attention(self.norm_attention(x_BSD), mask, cache)
        return x_BSD + self.down(functional.gelu(self.up(self.norm_mlp(x_BSD)), approximate="tanh"))
