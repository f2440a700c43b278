"""An autoregressive text-to-image prior: caption, then codes in raster order (arXiv 2102.12092, 2406.06525).

Shapes: B rows, T caption positions, N = h * w codes, S = T + N positions, D width, K codebook size, V vocabulary size.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from t2i.nn.transformer import Block, Cache
from t2i.priors.protocol import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig:
    """Sizes of the trunk, and how the caption is read."""

    width: int = 192
    layers: int = 6
    heads: int = 6
    text_length: int = 64  # the longest caption, in words of the vocabulary; longer ones are cut
    text_loss: bool = False  # learn the caption as well (DALL-E); its words then see only those before them

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"The width must be a multiple of the heads, but {self.width} is not one of {self.heads}.")
        if min(self.width, self.layers, self.heads, self.text_length) < 1:
            raise ValueError("width, layers, heads and text_length must be at least 1.")


class AutoregressivePrior(nn.Module):
    """p(codes | caption) = prod p(code_n | caption, codes before n).

    Position n of the code part carries the code before it (a learned start for n = 0) and the row and column of the code
    that it predicts. A caption is padded on the right with zeros; padding is never looked at, so its length is free.
    """

    def __init__(
        self, config: AutoregressiveConfig, *, vocabulary_size: int, codebook_size: int, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        self.vocabulary_size, self.codebook_size = vocabulary_size, codebook_size
        height, width = grid
        self.text = nn.Embedding(vocabulary_size, config.width)
        self.text_position = nn.Embedding(config.text_length, config.width)
        self.code = nn.Embedding(codebook_size + 1, config.width)  # the last one starts the picture
        self.row = nn.Embedding(height, config.width)
        self.column = nn.Embedding(width, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, codebook_size, bias=False)
        self.text_head = nn.Linear(config.width, vocabulary_size, bias=False) if config.text_loss else None
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
        for head in (self.head, self.text_head):
            if head is not None:
                nn.init.zeros_(head.weight)
    def targets(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Counts of the targets that `forward` sums over."""
        weight = batch["weight"]
        counts = {"codes": weight.sum() * self.grid[0] * self.grid[1]}
        if self.text_head is not None:
            counts["text"] = (weight[:, None] * (batch["text"][:, 1:] > 0)).sum()
        return counts

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Summed cross-entropies (nats) of `codes` (B, N) int64 given `text` (B, T) int64, rows weighed by `weight` (B,)."""
        weight, codes_BN = batch["weight"], batch["codes"]
        x_BSD = self._trunk(batch["text"], codes_BN[:, :-1])
        length = batch["text"].shape[1]
        losses = {"codes": _cross_entropy(self.head(x_BSD[:, length:]), codes_BN, weight[:, None].expand_as(codes_BN))}
        if self.text_head is not None:
            words = batch["text"][:, 1:]
            losses["text"] = _cross_entropy(self.text_head(x_BSD[:, : length - 1]), words, weight[:, None] * (words > 0))
        return losses

    def logits(self, text_BT: torch.Tensor, codes_BN: torch.Tensor) -> torch.Tensor:
        """(B, M + 1, K): what follows each of the first M codes (any M < N), the empty picture included."""
        return self.head(self._trunk(text_BT, codes_BN)[:, text_BT.shape[1] :])

    def _trunk(self, text_BT: torch.Tensor, codes_BM: torch.Tensor) -> torch.Tensor:
        batch, length = text_BT.shape
        start = codes_BM.new_full((batch, 1), self.codebook_size)
        pictures_BND = self._embed_codes(torch.cat([start, codes_BM], dim=1), first=0)
        x_BSD = torch.cat([self._embed_text(text_BT), pictures_BND], dim=1)
        mask = self._mask(text_BT, x_BSD.shape[1])
        for block in self.blocks:
            x_BSD = block(x_BSD, mask)
        return self.norm(x_BSD)

    def _mask(self, text_BT: torch.Tensor, total: int) -> torch.Tensor:
        """(B, 1, S, S): a code sees its caption and the codes before it; a caption sees itself."""
        length = text_BT.shape[1]
        mask = torch.ones(total, total, dtype=torch.bool, device=text_BT.device).tril()
        if self.text_head is None:
            mask[:length, :length] = True
        keys = functional.pad(text_BT > 0, (0, total - length), value=True)
        return mask & keys[:, None, None, :]

    def _embed_text(self, text_BT: torch.Tensor) -> torch.Tensor:
        return self.text(text_BT) + self.text_position.weight[: text_BT.shape[1]]

    def _embed_codes(self, codes_BM: torch.Tensor, first: int) -> torch.Tensor:
        place = torch.arange(first, first + codes_BM.shape[1], device=codes_BM.device)
        return self.code(codes_BM) + self.row(place // self.grid[1]) + self.column(place % self.grid[1])

    @torch.no_grad()
    def sample(self, text_BT: torch.Tensor, null_text: torch.Tensor, seeds: torch.Tensor, sampling: SamplingConfig):
        """Codes (B, h, w) int64 for captions (B, T); row b's chances come from `seeds[b]` alone, whatever its batch.

        `null_text` (1, L) is what stood for a dropped caption in training; classifier-free guidance (arXiv 2207.12598)
        extrapolates from its logits to the caption's by `sampling.guidance`.
        """
        raise NotImplementedError


def _cross_entropy(logits_BNK: torch.Tensor, targets_BN: torch.Tensor, weight_BN: torch.Tensor) -> torch.Tensor:
    losses = functional.cross_entropy(logits_BNK.flatten(0, 1).float(), targets_BN.flatten(), reduction="none")
    return (losses * weight_BN.flatten()).sum()
