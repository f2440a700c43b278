"""What a picture shows of the scene that was asked for, skill by skill, in the lines that GenEval writes.

Skills: `objects` (shape, colour and size together, wherever it stands), `shapes`, `colors`, `sizes`, `places`, `counts`
(as many objects as were asked for, a picture), `relations` (left or right of, above or below, two objects a time) and
`background`. A prompt that is silent of a fact does not ask for it.
"""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from t2i.evaluate import intervals, scenes
from t2i.evaluate.intervals import Estimate
from t2i.evaluate.scenes import ATTRIBUTES, COLUMNS, PLACES, SHAPES, STYLES, ParsedThing, Scene, Thing

SKILLS = ("objects", "shapes", "colors", "sizes", "counts", "places", "relations", "background")
TAGS = ("no_object", "single_object", "two_object", "three_object", "four_object")  # by how many are asked for

Pair = tuple[Thing, Thing | None]  # what was asked for, and what stands for it


@dataclass(frozen=True)
class Judged:
    """One picture: how many facts of each skill were asked for, and how many are right."""

    correct: bool  # every object right in all that was asked for, and nothing else there; any background
    whole: int  # objects that are right in all that was asked for
    wanted: int
    right: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    reason: str = ""  # what is wrong, a line each


def asked_for(prompt: str, scene: Scene) -> tuple[str, ...]:
    """The facts that a prompt asks for: those of the style in which it says the scene; all, if it says it in none."""
    styles = [style for style in STYLES if scenes.describe(scene, style) == prompt]
    return STYLES[styles[0]] if styles else STYLES["descriptive"]


def judge(seen: Scene, wanted: Scene, facts: Sequence[str] = STYLES["descriptive"]) -> Judged:
    """A picture, read by `scenes.read_many`, against the scene and the facts of it that were asked for.

    Wanted objects are paired one to one with those that are seen: so that most are wholly right, then most facts, then
    most shapes. So two objects that changed colours are two wrong colours, and no wrong shape.
    """
    names = [name for name in ATTRIBUTES if name in facts]
    pairs = _paired(seen.objects, wanted.objects, names)
    agree = {name: sum(_equal(pair, [name]) for pair in pairs) for name in names}
    whole = sum(_equal(pair, names) for pair in pairs)
    looks = [name for name in names if name != "place"]
    right = {"objects": sum(_equal(pair, looks) for pair in pairs)}
    right |= {f"{name}s": agree[name] for name in names}
    asked = dict.fromkeys(right, len(pairs))
    right["counts"], asked["counts"] = int(len(seen.objects) == len(wanted.objects)), 1
    if "place" in names:
        held = [_held(*both) for both in itertools.combinations(pairs, 2)]
        right["relations"], asked["relations"] = sum(map(sum, held)), sum(map(len, held))
    if "background" in facts:
        right["background"], asked["background"] = int(seen.background == wanted.background), 1
    return Judged(
        correct=whole == len(pairs) == len(seen.objects),
        whole=whole,
        wanted=len(pairs),
        right=right,
        asked=asked,
        reason="\n".join(_reasons(seen, wanted, pairs, names, facts)),
    )


def skill_scores(judged: Sequence[Judged]) -> dict[str, Estimate]:
    """`scene_score`, the share of correct pictures, `object_score`, of whole objects, and each `skill_<name>`."""
    return {name: intervals.share(*rows) for name, rows in skill_rows(judged).items()}


def skill_rows(judged: Sequence[Judged]) -> dict[str, tuple[list[int], list[int]]]:
    """What the scores of pictures are shares of: of each picture how much is right, and of how much."""
    if not judged:
        raise ValueError("Scores need at least one picture.")
    rows = {
        "scene_score": ([int(each.correct) for each in judged], [1] * len(judged)),
        "object_score": ([each.whole for each in judged], [each.wanted for each in judged]),
    }
    for skill in SKILLS:
        asked = [each.asked.get(skill, 0) for each in judged]
        rows[f"skill_{skill}"] = ([each.right.get(skill, 0) for each in judged], asked)
    return {name: (right, asked) for name, (right, asked) in rows.items() if any(asked)}


def metadata(prompt: str, scene: Scene, tag: str = "", facts: Sequence[str] = STYLES["descriptive"]) -> dict[str, Any]:
    """What is asked for, as GenEval's `metadata.jsonl` has it: tag, prompt, include and exclude.

    A clause of `include` has `class` (the shape), `count` and, where the prompt asks for it, `color`, `size` and
    `place`; `exclude` says of every shape how many would be too many.
    """
    names = [name for name in ATTRIBUTES if name in facts]
    clauses = Counter(tuple(getattr(thing, name) for name in names) for thing in scene.objects)
    include = [
        {"class" if name == "shape" else name: value for name, value in zip(names, values, strict=True)} | {"count": n}
        for values, n in clauses.items()
    ]
    shapes = Counter(thing.shape for thing in scene.objects)
    exclude = [{"class": shape, "count": shapes[shape] + 1} for shape in SHAPES]
    return {"tag": tag or TAGS[len(scene.objects)], "include": include, "exclude": exclude, "prompt": prompt}


def result(filename: str, told: Mapping[str, Any], seen: Scene, judged: Judged) -> dict[str, Any]:
    """A line of `results.jsonl` as GenEval's `summary_scores.py` reads it, and `skills`: [right, asked] of each."""
    details: dict[str, list[dict[str, str]]] = {}
    for thing in seen.objects:
        details.setdefault(thing.shape, []).append({"color": thing.color, "size": thing.size, "place": thing.place})
    return {
        "filename": filename,
        "tag": told["tag"],
        "prompt": told["prompt"],
        "correct": judged.correct,
        "reason": judged.reason,
        "metadata": json.dumps(told, allow_nan=False),
        "details": json.dumps(details, allow_nan=False),
        "skills": {name: [judged.right[name], asked] for name, asked in judged.asked.items()},
    }


def _paired(seen: Sequence[Thing], wanted: Sequence[Thing], names: Sequence[str]) -> list[Pair]:
    """Each wanted object with what stands for it, or None."""
    there: list[Thing | None] = [*seen, *[None] * max(0, len(wanted) - len(seen))]
    choices = ([*zip(wanted, some, strict=True)] for some in itertools.permutations(there, len(wanted)))

    def right(pairs: list[Pair]) -> list[int]:
        facts = sum(_equal(pair, [name]) for pair in pairs for name in names)
        return [sum(_equal(pair, names) for pair in pairs), facts, sum(_equal(pair, ["shape"]) for pair in pairs)]

    return max(choices, key=right)


def _equal(pair: Pair, names: Sequence[str]) -> bool:
    wanted, there = pair
    return there is not None and all(getattr(there, name) == getattr(wanted, name) for name in names)


def _held(first: Pair, second: Pair) -> list[bool]:
    """Whether two wanted objects stand to each other as asked, for the axes on which they are apart.

    It must be they: objects of other shapes stand in no relation that was asked for.
    """
    found = (0, 0)
    if first[1] and second[1] and _equal(first, ["shape"]) and _equal(second, ["shape"]):
        found = _apart(first[1], second[1])
    return [gap == wanted for gap, wanted in zip(found, _apart(first[0], second[0]), strict=True) if wanted]


def _apart(thing: Thing, other: Thing) -> tuple[int, int]:
    """By how many rows it stands below another, and by how many columns to the right."""
    (row, column), (other_row, other_column) = (
        divmod(PLACES.index(each.place), len(COLUMNS)) for each in (thing, other)
    )
    return row - other_row, column - other_column


def _reasons(
    seen: Scene, wanted: Scene, pairs: Sequence[Pair], names: Sequence[str], facts: Sequence[str]
) -> list[str]:
    found = [
        f"expected {_said(thing, names)}, found {_said(there, names) if there else 'nothing'}"
        for thing, there in pairs
        if not _equal((thing, there), names)
    ]
    if len(seen.objects) != len(wanted.objects):
        found.append(f"expected {len(wanted.objects)} objects, found {len(seen.objects)}")
    if "background" in facts and seen.background != wanted.background:
        found.append(f"expected a {wanted.background} background, found {seen.background}")
    return found


def _said(thing: Thing, names: Sequence[str]) -> str:
    return scenes.phrase(scenes.ParsedScene((ParsedThing(**{name: getattr(thing, name) for name in names}),)))
