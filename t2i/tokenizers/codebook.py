"""From continuous vectors to the nearest of a codebook, with gradients straight through.

Shapes: B rows, D width of a code vector, h by w grid, N = B * h * w, K codebook size.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from t2i.nn.weights import Fill, begins, constant, identity, normal, uniform
from t2i.random import uniforms
from t2i.tokenizers.autoencoder import Noise, Quantized


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """A codebook learned by gradient (arXiv 1711.00937, eq. 3) or, with `ema`, as a moving average (appendix A.1)."""

    size: int = 1024
    width: int = 256
    normalize: bool = False  # nearest by angle, on the unit sphere (ViT-VQGAN, arXiv 2110.04627)
    linear: bool = False  # a frozen codebook seen through one learned matrix (SimVQ, arXiv 2411.02038): no code can die
    # Decay a step of the averages of which codes are made, .99 in the paper. 0: codes are learned by gradient.
    ema: float = field(default=0.0, metadata={"since": "0.2"})
    # A code that stands for fewer positions of a global batch, on average, takes a vector of that batch. 0: none does.
    dead_below: float = field(default=0.0, metadata={"since": "0.2"})

    def __post_init__(self) -> None:
        if self.size < 2 or self.width < 1:
            raise ValueError("A codebook needs at least 2 codes of at least width 1.")
        if not 0 <= self.ema < 1 or self.dead_below < 0:
            raise ValueError("A codebook needs an ema of at least 0 and below 1, and no negative dead_below.")
        if (self.ema and self.linear) or (self.dead_below and not self.ema):
            raise ValueError("Moving averages (ema) are of a codebook that is not linear; dead_below is of them alone.")

    @property
    def takes(self) -> int:
        """Channels of what it quantizes."""
        return self.width

    def build(self) -> "Codebook":
        """The quantizer, with fresh weights."""
        return AveragedCodebook(self) if self.ema else Codebook(self)


class Codebook(nn.Module):
    """Nearest neighbour in a learned codebook; the loss `codebook` moves codes, `commitment` moves inputs.

    Their weights, 1 and beta = 0.25, belong to the training; each has a gradient on its own side only.
    """

    losses: tuple[str, ...] = ("codebook", "commitment")

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        self.size, self.width = config.size, config.width
        self._hold()

    def _hold(self) -> None:
        config = self.config
        self.vectors = nn.Parameter(torch.zeros(config.size, config.width), requires_grad=not config.linear)
        begins(self, vectors=first_codes(config))
        mix = nn.Linear(config.width, config.width, bias=False) if config.linear else None
        self.mix = begins(mix, weight=identity()) if mix is not None else None

    def forward(self, z_BDhw: torch.Tensor) -> Quantized:
        """The nearest code at every position; the straight-through estimator carries gradients to `z_BDhw`.

        All of it in fp32: in 16 bits another code is the nearest at some positions in a hundred.
        """
        with torch.autocast(z_BDhw.device.type, enabled=False):
            return self._quantized(z_BDhw, self._flat(z_BDhw))

    def _flat(self, z_BDhw: torch.Tensor) -> torch.Tensor:
        """What is compared with codes, (N, D)."""
        z_ND = z_BDhw.permute(0, 2, 3, 1).reshape(-1, self.width).float()
        return functional.normalize(z_ND, dim=-1) if self.config.normalize else z_ND

    def _quantized(self, z_BDhw: torch.Tensor, z_ND: torch.Tensor) -> Quantized:
        batch, width, height, columns = z_BDhw.shape
        book_KD = self._book()
        with torch.no_grad():
            distances_NK = book_KD.square().sum(1) - 2 * z_ND @ book_KD.T
            codes_N = distances_NK.argmin(dim=1)
        q_ND = functional.embedding(codes_N, book_KD)
        sides = {"codebook": (q_ND, z_ND.detach()), "commitment": (q_ND.detach(), z_ND)}
        losses = {name: (sides[name][0] - sides[name][1]).square().view(batch, -1).mean(1) for name in self.losses}
        straight_ND = z_ND + (q_ND - z_ND).detach()
        vectors = straight_ND.to(z_BDhw.dtype).view(batch, height, columns, width).permute(0, 3, 1, 2)
        return Quantized(vectors, codes_N.view(batch, height, columns), losses)

    def lookup(self, codes_Bhw: torch.Tensor) -> torch.Tensor:
        """Code vectors (B, D, h, w)."""
        with torch.autocast(codes_Bhw.device.type, enabled=False):
            return functional.embedding(codes_Bhw, self._book()).permute(0, 3, 1, 2).to(self._held.dtype)

    @property
    def _held(self) -> torch.Tensor:
        return self.vectors

    def _book(self) -> torch.Tensor:
        book_KD = (self.vectors if self.mix is None else self.mix(self.vectors)).float()
        return functional.normalize(book_KD, dim=-1) if self.config.normalize else book_KD


class AveragedCodebook(Codebook):
    """Each code is the moving average of the vectors that it stood for, over steps of the global batch.

    With n_k and s_k, how many vectors of a global batch code k stood for and their sum (arXiv 1711.00937, eq. 6 to 8):
    N <- ema N + (1 - ema) n and m <- ema m + (1 - ema) s. The code is m_k over N_k, smoothed: (N_k + eps) / (sum N + K
    eps) sum N. N begins at one, not zero, or the first step would throw codes out by 1 / (1 - ema). With `normalize`
    the vectors are those on the sphere.
    """

    losses = ("commitment",)
    draws = True

    def _hold(self) -> None:
        config = self.config
        self.counts: torch.Tensor
        self.sums: torch.Tensor
        self.register_buffer("counts", torch.ones(config.size))
        self.register_buffer("sums", torch.zeros(config.size, config.width))
        begins(self, counts=constant(1.0), sums=first_codes(config))

    def forward(self, z_BDhw: torch.Tensor, noise: Noise | None = None) -> Quantized:
        """As by gradient; with noise, that is in training, the sums that `stepped` takes come along."""
        with torch.autocast(z_BDhw.device.type, enabled=False):
            z_ND = self._flat(z_BDhw)
            quantized = self._quantized(z_BDhw, z_ND)
            if noise is None:
                return quantized
            assert quantized.codes is not None
            return quantized._replace(seen=self._seen(z_ND.detach(), quantized.codes.flatten(1), noise))

    def _seen(self, z_ND: torch.Tensor, codes_BP: torch.Tensor, noise: Noise) -> dict[str, torch.Tensor]:
        """Sums over positions of rows that count, in float64: so in what order they are added hardly shows."""
        weight_B = torch.ones(len(codes_BP), device=z_ND.device) if noise.weight is None else noise.weight
        weight_N = weight_B[:, None].expand_as(codes_BP).flatten()
        counts_K, sums_KD = self._summed(z_ND, codes_BP.flatten(), weight_N)
        seen = {"counts": counts_K, "sums": sums_KD}
        if self.config.dead_below:
            # Each position draws a cell of about as many as there are positions; the first K are those of the codes.
            # Which vector a code would take so depends on no position's place in a batch.
            cells = max(self.size, round(float(self.counts.sum())))
            cells_BP = uniforms(noise.keys, codes_BP.shape[1:], "candidate", noise.step, dtype=torch.float64) * cells
            cells_N = cells_BP.long().flatten()
            drawn = cells_N < self.size
            seen["candidates"], seen["candidate"] = self._summed(z_ND[drawn], cells_N[drawn], weight_N[drawn])
        return seen

    def _summed(
        self, z_ND: torch.Tensor, cells_N: torch.Tensor, weight_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How many vectors each of K cells has, and their sum."""
        weight_N = weight_N.double()
        counts_K, sums_KD = weight_N.new_zeros(self.size), weight_N.new_zeros(self.size, self.width)
        return counts_K.index_add_(0, cells_N, weight_N), sums_KD.index_add_(0, cells_N, z_ND * weight_N[:, None])

    def stepped(self, sums: dict[str, torch.Tensor]) -> None:
        """Follow what the global batch showed. A dead code takes the vector that alone drew its cell, if one did."""
        decay = self.config.ema
        for held, name in ((self.counts, "counts"), (self.sums, "sums")):
            held.copy_(decay * held.double() + (1 - decay) * sums[name])
        if self.config.dead_below:
            dead_K = (self.counts < self.config.dead_below) & (sums["candidates"] == 1)
            self.counts.masked_fill_(dead_K, self.config.dead_below)
            revived_KD = sums["candidate"] * self._smoothed()[:, None]
            self.sums.copy_(torch.where(dead_K[:, None], revived_KD, self.sums))

    @property
    def _held(self) -> torch.Tensor:
        return self.sums

    def _smoothed(self) -> torch.Tensor:
        """Laplace's counts."""
        total = self.counts.sum()
        return (self.counts + _EPSILON) / (total + self.size * _EPSILON) * total

    def _book(self) -> torch.Tensor:
        book_KD = self.sums / self._smoothed()[:, None]
        return functional.normalize(book_KD, dim=-1) if self.config.normalize else book_KD


_EPSILON = 1e-5


def first_codes(config: CodebookConfig) -> Fill:
    """Of deviation D^-1/2 where codes lie on a sphere or are mixed, else within 1 / K."""
    on_sphere = config.normalize or config.linear
    return normal(config.width**-0.5) if on_sphere else uniform(1 / config.size)
