"""Prompts for Shapes that its training does not answer: short ones, long ones, and compositions never shown.

A prompt is held out by construction: of the training scenes of a `ShapesConfig` none says it, and of a compositional
one none has any two of its objects in their relation. Alt texts err, so that one may by chance speak of them.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from infra import strict
from t2i.evaluate import skills
from t2i.evaluate.scenes import BACKGROUNDS, COLORS, COLUMNS, PLACES, SHAPES, SIZES, STYLES, Scene, Thing, describe
from workflows.corpora.shapes import ShapesConfig, draw_scene, scenes_of, split_of

Kind = Literal["short", "long", "compositional"]
TRIES = 200  # scenes that are drawn for each prompt, at most

RELATIONS = {  # by how many rows and columns the second object is after the first
    (0, 1): "left of",
    (1, 0): "above",
    (1, 1): "above and left of",
    (1, -1): "above and right of",
}

Combination = tuple[str, str, str, str, str]
"""Colour and shape of an object, its relation to another, colour and shape of that: red circle above blue square."""


class Asked(NamedTuple):
    """A prompt, and the scene that a picture of it ought to show."""

    prompt: str
    scene: Scene
    kind: Kind


def held_out_prompts(config: ShapesConfig, kind: Kind, count: int = 256, seed: int = 0) -> list[Asked]:
    """`count` prompts with distinct scenes, none of them of training; the same for one config and seed.

    `short`: the shapes and colours of held-out scenes, where no training scene has just these in their order.
    `long`: all facts of held-out scenes of `config.max_objects` objects. `compositional`: all facts of two objects, in
    a `Combination` that no training scene shows, as many of each as of another. ValueError where there are not enough.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, but it is {count}.")
    rng = np.random.default_rng([seed, sorted(_KINDS).index(kind)])
    found: dict[Scene, Asked] = {}
    for scene in itertools.islice(_KINDS[kind](config, rng), TRIES * count):
        style = "short" if kind == "short" else "descriptive"
        found.setdefault(scene, Asked(describe(scene, style), scene, kind))
        if len(found) == count:
            return list(found.values())
    raise ValueError(
        f"Of {count} {kind} prompts {len(found)} were found that the training of these {config.samples} samples holds "
        "nothing of: ask for fewer, or for a corpus of fewer samples or a larger test_fraction."
    )


def combinations(scene: Scene) -> set[Combination]:
    """Of every two objects of a scene, what they are and how they stand to each other."""
    return {
        (one.color, one.shape, _relation(one.place, other.place), other.color, other.shape)
        for one, other in itertools.combinations(scene.objects, 2)  # objects are in the order of PLACES
    }


def prompt_line(asked: Asked) -> dict[str, Any]:
    """The prompt as a line of JSON: GenEval's metadata, the kind its tag, and `scene`, the scene as JSON text."""
    facts = STYLES["short" if asked.kind == "short" else "descriptive"]
    scene = strict.dumps(asked.scene.to_dict())
    return skills.metadata(asked.prompt, asked.scene, asked.kind, facts) | {"scene": scene}


def _relation(place: str, other: str) -> str:
    (row, column), (other_row, other_column) = (divmod(PLACES.index(each), len(COLUMNS)) for each in (place, other))
    return RELATIONS[other_row - row, other_column - column]


def held_out_scenes(config: ShapesConfig, rng: np.random.Generator) -> Iterator[Scene]:
    """Random scenes of the test split, without end; none where no scene is held out."""
    while config.test_fraction:
        scene = draw_scene(rng, config.max_objects)
        if split_of(scene, config.test_fraction) == "test":
            yield scene


def _short(config: ShapesConfig, rng: np.random.Generator) -> Iterator[Scene]:
    said = {describe(scene, "short") for scene in scenes_of(config, "train")}
    prompts = set[str]()
    for scene in held_out_scenes(config, rng):
        prompt = describe(scene, "short")
        if prompt not in said and prompt not in prompts:
            prompts.add(prompt)
            yield scene


def _long(config: ShapesConfig, rng: np.random.Generator) -> Iterator[Scene]:
    return (scene for scene in held_out_scenes(config, rng) if len(scene.objects) == config.max_objects)


def _compositional(config: ShapesConfig, rng: np.random.Generator) -> Iterator[Scene]:
    shown = {each for scene in scenes_of(config, "train") for each in combinations(scene)}
    every = itertools.product(COLORS, SHAPES, RELATIONS.values(), COLORS, SHAPES)
    unseen = [each for each in every if each not in shown] if config.max_objects > 1 else []
    while unseen:
        for number in rng.permutation(len(unseen)):
            yield _scene(unseen[number], rng)


def _scene(combination: Combination, rng: np.random.Generator) -> Scene:
    """Two objects in a combination, of any sizes, in any places that suit it, on any background."""
    color, shape, relation, other_color, other_shape = combination
    suiting = [pair for pair in itertools.combinations(PLACES, 2) if _relation(*pair) == relation]
    place, other_place = suiting[int(rng.integers(len(suiting)))]

    def pick(values: Sequence[str]) -> str:
        return values[int(rng.integers(len(values)))]

    sizes = tuple(SIZES)
    things = (Thing(shape, color, pick(sizes), place), Thing(other_shape, other_color, pick(sizes), other_place))
    return Scene(things, pick(tuple(BACKGROUNDS)))


_KINDS: dict[str, Callable[[ShapesConfig, np.random.Generator], Iterator[Scene]]] = {
    "short": _short,
    "long": _long,
    "compositional": _compositional,
}
