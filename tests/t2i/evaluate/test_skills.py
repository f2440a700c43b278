"""Skills in closed form, what each is blind to, and lines that GenEval's own summary can read."""

import itertools
import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given

from t2i.evaluate.scenes import COLUMNS, PLACES, ROWS, STYLES, UNKNOWN, Scene, Thing, describe, read_many
from t2i.evaluate.skills import SKILLS, asked_for, judge, metadata, result, skill_scores
from tests.t2i.evaluate.test_scenes import ONE, TWO, some_scenes
from workflows.corpora.shapes import draw_scene, render

CIRCLE, SQUARE = TWO.objects


def changed(thing, **values):
    return Thing(**{**vars(thing), **values})


def shares(judged):
    return {name: (judged.right[name], judged.asked[name]) for name in judged.asked}


@given(some_scenes())
def test_a_scene_shows_itself(scene):
    judged = judge(scene, scene)
    assert judged.correct
    assert judged.right == judged.asked
    assert judged.reason == ""
    n = len(scene.objects)
    assert set(judged.asked) == set(SKILLS)
    gaps = [(a.place, b.place) for a, b in itertools.combinations(scene.objects, 2)]
    apart = sum(sum(x != y for x, y in zip(a.split(), b.split(), strict=True)) for a, b in gaps)
    assert judged.asked == {**dict.fromkeys(SKILLS, n), "counts": 1, "relations": apart, "background": 1}


@given(some_scenes(), some_scenes())
def test_skills_count_within_bounds_and_whole_objects_are_those_in_common(seen, wanted):
    judged = judge(seen, wanted)
    assert all(0 <= judged.right[name] <= judged.asked[name] for name in judged.asked)
    assert judged.whole == len(set(seen.objects) & set(wanted.objects))
    assert judged.correct == (seen.objects == wanted.objects)
    assert bool(judged.reason) == (seen != wanted)
    assert judged.whole <= min(judged.right[name] for name in ("objects", "shapes", "colors", "sizes", "places"))
    short = judge(seen, wanted, STYLES["short"])
    looks = [Counter((thing.shape, thing.color) for thing in scene.objects) for scene in (seen, wanted)]
    assert short.whole == short.right["objects"] == (looks[0] & looks[1]).total()
    assert short.correct == (looks[0] == looks[1])


@pytest.mark.parametrize(
    ("seen", "wrong"),
    [  # of a large red circle at the top left and a small blue square at the bottom right, on white
        (Scene((changed(CIRCLE, color="green"), SQUARE), "white"), {"objects": 1, "colors": 1}),
        (Scene((changed(CIRCLE, shape="cross"), SQUARE), "white"), {"objects": 1, "shapes": 1, "relations": 2}),
        (Scene((changed(CIRCLE, size="small"), SQUARE), "white"), {"objects": 1, "sizes": 1}),
        (Scene((changed(CIRCLE, place="top right"), SQUARE), "white"), {"places": 1, "relations": 1}),
        (Scene((changed(CIRCLE, color="blue"), changed(SQUARE, color="red")), "white"), {"objects": 2, "colors": 2}),
        (
            Scene((changed(CIRCLE, place="bottom right"), changed(SQUARE, place="top left")), "white"),
            {"places": 2, "relations": 2},
        ),
        (Scene(TWO.objects, "black"), {"background": 1}),
        (
            Scene((*TWO.objects, Thing(UNKNOWN, UNKNOWN, UNKNOWN, "top right")), "white"),
            {"counts": 1},
        ),
        (
            ONE,
            {"objects": 1, "shapes": 1, "colors": 1, "sizes": 1, "places": 1, "counts": 1, "relations": 2},
        ),
        (Scene((), UNKNOWN), {**dict.fromkeys(SKILLS, 2), "counts": 1, "background": 1}),
    ],
    ids=["color", "shape", "size", "place", "colors swapped", "places swapped", "background", "extra", "lost", "empty"],
)
def test_what_is_wrong_costs_its_own_skill(seen, wrong):
    judged = judge(seen, TWO)
    assert {name: judged.asked[name] - judged.right[name] for name in SKILLS} == {**dict.fromkeys(SKILLS, 0), **wrong}
    assert judged.correct == (wrong == {"background": 1})


def test_a_short_prompt_asks_for_no_places():
    moved = Scene((changed(CIRCLE, place="bottom left", size="small"), changed(SQUARE, place="top left")), "black")
    judged = judge(moved, TWO, asked_for("a red circle and a blue square", TWO))
    assert judged.correct
    assert shares(judged) == {"objects": (2, 2), "shapes": (2, 2), "colors": (2, 2), "counts": (1, 1)}
    assert asked_for(describe(TWO), TWO) == asked_for("IMG_1.jpg", TWO) == STYLES["descriptive"]


def test_scores_are_shares_with_intervals():
    swapped = Scene(tuple(changed(thing, color="green") for thing in TWO.objects), "white")
    extra = Scene((*TWO.objects, Thing(UNKNOWN, UNKNOWN, UNKNOWN, "top right")), "black")
    judged = [judge(seen, TWO) for seen in (TWO, ONE, swapped, extra)]
    scores = skill_scores(judged)
    assert {name: each.value for name, each in scores.items()} == {
        "scene_score": 1 / 4,
        "object_score": 5 / 8,
        "skill_objects": 5 / 8,
        "skill_shapes": 7 / 8,
        "skill_colors": 5 / 8,
        "skill_sizes": 7 / 8,
        "skill_counts": 1 / 2,
        "skill_places": 7 / 8,
        "skill_relations": 6 / 8,
        "skill_background": 3 / 4,
    }
    for each in scores.values():
        assert each.interval[0] <= each.value <= each.interval[1]
        assert each.n == 4
    assert "skill_relations" not in skill_scores([judge(ONE, ONE)])  # one object stands in none
    with pytest.raises(ValueError, match="at least one picture"):
        skill_scores([])


def test_metadata_says_what_is_asked_for():
    twin = Scene(
        (CIRCLE, changed(CIRCLE, place="top right", size="small"), changed(SQUARE, place="bottom left")), "gray"
    )
    told = metadata("p", twin, "", STYLES["short"])
    assert told["tag"] == "three_object"
    assert told["include"] == [
        {"class": "circle", "color": "red", "count": 2},
        {"class": "square", "color": "blue", "count": 1},
    ]
    assert {each["class"]: each["count"] for each in told["exclude"]} == {
        **dict.fromkeys(("triangle", "diamond", "cross"), 1),
        "circle": 3,
        "square": 2,
    }
    whole = metadata("p", twin, "long")
    assert whole["tag"] == "long"
    assert whole["include"][0] == {"class": "circle", "color": "red", "size": "large", "place": "top left", "count": 1}


def test_lines_are_read_as_geneval_reads_them(tmp_path):
    """What its `summary_scores.py` computes of the file."""
    rng = np.random.default_rng(0)
    wanted = [draw_scene(rng) for _ in range(12)]
    drawn = [draw_scene(rng) if number % 3 == 0 else scene for number, scene in enumerate(wanted)]
    seen = read_many(np.stack([render(scene, (32, 32)) for scene in drawn]))
    lines = []
    for number, (got, want) in enumerate(zip(seen, wanted, strict=True)):
        lines.append(result(f"{number}.png", metadata(describe(want), want), got, judge(got, want)))
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = pd.read_json(path, orient="records", lines=True)
    assert table["correct"].mean() == pytest.approx(8 / 12)
    assert len(table.groupby("metadata")) == 12
    assert set(table["tag"]) <= {"single_object", "two_object", "three_object"}
    first = table.iloc[0]
    assert not first["correct"]
    assert first["reason"].startswith("expected a")
    assert json.loads(first["metadata"])["prompt"] == first["prompt"]
    assert {each["place"] for found in json.loads(first["details"]).values() for each in found} <= set(PLACES)
    assert [line["skills"]["counts"] for line in lines[1:3]] == [[1, 1], [1, 1]]


def test_all_scenes_of_a_reader_can_be_judged():
    unknown = Scene(tuple(Thing(UNKNOWN, UNKNOWN, UNKNOWN, place) for place in PLACES), UNKNOWN)
    full = Scene(tuple(changed(CIRCLE, place=place) for place in PLACES), "white")
    judged = judge(unknown, full)
    assert judged.right == {**dict.fromkeys(SKILLS, 0), "places": 4, "counts": 1}
    assert judge(full, full).asked["relations"] == 2 * len(ROWS) * len(COLUMNS)
    assert judge(full, Scene((), "white")).asked["objects"] == 0
