"""Distances of drawn pictures from real ones, beside what real ones are from each other; never of two yardsticks.

A distance means something only by the extractor whose features it is of and by the pictures that it is from. So both
are named wherever it stands, with the distance of real pictures from other real ones: the floor of what can be reached.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from t2i.evaluate import distances
from t2i.evaluate.intervals import Estimate
from t2i.evaluate.manifold import manifold_scores


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """By what is measured: `rows` real pictures of a corpus, as an extractor sees them, and real against real."""

    corpus: str  # its name and the id of its artifact
    extractor: str  # the id of its artifact
    rows: int  # of each set
    real: dict[str, Estimate]
    yardstick: str = ""  # the artifact that holds both sets; "": these are nobody's

    def demand(self, other: "Yardstick") -> None:
        """ValueError where another one measures by other pictures, by other features, or by other numbers of them."""
        kinds = {"corpus": "corpora", "extractor": "extractors", "rows": "numbers of pictures"}
        for name, what in (kinds | {"yardstick": "yardsticks"}).items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"Distances of two {what} say nothing about each other: {mine} and {theirs}.")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The pictures of one model by one yardstick."""

    name: str
    yardstick: Yardstick
    scores: dict[str, Estimate]


def distances_of(real: np.ndarray, others: np.ndarray) -> dict[str, Estimate]:
    """`fid`, `kid`, `precision`, `recall`, `density` and `coverage` of features (N, D) against real ones (N, D)."""
    if len(real) != len(others):
        raise ValueError(
            f"A distance changes with the number of pictures: give as many as there are real ones, {len(real)}, "
            f"and not {len(others)}."
        )
    return {
        "fid": distances.fid(real, others),
        "kid": distances.kid(real, others),
        **manifold_scores(real, others),
    }


def table(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """A line for real pictures and one for each model, each with yardstick, corpus, extractor, rows; all by one.

    A score has its name, its 95 % interval `<name>_interval`. ValueError where yardsticks differ, or for no model.
    """
    if not measured:
        raise ValueError("A table has at least one model.")
    yardstick = measured[0].yardstick
    for each in measured:
        yardstick.demand(each.yardstick)
    lines = [("real pictures", yardstick.real), *((each.name, each.scores) for each in measured)]
    by = {name: value for name, value in asdict(yardstick).items() if name != "real"}
    return [{"name": name, **by, **_flat(scores)} for name, scores in lines]


def _flat(scores: dict[str, Estimate]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, each in scores.items():
        flat |= {name: each.value, f"{name}_interval": each.interval}
    return flat
