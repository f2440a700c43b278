"""A chain of priors: each draws values that the ones after it may hear; a single prior is its shortest case."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from t2i.pixels import to_pixels
from t2i.protocol import Asked, Prior, Start, Tokenizer
from t2i.random import child, keys_of

PICTURE = "pixels"  # what a condition is given that hears the picture itself
Judge = Callable[[torch.Tensor, torch.Tensor | None, Mapping[str, list]], torch.Tensor]
"""(values, pictures, what was told) of B rows to scores (B,): the candidate with the highest is kept."""


@dataclass(frozen=True)
class Link:
    """A prior, the tokenizer of its values, and how it is asked."""

    prior: Prior
    ask: Callable[..., Asked]  # of `load_prior`
    sampling: Any  # the config of the prior's family
    tokenizer: Tokenizer | None = None  # None: its values are for others to hear
    id: str = ""  # of the tokenizer's artifact: the name of the space
    given: Mapping[str, str] = field(default_factory=dict)  # condition -> id of the space that it hears, or PICTURE
    candidates: int = 1
    judge: Judge | None = None

    def __post_init__(self) -> None:
        if self.candidates < 1 or (self.candidates > 1) != (self.judge is not None):
            raise ValueError("Of several candidates a judge keeps one, and there is at least one.")


class Painted(NamedTuple):
    """What a chain drew."""

    values: torch.Tensor  # (B, *shape) of the last link
    pictures: torch.Tensor | None  # (B, 3, H, W) in [-1, 1]; None where no tokenizer decodes


def paint(
    links: Sequence[Link],
    told: Mapping[str, list],
    seeds: Sequence[int],
    brought: Mapping[str, torch.Tensor | Start] | None = None,
    negative: Sequence[str] = (),
) -> Painted:
    """Run a chain for B rows: `told` holds columns such as `caption`, row b is drawn from `seeds[b]` alone.

    `brought` maps a condition to what it hears, or a space to values, of which the whole chain up to there is then
    skipped, or to a Start of the link that draws in it; it always wins. Else a condition that is given a space hears
    what was drawn last there, or else the encoding of the last picture by the tokenizer of that space. A link that
    stops early leaves the rest to the next one, of the same space. Candidate c of link n draws from
    `child(seed, n, c)`. ValueError where there is nothing to hear.
    """
    brought, drawn, picture, left = dict(brought or {}), {}, None, None
    tokenizers = {link.id: link.tokenizer for link in links if link.tokenizer is not None}
    values: torch.Tensor | None = None
    for number, link in enumerate(links):
        mine = brought.get(link.id)
        if isinstance(mine, torch.Tensor):
            values = mine
        else:
            start = mine if mine is not None else left
            columns, heard = _heard(link, brought, drawn, picture, tokenizers)
            values = _best(link, number, {**told, **columns}, seeds, heard, start, negative)
        stops = getattr(link.sampling, "stops", None)
        left = None if stops is None else Start(values, at=stops, noised=True)
        drawn[link.id] = values
        if left is None and link.tokenizer is not None and link.tokenizer.decodes:
            picture = link.tokenizer.decode(values)
    if values is None:
        raise ValueError("A chain has at least one link.")
    return Painted(values, picture)


def _heard(
    link: Link,
    brought: Mapping[str, torch.Tensor | Start],
    drawn: Mapping[str, torch.Tensor],
    picture: torch.Tensor | None,
    tokenizers: Mapping[str, Tokenizer],
) -> tuple[dict[str, list], dict[str, torch.Tensor]]:
    """Columns and values that the given conditions hear; a picture is the column `pixels`, seen as in training."""
    columns: dict[str, list] = {}
    heard: dict[str, torch.Tensor] = {}
    for condition, space in link.given.items():
        told = brought.get(condition)
        shown = told if isinstance(told, torch.Tensor) else picture
        if space == PICTURE and shown is not None:
            columns[PICTURE] = to_pixels(shown)
        elif isinstance(told, torch.Tensor):
            heard[condition] = told
        elif space in drawn:
            heard[condition] = drawn[space]
        elif picture is not None and space in tokenizers:
            heard[condition] = tokenizers[space].encode(picture)
        else:
            raise ValueError(
                f"The condition '{condition}' hears values of {space}, but nothing was drawn or brought there, nor is "
                "there a picture to encode."
            )
    return columns, heard


def _best(
    link: Link,
    number: int,
    told: Mapping[str, list],
    seeds: Sequence[int],
    heard: Mapping[str, torch.Tensor],
    start: Start | None,
    negative: Sequence[str],
) -> torch.Tensor:
    """The candidate of each row that the judge likes best; of equal ones the first."""
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    for candidate in range(link.candidates):
        its_seeds = child(keys_of(seeds), "link", number, candidate).tolist()
        asked = link.ask(told, its_seeds, negative, heard)
        values = link.prior.sample(asked, its_seeds, link.sampling, start)
        if link.judge is None:
            return values
        decodes = link.tokenizer is not None and link.tokenizer.decodes
        pictures = link.tokenizer.decode(values) if link.tokenizer is not None and decodes else None
        scores = link.judge(values, pictures, told)
        if best is None:
            best = values, scores
        else:
            better = scores > best[1]
            rows = better.view(-1, *[1] * (values.dim() - 1))
            best = torch.where(rows, values, best[0]), torch.where(better, scores, best[1])
    assert best is not None
    return best[0]
