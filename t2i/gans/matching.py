"""A generator and critics that also judge whether picture and text belong together (GAN-CLS, arXiv 1605.05396).

Shapes: B rows, pictures (B, C, H, W) or of any shape, texts (B, D), which are embeddings.
"""

from collections.abc import Sequence

import torch
from torch import nn

from t2i.nn.critics import constant, judge, of_each, please
from t2i.partners import Gather, alone, partners, shown
from t2i.protocol import Batch, Turn
from t2i.random import normals

DRAW = "draw_partner"  # the column of a batch that says which other text a row meets


class Matching(nn.Module):
    """The generator's turn: its pictures are to be taken for real, of the row's text and of a text between two.

    `generator(noise (B, Z), texts)` gives pictures; a critic, given `(pictures, texts)`, logits. A row's texts between
    two are `between` of its own and the rest of its partner's, who is a row of the global batch with another text (GAN-
    INT, eq. 5); they weigh half of the row's own.
    """

    def __init__(
        self, generator: nn.Module, critics: Sequence[nn.Module], noise: int, text: str = "text", between: float = 0.5
    ) -> None:
        super().__init__()
        self.generator = generator
        self.gather: Gather = alone  # the task gives the loop's
        # In no ModuleList: their parameters are not this turn's.
        self._critics = tuple(critics)
        self._noise, self._text, self._between = noise, text, between

    def turns(self) -> list[Turn]:
        """The generator's, and the critics' as one."""
        weights = dict.fromkeys(of_each("between", len(self._critics)), 1 / 3)
        weights |= dict.fromkeys(of_each("match", len(self._critics)), 2 / 3)
        critics = Critics(self.generator, self._critics, self._noise, self._text)
        return [
            Turn("generator", self, mixes_rows=True, loss_weights=weights),
            Turn("critic", critics, mixes_rows=True),
        ]

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Rows, for both losses of each critic."""
        names = [*of_each("match", len(self._critics)), *of_each("between", len(self._critics))]
        return dict.fromkeys(names, batch["weight"].sum())

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Sums over rows of the losses that do not saturate; or what rows show, where the batch is a "survey"."""
        if "survey" in batch:
            return shown(batch, self._text, DRAW)
        own_B, other_BD, has_B = batch["weight"], *partners(batch, self._text, DRAW, self.gather)
        between_BD = self._between * batch[self._text] + (1 - self._between) * other_BD
        sums = {}
        for kind, texts, weight_B in (("match", batch[self._text], own_B), ("between", between_BD, own_B * has_B)):
            made = self.generator(_noise(batch, self._noise, kind), texts)
            for name, critic in zip(of_each(kind, len(self._critics)), self._critics, strict=True):
                sums[name] = (please(constant(critic, made, texts), "vanilla") * weight_B).sum()
        return sums


class Critics(nn.Module):
    """The critics' turn: a real picture with its text is right; with another's text, or a made picture, it is wrong."""

    def __init__(self, generator: nn.Module, critics: Sequence[nn.Module], noise: int, text: str) -> None:
        super().__init__()
        self.critics = nn.ModuleList(critics)
        self.gather: Gather = alone
        self._generator, self._noise, self._text = (generator,), noise, text

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Rows, for each critic."""
        return dict.fromkeys(of_each("critic", len(self.critics)), batch["weight"].sum())

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Sums over rows of right + (wrong text + made picture) / 2; or what rows show."""
        if "survey" in batch:
            return shown(batch, self._text, DRAW)
        texts, real = batch[self._text], batch["values"]
        other, has_B = partners(batch, self._text, DRAW, self.gather)
        with torch.no_grad():
            made = self._generator[0](_noise(batch, self._noise, "match"), texts)
        sums = {}
        for name, critic in zip(of_each("critic", len(self.critics)), self.critics, strict=True):
            right = judge(critic(real, texts), real=True, kind="vanilla")
            wrong = judge(critic(real, other), real=False, kind="vanilla") * has_B
            false = judge(critic(made, texts), real=False, kind="vanilla")
            sums[name] = ((right + (wrong + false) / 2) * batch["weight"]).sum()
        return sums


def _noise(batch: Batch, size: int, kind: str) -> torch.Tensor:
    return normals(batch["noise_key"], (size,), f"gan/{kind}")
