"""How codes are drawn from what a prior says of them."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a picture's codes are drawn from a prior."""

    guidance: float = 1.0  # classifier-free guidance (arXiv 2207.12598): 1 is the plain conditional
    temperature: float = 1.0  # 0 always takes the likeliest code
    top_k: int = 0  # draw among the k likeliest codes; 0 is no limit
    top_p: float = 1.0  # draw among the likeliest codes that hold this probability (arXiv 1904.09751)
    # The conditions that guidance moves away from; None: those that training dropped.
    guided: tuple[str, ...] | None = field(default=None, metadata={"since": "0.2"})

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError("The temperature and top_k must not be negative.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], but it is {self.top_p}.")


def draw(logits_BK: torch.Tensor, chances_B: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """Codes (B,) from logits (B, K) by inverting the cumulative distribution at `chances_B`, uniform in [0, 1)."""
    if sampling.temperature == 0:
        return logits_BK.argmax(dim=1)
    sorted_BK, order_BK = (logits_BK.double() / sampling.temperature).sort(dim=1, descending=True, stable=True)
    if sampling.top_k:
        sorted_BK[:, sampling.top_k :] = -torch.inf
    shares_BK = sorted_BK.softmax(dim=1)
    cumulative_BK = shares_BK.cumsum(dim=1)
    kept_BK = cumulative_BK - shares_BK < sampling.top_p  # the likeliest is always kept
    mass_B1 = (shares_BK * kept_BK).sum(dim=1, keepdim=True)
    rank_B1 = (cumulative_BK <= chances_B[:, None] * mass_B1).sum(dim=1, keepdim=True)
    return order_BK.gather(1, rank_B1.clamp(max=logits_BK.shape[1] - 1)).squeeze(1)
