"""An autoregressive prior: what is told as a prefix, then codes in raster order (arXiv 2102.12092, 2406.06525).

Shapes: B rows, T prefix positions, N = h * w codes, M of them known, S positions, D width, K codes of the space.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from t2i.conditions.hearing import Conditions
from t2i.conditions.words import Words, WordsConfig
from t2i.nn.transformer import Block, Cache, rotary
from t2i.nn.weights import begins, constant, normal
from t2i.priors.sampling import SamplingConfig, draw
from t2i.protocol import Asked, Batch, ConditionConfig, Space, Start, Told, Turn
from t2i.random import keys_of, uniforms

HEARS = frozenset({"vector", "tokens", "seen"})
STD = 0.5  # of first embeddings


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig:
    """Sizes of the trunk, and how it reads the caption."""

    width: int = 192
    layers: int = 6
    heads: int = 6
    text_loss: bool = False  # learn the caption too (DALL-E): its words then see only the words before them
    sampling: ClassVar = SamplingConfig  # how it draws

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads) < 1:
            raise ValueError("width, layers and heads must be at least 1.")
        if self.width % self.heads:
            raise ValueError(f"The width must be a multiple of the heads, but {self.width} is not one of {self.heads}.")

    def build(self, space: Space, conditions: Sequence[ConditionConfig]) -> "AutoregressivePrior":
        """The prior of a space of codes (h, w)."""
        return AutoregressivePrior(self, space, conditions)


def autoregressive_shapes() -> tuple[AutoregressiveConfig, Space, tuple[WordsConfig]]:
    """Shapes at 32 pixels, as the recipe `demo` has it: 1,577,232 parameters.

    Chosen here; no paper has it.
    """
    words = WordsConfig(vocabulary_size=1000, length=40)
    return AutoregressiveConfig(width=128, layers=4, heads=4), Space((4, 4), codes=2560), (words,)


class AutoregressivePrior(nn.Module):
    """p(codes | told) = prod over n of p(code n | told, codes before n).

    The prefix is the vector that is told, if any, then the tokens; padding is never looked at. Position n of the
    picture carries code n - 1 (a learned start for n = 0) and the row and column of code n, which it predicts.
    """

    _prefix_rotary: torch.Tensor
    _code_rotary: torch.Tensor

    def __init__(self, config: AutoregressiveConfig, space: Space, conditions: Sequence[ConditionConfig]) -> None:
        super().__init__()
        if not space.codes or len(space.shape) != 2:
            raise ValueError(f"This prior draws codes (h, w), one after another, but the values are of {space}.")
        self.config, self.space = config, space
        self.conditions = Conditions(conditions, config.width, space, HEARS)
        rows, columns = space.shape
        self.code = begins(nn.Embedding(space.codes + 1, config.width), weight=normal(STD))  # the last one: the start
        self.row = begins(nn.Embedding(rows, config.width), weight=normal(STD))
        self.column = begins(nn.Embedding(columns, config.width), weight=normal(STD))
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = begins(nn.Linear(config.width, space.codes, bias=False), weight=constant(0.0))
        self.text_head = self._text_head() if config.text_loss else None
        # The prefix lies on the diagonal before the picture, whose codes lie at their rows and columns (2409.12191).
        length = self.conditions.length + 1  # a vector is one more
        prefix = torch.arange(-1, length - 1)[:, None].expand(-1, 2)
        places = length - 1 + torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        self.register_buffer("_prefix_rotary", rotary(prefix, config.width // config.heads), persistent=False)
        self.register_buffer("_code_rotary", rotary(places, config.width // config.heads), persistent=False)

    def turns(self) -> list[Turn]:
        """Its own, alone."""
        return [Turn("prior", self)]

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """How many targets each loss sums over."""
        weight_B = batch["weight"]
        counts = {"codes": weight_B.sum() * self.space.places}
        if self.text_head is not None:
            counts["text"] = (weight_B[:, None] * (self._caption(batch)[:, 1:] > 0)).sum()
        return counts

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Summed cross-entropies (nats) of int64 `values` (B, N) given what is told; rows weigh `weight` (B,)."""
        codes_BN, weight_B1 = batch["values"], batch["weight"][:, None]
        told = self.conditions(batch)
        x_BSD = self._see(told, codes_BN[:, :-1])
        length = x_BSD.shape[1] - codes_BN.shape[1]
        losses = {"codes": _cross_entropy(self.head(x_BSD[:, length:]), codes_BN, weight_B1.expand_as(codes_BN))}
        if self.text_head is not None:
            words = self._caption(batch)[:, 1:]
            losses["text"] = _cross_entropy(self.text_head(x_BSD[:, : length - 1]), words, weight_B1 * (words > 0))
        return losses

    def logits(self, told: Told, codes_BM: torch.Tensor) -> torch.Tensor:
        """(B, M + 1, K): what comes first, and what follows each of the first M < N codes."""
        x_BSD = self._see(told, codes_BM)
        return self.head(x_BSD[:, x_BSD.shape[1] - codes_BM.shape[1] - 1 :])

    @torch.no_grad()
    def sample(
        self, asked: Asked, seeds: Sequence[int], sampling: SamplingConfig, start: Start | None = None
    ) -> torch.Tensor:
        """Codes (B, h, w) int64, row b drawn from `seeds[b]` alone; guidance moves the logits away from the nulls'."""
        if start is not None:
            raise ValueError("This prior draws codes one after another and cannot begin from given ones.")
        device = self.code.weight.device
        asked, rows, guided = asked.to(device), asked.rows, sampling.guidance != 1
        told = self.conditions.pair(asked, sampling.guided) if guided else self.conditions.asked(asked)
        total = rows * (1 + guided)
        chances_BN = uniforms(keys_of(seeds, device), (self.space.places,), "codes", dtype=torch.float64)
        codes = torch.empty(rows, 0, dtype=torch.int64, device=device)
        caches = [Cache() for _ in self.blocks]
        x_BSD = self._see(told, codes.new_empty(total, 0), caches)
        length = x_BSD.shape[1] - 1
        keys = functional.pad(self._seen(told, total), (0, self.space.places), value=True)[:, None, None, :]
        for n in range(self.space.places):
            logits_BK = self.head(x_BSD[:, -1]).float()
            if guided:
                with_told, without = logits_BK.chunk(2)
                logits_BK = without + sampling.guidance * (with_told - without)
            codes = torch.cat([codes, draw(logits_BK, chances_BN[:, n], sampling)[:, None]], dim=1)
            if n + 1 < self.space.places:
                newest = self._embed_codes(codes[:, -1:].repeat(total // rows, 1), first=n + 1)
                turn = self._code_rotary[:, n + 1 : n + 2]
                x_BSD = self._blocks(newest, turn, keys[..., : length + n + 2], caches)
        return codes.view(rows, *self.space.shape)

    def _see(self, told: Told, codes_BM: torch.Tensor, caches: list[Cache] | None = None) -> torch.Tensor:
        """The trunk's output (B, T + 1 + M, D) over prefix, start and codes."""
        start = codes_BM.new_full((len(codes_BM), 1), self.space.codes)
        pictures_BND = self._embed_codes(torch.cat([start, codes_BM], dim=1), first=0)
        parts = [told.vector[:, None]] if told.vector is not None else []
        parts += [told.tokens] if told.tokens is not None else []
        x_BSD = torch.cat([*parts, pictures_BND], dim=1)
        seen_BT = self._seen(told, len(codes_BM))
        return self._blocks(x_BSD, self._turns(told, seen_BT, x_BSD.shape[1]), self._mask(seen_BT, x_BSD), caches)

    def _seen(self, told: Told, rows: int) -> torch.Tensor:
        """(B, T): which positions of the prefix are no padding."""
        every = torch.ones(rows, 1, dtype=torch.bool, device=self.code.weight.device)
        parts = [every] if told.vector is not None else []
        if told.tokens is not None:
            parts.append(every.expand(-1, told.tokens.shape[1]) if told.seen is None else told.seen)
        return torch.cat(parts, dim=1) if parts else every[:, :0]

    def _turns(self, told: Told, seen_BT: torch.Tensor, total: int) -> torch.Tensor:
        """The rotary table of all positions: (2, S, K), or (2, B, 1, S, K) where rows differ."""
        first, length = int(told.vector is None), seen_BT.shape[1]
        codes = self._code_rotary[:, : total - length]
        if self.conditions.saying_tokens < 2:
            return torch.cat([self._prefix_rotary[:, first : first + length], codes], dim=1)
        # A row's places count what is there, so that they do not depend on how far others are padded.
        place_BT = first + (seen_BT.cumsum(dim=1) - 1).clamp(min=0)
        codes = codes[:, None].expand(-1, len(place_BT), -1, -1)
        return torch.cat([self._prefix_rotary[:, place_BT], codes], dim=2)[:, :, None]

    def _blocks(
        self, x_BSD: torch.Tensor, turns: torch.Tensor, mask: torch.Tensor, caches: list[Cache] | None
    ) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x_BSD = block(x_BSD, turns, mask, caches[i] if caches else None)
        return self.norm(x_BSD)

    def _mask(self, seen_BT: torch.Tensor, x_BSD: torch.Tensor) -> torch.Tensor:
        """(B, 1, S, S): a code sees the prefix and the codes before it; the prefix sees itself."""
        length, total = seen_BT.shape[1], x_BSD.shape[1]
        mask = torch.ones(total, total, dtype=torch.bool, device=x_BSD.device).tril()
        if self.text_head is None:
            mask[:length, :length] = True
        return mask & functional.pad(seen_BT, (0, total - length), value=True)[:, None, None, :]

    def _embed_codes(self, codes_BM: torch.Tensor, first: int) -> torch.Tensor:
        place = torch.arange(first, first + codes_BM.shape[1], device=codes_BM.device)
        columns = self.space.shape[1]
        return self.code(codes_BM) + self.row(place // columns) + self.column(place % columns)

    def _text_head(self) -> nn.Linear:
        """Predicts the next word of the caption, which has to be all that is told."""
        words = list(self.conditions.each.values())
        if len(words) != 1 or not isinstance(words[0], Words):
            raise ValueError("With text_loss a prior is told words of an own vocabulary, and nothing beside.")
        head = nn.Linear(self.config.width, words[0].words.num_embeddings, bias=False)
        return begins(head, weight=constant(0.0))

    def _caption(self, batch: Batch) -> torch.Tensor:
        """Word ids (B, T), as they are heard."""
        (words,) = self.conditions.each.values()
        assert isinstance(words, Words)
        return words.ids(batch, self.conditions.dropped(batch, words.name))


def _cross_entropy(logits_BNK: torch.Tensor, targets_BN: torch.Tensor, weight_BN: torch.Tensor) -> torch.Tensor:
    losses = functional.cross_entropy(logits_BNK.flatten(0, 1).float(), targets_BN.flatten(), reduction="none")
    return (losses * weight_BN.flatten()).sum()
