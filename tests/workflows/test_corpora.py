"""Labels of the two real corpora, on rows made like theirs."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workflows.corpora import emoji, nlvr

kinds = st.tuples(st.sampled_from(nlvr.SHAPES), st.sampled_from(nlvr.COLORS), st.sampled_from(nlvr.SIZES))
boxes = st.lists(st.dictionaries(kinds, st.integers(1, 5), max_size=5).map(Counter), min_size=1, max_size=3)


def as_set(scene):
    return sorted(sorted(box.items()) for box in scene)


def item(shape, color, size):
    return {"shape": shape, "color": color, "size": size, "x": 3, "y": 40}


BOXES = [
    [item("square", "yellow", "medium"), item("square", "blue", "medium"), item("square", "yellow", "medium")],
    [item("circle", "black", "large")],
    [item("circle", "black", "large")],
]
META = {"caption_is_true": True, "split": "test", "scene": "12-3", "permutation": 4, "boxes_unordered": BOXES}


@given(boxes)
def test_a_caption_says_its_scene_whole(scene):
    assert as_set(nlvr.parse(nlvr.describe(scene))) == as_set(scene)


@given(boxes, st.randoms(use_true_random=False))
def test_captions_and_scores_know_no_order(scene, random):
    shuffled = random.sample(scene, len(scene))
    assert nlvr.describe(shuffled) == nlvr.describe(scene)
    scores = nlvr.caption_scores([nlvr.describe(shuffled)], [scene])
    assert scores["exact"] == 1
    assert scores["f1"] == (1 if any(scene) else 0)


WORDS = ["one", "two", "box", "boxes", "with", "2", "99", "small", "blue", "square", "circles", "and", "nothing", ","]


@given(st.lists(st.sampled_from(WORDS)))
def test_any_words_can_be_parsed_and_scored(words):
    scores = nlvr.caption_scores([" ".join(words)], [nlvr.read(BOXES)])
    assert 0 <= scores["f1"] <= 1


def test_grammar_is_fixed():
    scene = nlvr.read(BOXES)
    assert nlvr.describe(scene) == (
        "two boxes with 1 large black circle, one box with 1 blue square and 2 yellow squares"
    )
    assert nlvr.summarize(scene) == "2 black and 1 blue and 2 yellow objects"
    assert nlvr.summarize([Counter({("square", "blue", "medium"): 1})]) == "1 blue square"
    assert nlvr.summarize([Counter({("square", "blue", "large"): 3})]) == "3 blue squares"


def test_scores_count_objects_in_the_right_company():
    scene = nlvr.read(BOXES)  # five objects
    caption = "two boxes with 1 large black circle, one box with 2 blue squares and 1 yellow square"
    assert nlvr.caption_scores([caption], [scene]) == pytest.approx(
        {"precision": 4 / 5, "recall": 4 / 5, "f1": 4 / 5, "exact": 0, "n": 1}
    )
    merged = "one box with 2 large black circles and 1 blue square and 2 yellow squares"  # all objects, one box
    assert nlvr.caption_scores([merged], [scene])["recall"] == pytest.approx(3 / 5)
    assert nlvr.caption_scores([None], [scene])["f1"] == 0


def test_an_nlvr_row_is_labelled_by_its_key():
    row = nlvr.label("nlvr-test-12-3-4", "There is a box.", META)
    assert row["split"] == "test"
    assert row["caption_alt"] == "There is a box."
    assert row["reference_descriptive"] == nlvr.describe(nlvr.read(BOXES))
    assert nlvr.read(json.loads(row["scene"])) == nlvr.read(BOXES)
    assert nlvr.label("nlvr-dev-12-3-4", None, META)["split"] == "train"


def test_whether_a_sentence_is_true_leaves_no_trace():
    key = "nlvr-test-12-3-4"
    assert nlvr.label(key, "a", META) == nlvr.label(key, "a", {**META, "caption_is_true": False})
    assert "caption_is_true" not in json.dumps(nlvr.label(key, "a", META))


def test_about_half_of_the_dev_scenes_are_labelled_once():
    rows = {}
    for scene in range(1000):
        for permutation in range(6):
            row = nlvr.label(f"nlvr-dev-{scene}-0-{permutation}", "a", META)
            rows[scene, permutation] = row["reference_descriptive"] is not None
    scenes = Counter(scene for (scene, _), labelled in rows.items() if labelled)
    assert set(scenes.values()) == {1}
    assert 450 < len(scenes) < 580
    chosen = Counter(permutation for (_, permutation), labelled in rows.items() if labelled)
    assert len(chosen) == 6


@pytest.mark.parametrize(("key", "meta"), [("cat-1", META), ("nlvr-dev-1-2-3", {}), ("nlvr-dev-1-2-3", None)])
def test_a_foreign_row_is_refused(key, meta):
    with pytest.raises(ValueError, match="not an NLVR row"):
        nlvr.label(key, "a", meta)


@pytest.mark.parametrize(
    "variants",
    [
        ["1f9d1_200d_1f3eb", "1f468_1f3fd_200d_1f3eb", "1f469_1f3ff_200d_1f3eb"],  # teachers
        ["1f3c4", "1f3c4_1f3fd_200d_2642", "1f3c4_1f3fb", "1f3c4_200d_2640_fe0f"],  # surfers
        ["1f6b6", "1f6b6_200d_27a1", "1f6b6_1f3fb_200d_2640_200d_27a1"],  # walkers
        ["1f46b", "1f46d_1f3fc", "1f469_1f3fd_200d_1f91d_200d_1f468_1f3fb"],  # holding hands
        ["1f48f", "1f468_1f3fc_200d_2764_200d_1f48b_200d_1f468_1f3ff"],  # kisses
        ["1f46a", "1f468_200d_1f469_200d_1f467_200d_1f466"],  # families
        ["1f91d", "1f91d_1f3fb", "1faf1_1f3fb_200d_1faf2_1f3fc"],  # handshakes
        ["1f468", "1f469_1f3fb", "1f9d1", "1f467", "1f474_1f3ff"],  # a person
        ["1f44b", "1f44b_1f3ff"],  # a waving hand
        ["2764", "2764_fe0f"],  # the heart, with a request for colour
    ],
)
def test_variants_of_an_emoji_share_a_side(variants):
    assert len({emoji.base(points) for points in variants}) == 1
    assert len({emoji.label("e", "name", {"codepoints": points})["split"] for points in variants}) == 1


def test_different_emoji_stay_different():
    different = ["2640", "2642", "1f3fb", "1f3ff", "2764", "1f9d1", "1f9d1_200d_1f3eb", "1f9d1_200d_1f680", "1f46a"]
    different += ["1f469_200d_2764_200d_1f468", "1f469_200d_2764_200d_1f48b_200d_1f468", "1f1e9_1f1ea", "0031_20e3"]
    assert len({emoji.base(points) for points in different}) == len(different)


def test_about_a_tenth_of_the_emoji_are_held_out():
    splits = Counter(emoji.label("e", "", {"codepoints": f"{0x1F300 + n:x}"})["split"] for n in range(700))
    assert 0.06 < splits["test"] / 700 < 0.14


def test_an_emoji_has_its_name_and_no_description():
    row = emoji.label("emoji-1f335", "cactus", {"codepoints": "1f335", "aliases": []})
    assert (row["caption_alt"], row["reference_short"]) == ("cactus", "cactus")
    assert row["reference_descriptive"] is None
    assert row["scene"] is None
    with pytest.raises(ValueError, match="codepoints"):
        emoji.label("cat", "a cat", None)
