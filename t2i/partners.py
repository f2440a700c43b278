"""Rows that see each other: what all rows of the global batch show, and partners among them.

Shapes: B rows of this micro-batch, N rows of weight above 0 of the global batch, in the plan's order on any number of
workers.
"""

from collections.abc import Callable, Mapping

import torch

from t2i.protocol import Batch

Gather = Callable[..., dict[str, torch.Tensor]]  # `world.rows` of the loop
SEEN = "all_"  # a batch whose columns have this prefix brings the rows of the whole global batch with it


def alone(columns: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gathering of one process: its rows of weight above 0, which begin at 0."""
    there = columns["weight"] > 0
    return {**{name: column[there] for name, column in columns.items()}, "first": torch.tensor([0])}


def seen(batch: Batch, shown: Mapping[str, torch.Tensor], gather: Gather) -> dict[str, torch.Tensor]:
    """Columns (N, ...) of all rows, and `first`, where the batch's own begin: brought by the loop, else gathered."""
    brought = {name.removeprefix(SEEN): column for name, column in batch.items() if name.startswith(SEEN)}
    return brought or gather({name: column.detach() for name, column in shown.items()})


def mismatched(texts_ND: torch.Tensor, draws_N: torch.Tensor) -> torch.Tensor:
    """(N,) int64: for each row another one, of another text, by its draw in [0, 1); -1 where all texts are equal."""
    kind_N = texts_ND.flatten(1).unique(dim=0, return_inverse=True)[1]
    other_NN = kind_N[:, None] != kind_N[None]
    count_N = other_NN.sum(1)
    rank_N = (draws_N * count_N).long().clamp(max=(count_N - 1).clamp(min=0))
    place_NN = other_NN.cumsum(1) - 1
    chosen_N = (other_NN & (place_NN == rank_N[:, None])).long().argmax(1)
    return torch.where(count_N > 0, chosen_N, -1)


def partners(batch: Batch, column: str, salt: str, gather: Gather) -> tuple[torch.Tensor, torch.Tensor]:
    """The text (B, D) of each row's partner, and whether (B,) it has one; rows of weight 0 have none.

    The batch has `column`, the texts, and `salt`, the draws; `shown` says what a survey is to be given.
    """
    every = seen(batch, shown(batch, column, salt), gather)
    there_B = batch["weight"] > 0
    first = int(every["first"])
    partner_K = mismatched(every[column], every[salt])[first : first + int(there_B.sum())]
    partner_B = torch.full((len(there_B),), -1, device=there_B.device)
    partner_B[there_B] = partner_K
    has_B, theirs = partner_B >= 0, every[column][partner_B.clamp(min=0)]
    return torch.where(has_B.view(-1, *[1] * (theirs.dim() - 1)), theirs, batch[column]), has_B


def shown(batch: Batch, column: str, salt: str) -> dict[str, torch.Tensor]:
    """What each row shows of itself."""
    return {name: batch[name] for name in ("weight", column, salt)}
