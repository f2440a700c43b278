"""What is true of a picture whose scene is known, as a set of short texts: what an extractor learns to see."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np


def facts_of(scene: str) -> tuple[str, ...]:
    """The facts of a scene as corpora store it, JSON; ValueError for one of another kind.

    Of Shapes each attribute at its place ("top left red") and the background; of NLVR's boxes, whose order nobody
    knows, how many objects of each colour, shape and size there are at least ("2 black", "1 black").
    """
    told = json.loads(scene)
    try:
        if isinstance(told, dict):
            things = told["objects"]
            each = [f"{thing['place']} {thing[name]}" for thing in things for name in ("shape", "color", "size")]
            return (*sorted(each), f"background {told['background']}")
        return tuple(sorted(_counted([thing for box in told for thing in box])))
    except (KeyError, TypeError) as error:
        raise ValueError(f"A scene has objects with their attributes, but this lacks {error}: {scene[:80]}") from None


def vocabulary(scenes: Sequence[str], least: int = 10) -> tuple[str, ...]:
    """The facts of at least `least` scenes, in alphabetical order; rarer ones teach nothing.

    ValueError where there are none: nothing says then what a picture shows.
    """
    counts = Counter(fact for scene in scenes for fact in facts_of(scene))
    known = tuple(sorted(fact for fact, count in counts.items() if count >= least))
    if not known:
        raise ValueError(f"None of {len(scenes):,} scenes has a fact in common with {least - 1} others.")
    return known


def marked(scenes: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """(B, facts) float32: 1 where a fact holds of a scene."""
    place = {fact: number for number, fact in enumerate(known)}
    marks = np.zeros((len(scenes), len(known)), np.float32)
    for row, scene in zip(marks, scenes, strict=True):
        row[[place[fact] for fact in facts_of(scene) if fact in place]] = 1
    return marks


def _counted(things: Sequence[dict[str, Any]]) -> list[str]:
    words = Counter(thing[name] for thing in things for name in ("shape", "color", "size"))
    return [f"{number} {word}" for word, count in words.items() for number in range(1, count + 1)]
