"""How a prior is asked: columns, prompts and values as its conditions hear them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from t2i.protocol import Asked, ConditionConfig, Rows
from t2i.random import keys_of

CAPTION = "caption"  # what a condition reads that hears the caption
PICTURE = "pixels"  # what it reads, and is given, that hears the picture itself


@dataclass(frozen=True)
class Asking:
    """The conditions of a prior, and how each makes arrays of columns."""

    conditions: tuple[ConditionConfig, ...]
    rows: tuple[Rows, ...]
    given: Mapping[str, str] = field(default_factory=dict)  # as a `Link` of a chain has it

    @property
    def reads(self) -> tuple[str, ...]:
        """All columns that its conditions hear of; those with a mark at the end may lack."""
        return tuple(dict.fromkeys(name for condition in self.conditions for name in condition.reads))

    def without(self, given: Collection[str]) -> "Asking":
        """Of the conditions but those that are `given` values, by their names."""
        left = [pair for pair in self._pairs if pair[0].name not in given]
        return Asking(tuple(condition for condition, _ in left), tuple(rows for _, rows in left))

    def check(self, columns: Collection[str]) -> None:
        """ValueError where a condition hears of a column that nobody told."""
        for condition in self.conditions:
            if missing := [name for name in condition.reads if not (name.endswith("?") or name in columns)]:
                raise ValueError(
                    f"The condition '{condition.name}' of this prior hears of '{missing[0]}', which nobody told: there "
                    f"is {', '.join(columns) or 'nothing'}."
                )

    def __call__(
        self,
        told: Mapping[str, list],
        seeds: Sequence[int],
        negative: Sequence[str] = (),
        given: Mapping[str, torch.Tensor] | None = None,
    ) -> Asked:
        """What is asked: columns such as `caption` or `pixels`, with a value a seed.

        `negative` prompts, one a seed, stand where guidance else puts the nulls of the captions. A condition that is
        `given` values, by its name, hears these, and no columns. Nothing is corrupted by draw, as it is in training.
        ValueError where a condition hears of a column that nobody told.
        """
        given = dict(given or {})
        for name, column in {**told, **({"the negative prompts": negative} if negative else {})}.items():
            if len(column) != len(seeds):
                raise ValueError(f"{len(seeds)} pictures are asked for, but of '{name}' there are {len(column)}.")
        heard = self.without(given)
        hearing = heard.without([each.name for each in heard.conditions if CAPTION not in each.reads])
        if negative and not hearing.conditions:
            raise ValueError("A negative prompt was given, but this prior hears no captions.")
        batch = heard._arrays(told)
        without = hearing._arrays({CAPTION: list(negative)}) if negative else {}
        negated = frozenset(condition.name for condition in hearing.conditions) if negative else frozenset[str]()
        return Asked(len(seeds), {"noise_key": keys_of(seeds), **given, **batch}, without, negated)

    @property
    def _pairs(self) -> list[tuple[ConditionConfig, Rows]]:
        return list(zip(self.conditions, self.rows, strict=True))

    def _arrays(self, columns: Mapping[str, list]) -> dict[str, torch.Tensor]:
        self.check(columns)
        arrays: dict[str, np.ndarray] = {}
        for rows in self.rows:
            arrays |= rows(columns, None)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
