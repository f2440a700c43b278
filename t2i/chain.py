"""A chain of priors: each draws values that the ones after it may hear; a single prior is its shortest case."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from t2i.pixels import to_pixels
from t2i.priors.asking import PICTURE
from t2i.protocol import Asked, Prior, Start, Tokenizer
from t2i.random import child, keys_of

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

    `brought` always wins. It maps a condition to what it hears, given or not; or a space to values, and the chain
    begins after the last link whose space is brought so; or a space to a Start of the link that draws in it. Else a
    condition that is given a space hears what was drawn last there, or else the encoding of the last picture by the
    tokenizer of that space. A link that stops early leaves the rest to the next one, of the same space, which goes on
    from there and keeps what its Start keeps. Negative prompts are for the links that are guided. Candidate c of link n
    draws from `child(seed, n, c)`, but the first of the first link from the seed, as a prior alone does. ValueError
    where there is nothing to hear, or nobody to go on.
    """
    brought = dict(brought or {})
    whole = {name: values for name, values in brought.items() if isinstance(values, torch.Tensor)}
    first = max((number + 1 for number, link in enumerate(links) if link.id in whole), default=0)
    _check(links, first, brought, negative)
    tokenizers = {link.id: link.tokenizer for link in links if link.tokenizer is not None}
    drawn, picture, left = dict(whole), None, None
    values: torch.Tensor | None = None
    if first:
        values = whole[links[first - 1].id]
        picture = _picture(links[first - 1], values)
    for number, link in enumerate(links[first:], first):
        mine = brought.get(link.id)
        start = _start(mine if isinstance(mine, Start) else None, left)
        columns, heard = _heard(link, told, whole, drawn, picture, tokenizers)
        values = _best(link, number, {**told, **columns}, seeds, heard, start, negative if _guided(link) else ())
        stops = _stops(link)
        left = None if stops is None else Start(values, at=stops, noised=True)
        if left is None:
            drawn[link.id] = values
            decoded = _picture(link, values)
            picture = picture if decoded is None else decoded
    if values is None:
        raise ValueError("A chain has at least one link.")
    return Painted(values, picture)


def _check(
    links: Sequence[Link], first: int, brought: Mapping[str, torch.Tensor | Start], negative: Sequence[str]
) -> None:
    """ValueError, before anything is drawn, for what would be lost."""
    ids = [link.id for link in links]
    if lost := [name for name, start in brought.items() if isinstance(start, Start) and name not in ids]:
        raise ValueError(f"A start in the space '{lost[0]}' was brought, but no link draws there: {', '.join(ids)} do.")
    for number, link in enumerate(links[first:], first + 1):
        if _stops(link) is None:
            continue
        if number == len(links):
            raise ValueError(f"The last link stops at {_stops(link)}, and nobody goes on: leave out its `stops`.")
        if ids[number] != link.id:
            raise ValueError(
                f"A link of the space '{link.id}' stops at {_stops(link)} and leaves the rest to the next one, but "
                f"that draws in the space '{ids[number]}'."
            )
    if negative and links[first:] and not any(map(_guided, links[first:])):
        raise ValueError(
            "Guidance moves away from negative prompts, but no link is guided: raise one's, or leave them."
        )


def _stops(link: Link) -> float | None:
    return getattr(link.sampling, "stops", None)


def _guided(link: Link) -> bool:
    return getattr(link.sampling, "guidance", 1.0) != 1


def _picture(link: Link, values: torch.Tensor) -> torch.Tensor | None:
    """Of a link's values, where its tokenizer decodes."""
    decodes = link.tokenizer is not None and link.tokenizer.decodes
    return link.tokenizer.decode(values) if link.tokenizer is not None and decodes else None


def _start(mine: Start | None, left: Start | None) -> Start | None:
    """Where a link begins: with what the one before left, but what was to be kept is kept, and has no noise in it."""
    if mine is None or left is None:
        return mine or left
    if mine.keep is None:
        return left
    keep = mine.keep.to(left.values.device)
    return replace(left, values=torch.where(keep, mine.values.to(left.values), left.values), keep=keep)


def _heard(
    link: Link,
    told: Mapping[str, list],
    brought: Mapping[str, torch.Tensor],
    drawn: Mapping[str, torch.Tensor],
    picture: torch.Tensor | None,
    tokenizers: Mapping[str, Tokenizer],
) -> tuple[dict[str, list], dict[str, torch.Tensor]]:
    """Columns and values that conditions hear; a picture is the column PICTURE, seen as in training.

    That column may be told, too; it is heard by links before which no picture was drawn.
    """
    columns: dict[str, list] = {}
    heard = {name: values for name, values in brought.items() if link.given.get(name) != PICTURE}
    for condition, space in link.given.items():
        shown = brought.get(condition, picture)
        if space == PICTURE and shown is not None:
            columns[PICTURE] = to_pixels(shown)
        elif condition in heard or (space == PICTURE and PICTURE in told):
            continue
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
        first = number == candidate == 0
        its_seeds = list(seeds) if first else child(keys_of(seeds), "link", number, candidate).tolist()
        asked = link.ask(told, its_seeds, negative, heard)
        values = link.prior.sample(asked, its_seeds, link.sampling, start)
        if link.judge is None:
            return values
        scores = link.judge(values, _picture(link, values), told)
        if best is None:
            best = values, scores
        else:
            better = scores > best[1]
            rows = better.view(-1, *[1] * (values.dim() - 1))
            best = torch.where(rows, values, best[0]), torch.where(better, scores, best[1])
    assert best is not None
    return best[0]
