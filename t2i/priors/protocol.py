"""What every text-to-image prior offers: named losses, and codes for a caption."""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a picture is drawn from a prior."""

    guidance: float = 1.0  # classifier-free guidance (arXiv 2207.12598): 1 is the plain conditional
    temperature: float = 1.0  # 0 always takes the likeliest code
    top_k: int = 0  # draw among the k likeliest codes; 0 is no limit
    top_p: float = 1.0  # draw among the likeliest codes that hold this probability (arXiv 1904.09751)

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError("The temperature and top_k must not be negative.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], but it is {self.top_p}.")
