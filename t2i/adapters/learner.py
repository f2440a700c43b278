"""How adapters learn: a prior that is frozen, and what is attached to it."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from t2i.diffusion.prior import DiffusionPrior
from t2i.protocol import Batch, Turn


class Adapter(Protocol):
    """What is trained on a frozen prior. A module.

    Adapters attach in the order of a list: one that copies from the base stands before one that is injected into it.
    """

    def attach(self, prior: DiffusionPrior) -> None:
        """Have the prior hear it (`prior.attach`), or stand within the prior's network."""
        ...

    def begin(self, prior: DiffusionPrior) -> None:
        """Take first weights from the prior, where it begins with some."""
        ...


class Adapted(nn.Module):
    """A frozen prior with adapters; of its checkpoints, what was loaded is no part.

    What an adapter injects into the base is trained; all else of the base stands as it was loaded.
    """

    def __init__(self, base: DiffusionPrior, adapters: Sequence[Adapter]) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adapters = nn.ModuleList(adapters)  # type: ignore[arg-type]
        for adapter in adapters:
            adapter.attach(base)

    @torch.no_grad()
    def begin(self) -> None:
        """Have each adapter take its first weights."""
        for adapter in self.adapters:
            adapter.begin(self.base)  # type: ignore[operator]

    def turns(self) -> list[Turn]:
        """The adapters', as one."""
        return [Turn("adapter", self, rebuilt=("base",))]

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The base's."""
        return self.base.targets(batch)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The base's losses, with what is attached."""
        return self.base(batch)
