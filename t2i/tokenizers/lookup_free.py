"""A code is the signs of its vector: nothing is looked up, and an entropy keeps all codes in use (arXiv 2310.05737).

Shapes: B rows, D bits, h by w grid, P = h * w, G groups of g bits, of 2^g values each.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from t2i.nn.weights import begins, constant
from t2i.tokenizers.autoencoder import Noise, Quantized


@dataclass(frozen=True, kw_only=True)
class LookupFreeConfig:
    """LFQ, the quantizer of MAGVIT-v2 (arXiv 2310.05737, section 3.1)."""

    width: int = 18  # bits: 262,144 codes
    temperature: float = 0.01  # of the softmax over codes whose entropy is taken
    # Bits whose joint distribution is followed: 2 to the power of so many numbers a position. With fewer than `width`
    # the codes' entropy is that of their groups' sum, which it does not exceed.
    group: int = 9
    decay: float = 0.9  # a step, of the average of how often codes are used

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 62 or self.temperature <= 0 or not 0 <= self.decay < 1:
            raise ValueError("Lookup-free codes need 1 to 62 bits, a temperature above 0 and a decay in [0, 1).")
        if not 1 <= self.group <= 16 or self.width % self.group:
            raise ValueError(
                f"A group has 1 to 16 of the bits and divides their number, but {self.width=}, {self.group=}."
            )

    @property
    def size(self) -> int:
        """How many codes there are."""
        return 2**self.width

    @property
    def takes(self) -> int:
        """Channels of what it quantizes."""
        return self.width

    def build(self) -> "LookupFree":
        """The quantizer."""
        return LookupFree(self)


class LookupFree(nn.Module):
    """Signs; bit i of a code is 1 where axis i is above 0. Losses: `commitment` and `entropy`.

    `entropy` (eq. 5) is E[H(q(c | z))] - H(E[q(c | z)]) in nats, with q the softmax of -|z - c|^2 / temperature: each
    position shall be sure of its code, all positions together of none. The second mean is of many positions, in the
    paper those of a batch. Here it is the moving average over steps of the global batch: what a row's loss is then
    depends on no other row, neither on micro-batches nor on workers. With u that average, a row adds E[log u] of its
    own q in place of -H(E[q]), which has the same gradient, and the same value in the mean, where u is up to date.
    """

    losses = ("commitment", "entropy")
    draws = True

    def __init__(self, config: LookupFreeConfig) -> None:
        super().__init__()
        self.config = config
        self.size, self.width = config.size, config.width
        self.usage: torch.Tensor
        self._bits: torch.Tensor
        self.register_buffer("usage", torch.zeros(config.width // config.group, 2**config.group))
        begins(self, usage=constant(2.0**-config.group))
        self.register_buffer("_bits", 2 ** torch.arange(config.width), persistent=False)

    def forward(self, z_BDhw: torch.Tensor, noise: Noise | None = None) -> Quantized:
        """Vectors of -1 and 1, with gradients straight through; with noise, in training, what `stepped` takes."""
        with torch.autocast(z_BDhw.device.type, enabled=False):
            z_BhwD = z_BDhw.permute(0, 2, 3, 1).float()
            above = z_BhwD > 0
            codes = (above * self._bits).sum(-1)
            q_BhwD = above * 2.0 - 1
            commitment = (q_BhwD - z_BhwD).square().flatten(1).mean(1)
            entropy, used_BGV = self._entropy(z_BhwD.flatten(1, 2))
            straight = (z_BhwD + (q_BhwD - z_BhwD).detach()).permute(0, 3, 1, 2).to(z_BDhw.dtype)
            losses = {"commitment": commitment, "entropy": entropy}
            if noise is None:
                return Quantized(straight, codes, losses)
            weight = torch.ones(len(codes), device=codes.device) if noise.weight is None else noise.weight
            seen = {"usage": torch.einsum("b,bgv->gv", weight.double(), used_BGV.detach().double())}
            return Quantized(straight, codes, losses, seen)

    def _entropy(self, z_BPD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss a row, and how a row's positions use the values of each group of bits, on average."""
        # |z - c|^2 is a sum over axes, so q is a product of each axis' sigmoid(4 z / temperature), H a sum.
        logits = 4 / self.config.temperature * z_BPD
        surely, hardly = functional.logsigmoid(logits), functional.logsigmoid(-logits)
        of_each_B = -(surely.exp() * surely + hardly.exp() * hardly).sum(-1).mean(1)
        signs_Vg = (
            torch.arange(self.usage.shape[1], device=z_BPD.device)[:, None] & self._bits[: self.config.group]
        ) > 0
        shape = (*z_BPD.shape[:2], len(self.usage), self.config.group)
        log_q = torch.einsum("bpgi,vi->bpgv", surely.reshape(shape), signs_Vg.float())
        log_q = log_q + torch.einsum("bpgi,vi->bpgv", hardly.reshape(shape), (~signs_Vg).float())
        used_BGV = log_q.exp().mean(1)
        of_all_B = (used_BGV * self.usage.clamp_min(1e-12).log()).sum((1, 2))
        return of_each_B + of_all_B, used_BGV

    def stepped(self, sums: dict[str, torch.Tensor]) -> None:
        """Follow how the global batch used the values."""
        rows = sums["usage"].sum(1, keepdim=True)
        decay = self.config.decay
        self.usage.copy_(torch.where(rows > 0, decay * self.usage + (1 - decay) * sums["usage"] / rows, self.usage))

    def lookup(self, codes_Bhw: torch.Tensor) -> torch.Tensor:
        """Code vectors (B, D, h, w)."""
        return ((codes_Bhw[..., None] & self._bits) > 0).permute(0, 3, 1, 2) * 2.0 - 1
