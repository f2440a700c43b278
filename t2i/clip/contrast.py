"""CLIP's loss (arXiv 2103.00020, figure 3) over the global batch, worked out by whoever holds some of its rows.

Shapes: B own rows, N rows of the global batch in the plan's order, the own from `first` on; D width. Vectors are of
length 1, logits are scale * cosine.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

# Around what every holder of some rows computes for all; `t2i/clip/task.py` has it left out where FLOPs are counted.
again: Callable[[], AbstractContextManager[None]] = nullcontext

LIMIT = math.log(100)  # of the log scale (section 2.5)
FEWEST = 256  # rows that are gone through at once


def contrast(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    images_ND: torch.Tensor,
    texts_ND: torch.Tensor,
    kind_N: torch.Tensor,
    first: int,
    scale: torch.Tensor,
) -> torch.Tensor:
    """The sum over own rows of the mean of two cross-entropies (nats): of the row's text among all, and of its picture.

    Rows whose texts are equal, by `kind_N`, are no wrong partners of each other. Over all who hold rows the values add
    up to the loss of the global batch, and so do the gradients: that of `image_BD` and `text_BD` is the whole loss's,
    in which every row's loss counts, that of `scale` is of the own rows' losses. `images_ND` and `texts_ND` are
    constants, and nobody holds more than B x N logits.
    """
    own = slice(first, first + len(image_BD))
    allowed_BN = _allowed(kind_N, own)
    to_text_BN = (scale * image_BD @ texts_ND.T).masked_fill(~allowed_BN, -torch.inf)
    to_image_BN = (scale * text_BD @ images_ND.T).masked_fill(~allowed_BN, -torch.inf)
    right_B1 = scale * (image_BD * text_BD).sum(1, keepdim=True)
    loss = ((to_text_BN - right_B1).logsumexp(1) + (to_image_BN - right_B1).logsumexp(1)).sum() / 2
    # In the other rows' losses our texts and pictures are among those that they choose from: d logsumexp = softmax.
    with torch.no_grad(), again():
        chosen_text = _chances(to_image_BN, images_ND, texts_ND, kind_N, scale)
        chosen_image = _chances(to_text_BN, texts_ND, images_ND, kind_N, scale)
    fixed = scale.detach()
    among = (chosen_text * (fixed * text_BD @ images_ND.T) + chosen_image * (fixed * image_BD @ texts_ND.T)).sum() / 2
    return loss + (among - among.detach())


def leash(log_scale: torch.Tensor) -> torch.Tensor:
    """0, with the gradient that leads a log scale back to its limit, beyond which the loss has none.

    CLIP clips the scale after each step; but what is trained may lie in parts on several workers (ZeRO).
    """
    pull = (log_scale - LIMIT).clamp(min=0) ** 2 / 2
    return pull - pull.detach()


def _chances(
    logits_BN: torch.Tensor, asking_ND: torch.Tensor, among_ND: torch.Tensor, kind_N: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """(B, N): how likely each of all rows, which are `asking`, takes each own row for its right one of `among`.

    Own rows' logits with those who ask are `logits_BN`. Rows of all are gone through as many at a time as are ours.
    """
    sums_N, at_once = asking_ND.new_empty(len(asking_ND)), max(FEWEST, len(logits_BN))
    for start in range(0, len(asking_ND), at_once):
        some = slice(start, start + at_once)
        logits = (scale * asking_ND[some] @ among_ND.T).masked_fill(~_allowed(kind_N, some), -torch.inf)
        sums_N[some] = logits.logsumexp(1)
    return (logits_BN - sums_N).exp()


def _allowed(kind_N: torch.Tensor, rows: slice) -> torch.Tensor:
    """(rows, N): the row itself, and rows of other texts."""
    place_N = torch.arange(len(kind_N), device=kind_N.device)
    return (kind_N[rows, None] != kind_N) | (place_N[rows, None] == place_N)
