"""An autoregressive text-to-image prior: the caption, then codes in raster order (arXiv 2102.12092, 2406.06525).

Shapes: B rows, T caption positions, N = h * w codes, M of them known, S positions, D width, K codebook size.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from t2i.nn.transformer import Block, Cache, rotary
from t2i.priors.protocol import SamplingConfig, draw


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig:
    """Sizes of the trunk, and how it reads the caption."""

    width: int = 192
    layers: int = 6
    heads: int = 6
    text_loss: bool = False  # learn the caption too (DALL-E): its words then see only the words before them

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads) < 1:
            raise ValueError("width, layers and heads must be at least 1.")
        if self.width % self.heads:
            raise ValueError(f"The width must be a multiple of the heads, but {self.width} is not one of {self.heads}.")


class AutoregressivePrior(nn.Module):
    """p(codes | caption) = prod over n of p(code n | caption, codes before n).

    A caption is word ids (B, T) from 1 on, padded on the right with 0; padding is never looked at, so T is free.
    Position n of the picture carries code n - 1 (a learned start for n = 0) and the row and column of code n, which it
    predicts.
    """

    _text_rotary: torch.Tensor
    _code_rotary: torch.Tensor

    def __init__(
        self,
        config: AutoregressiveConfig,
        *,
        vocabulary_size: int,
        text_length: int,
        codebook_size: int,
        grid: tuple[int, int],
    ) -> None:
        super().__init__()
        self.config, self.grid, self.codebook_size = config, grid, codebook_size
        self.text = nn.Embedding(vocabulary_size, config.width)
        self.text_position = nn.Embedding(text_length, config.width)
        self.code = nn.Embedding(codebook_size + 1, config.width)  # the last one starts the picture
        self.row = nn.Embedding(grid[0], config.width)
        self.column = nn.Embedding(grid[1], config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, codebook_size, bias=False)
        self.text_head = nn.Linear(config.width, vocabulary_size, bias=False) if config.text_loss else None
        # Words lie on the diagonal before the picture, whose codes lie at their rows and columns (arXiv 2409.12191).
        words = torch.arange(text_length)[:, None].expand(-1, 2)
        places = text_length + torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
        self.register_buffer("_text_rotary", rotary(words, config.width // config.heads), persistent=False)
        self.register_buffer("_code_rotary", rotary(places, config.width // config.heads), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
        for head in (self.head, self.text_head):
            if head is not None:
                nn.init.zeros_(head.weight)

    def targets(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """How many targets each loss sums over."""
        weight_B = batch["weight"]
        counts = {"codes": weight_B.sum() * self.grid[0] * self.grid[1]}
        if self.text_head is not None:
            counts["text"] = (weight_B[:, None] * (batch["text"][:, 1:] > 0)).sum()
        return counts

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Summed cross-entropies (nats) of int64 `codes` (B, N) given int64 `text` (B, T); rows weigh `weight` (B,)."""
        text_BT, codes_BN, weight_B1 = batch["text"], batch["codes"], batch["weight"][:, None]
        x_BSD = self._see(text_BT, codes_BN[:, :-1])
        length = text_BT.shape[1]
        losses = {"codes": _cross_entropy(self.head(x_BSD[:, length:]), codes_BN, weight_B1.expand_as(codes_BN))}
        if self.text_head is not None:
            words = text_BT[:, 1:]
            losses["text"] = _cross_entropy(self.text_head(x_BSD[:, : length - 1]), words, weight_B1 * (words > 0))
        return losses

    def logits(self, text_BT: torch.Tensor, codes_BM: torch.Tensor) -> torch.Tensor:
        """(B, M + 1, K): what comes first, and what follows each of the first M < N codes."""
        return self.head(self._see(text_BT, codes_BM)[:, text_BT.shape[1] :])

    @torch.no_grad()
    def sample(
        self, text: torch.Tensor, null_text: torch.Tensor, seeds: list[int], sampling: SamplingConfig
    ) -> torch.Tensor:
        """Codes (B, h, w) int64 for captions (B, T).

        Row b's chances come from `seeds[b]` alone, so a picture does not depend on its batch. `null_text` (L,) is what
        stood for a dropped caption in training: guidance moves the logits from its own towards the caption's.
        """
        rows, guided = len(text), sampling.guidance != 1
        if guided:
            length = max(text.shape[1], len(null_text))
            nulls = functional.pad(null_text, (0, length - len(null_text))).expand(rows, -1)
            text = torch.cat([functional.pad(text, (0, length - text.shape[1])), nulls])
        chances_BN = _chances(seeds, self.grid[0] * self.grid[1]).to(text.device)
        keys = functional.pad(text > 0, (0, chances_BN.shape[1]), value=True)[:, None, None, :]
        caches = [Cache() for _ in self.blocks]
        codes = text.new_empty(rows, 0)
        x_BSD = self._see(text, text.new_empty(len(text), 0), caches)
        for n in range(chances_BN.shape[1]):
            logits_BK = self.head(x_BSD[:, -1]).float()
            if guided:
                with_caption, without = logits_BK.chunk(2)
                logits_BK = without + sampling.guidance * (with_caption - without)
            codes = torch.cat([codes, draw(logits_BK, chances_BN[:, n], sampling)[:, None]], dim=1)
            if n + 1 < chances_BN.shape[1]:
                newest = self._embed_codes(codes[:, -1:].repeat(len(text) // rows, 1), first=n + 1)
                turn = self._code_rotary[:, n + 1 : n + 2]
                x_BSD = self._blocks(newest, turn, keys[..., : text.shape[1] + n + 2], caches)
        return codes.view(rows, *self.grid)

    def _see(self, text_BT: torch.Tensor, codes_BM: torch.Tensor, caches: list[Cache] | None = None) -> torch.Tensor:
        """The trunk's output (B, T + 1 + M, D) over caption, start and codes."""
        start = codes_BM.new_full((len(codes_BM), 1), self.codebook_size)
        words_BTD = self.text(text_BT) + self.text_position.weight[: text_BT.shape[1]]
        pictures_BND = self._embed_codes(torch.cat([start, codes_BM], dim=1), first=0)
        x_BSD = torch.cat([words_BTD, pictures_BND], dim=1)
        length = text_BT.shape[1]
        turns = torch.cat([self._text_rotary[:, :length], self._code_rotary[:, : x_BSD.shape[1] - length]], dim=1)
        return self._blocks(x_BSD, turns, self._mask(text_BT, x_BSD.shape[1]), caches)

    def _blocks(
        self, x_BSD: torch.Tensor, turns: torch.Tensor, mask: torch.Tensor, caches: list[Cache] | None
    ) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x_BSD = block(x_BSD, turns, mask, caches[i] if caches else None)
        return self.norm(x_BSD)

    def _mask(self, text_BT: torch.Tensor, total: int) -> torch.Tensor:
        """(B, 1, S, S): a code sees the caption and the codes before it; the caption sees itself."""
        length = text_BT.shape[1]
        mask = torch.ones(total, total, dtype=torch.bool, device=text_BT.device).tril()
        if self.text_head is None:
            mask[:length, :length] = True
        return mask & functional.pad(text_BT > 0, (0, total - length), value=True)[:, None, None, :]

    def _embed_codes(self, codes_BM: torch.Tensor, first: int) -> torch.Tensor:
        place = torch.arange(first, first + codes_BM.shape[1], device=codes_BM.device)
        return self.code(codes_BM) + self.row(place // self.grid[1]) + self.column(place % self.grid[1])


def _chances(seeds: list[int], count: int) -> torch.Tensor:
    """(B, count) float64 uniforms in [0, 1), row b from `seeds[b]`."""
    return torch.stack(
        [torch.rand(count, generator=torch.Generator().manual_seed(s), dtype=torch.double) for s in seeds]
    )


def _cross_entropy(logits_BNK: torch.Tensor, targets_BN: torch.Tensor, weight_BN: torch.Tensor) -> torch.Tensor:
    losses = functional.cross_entropy(logits_BNK.flatten(0, 1).float(), targets_BN.flatten(), reduction="none")
    return (losses * weight_BN.flatten()).sum()
