"""The trained encoder of a prior's condition as a tokenizer, so that another prior can draw what that one hears."""

import torch
from torch import nn

from t2i.conditions.encoded import Encoded
from t2i.protocol import Space


class FromCondition(nn.Module):
    """Pictures to the values of an encoding condition. There is no way back but the prior that hears them."""

    decodes = False

    def __init__(self, prior: nn.Module, name: str) -> None:
        super().__init__()
        condition = prior.get_submodule("conditions.each")[name]  # type: ignore[index]
        if not isinstance(condition, Encoded):
            raise ValueError(
                f"The condition '{name}' has no encoder that was trained: it is a {type(condition).__name__}."
            )
        self.condition = condition

    def space(self, size: tuple[int, int]) -> Space:
        """The space of the encoder's values, which pictures of every size are brought to."""
        return self.condition.values

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Values (B, *shape) of images (B, 3, H, W) in [-1, 1]."""
        return self.condition.encode(images)

    def decode(self, values: torch.Tensor) -> torch.Tensor:
        """ValueError: it does not decode."""
        raise ValueError("The encoder of a condition does not decode: draw with the prior that hears its values.")
