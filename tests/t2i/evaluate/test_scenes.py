"""Scenes survive the way into words and pixels and back, and their scores cannot be flattered."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from t2i.evaluate.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    UNKNOWN,
    ParsedScene,
    ParsedThing,
    Scene,
    Thing,
    caption_scores,
    describe,
    parse,
    phrase,
    read,
    read_many,
)
from workflows.corpora.shapes import draw_scene, render

ONE = Scene((Thing("circle", "red", "large", "top left"),), "white")
TWO = Scene((*ONE.objects, Thing("square", "blue", "small", "bottom right")), "white")


@st.composite
def some_scenes(draw):
    places = draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=3, unique=True))
    shape, color, size = st.sampled_from(SHAPES), st.sampled_from(tuple(COLORS)), st.sampled_from(tuple(SIZES))
    things = tuple(Thing(draw(shape), draw(color), draw(size), place) for place in places)
    return Scene(things, draw(st.sampled_from(tuple(BACKGROUNDS))))


def pictures(count, size, seed=0):
    rng = np.random.default_rng(seed)
    wanted = [draw_scene(rng) for _ in range(count)]
    return wanted, np.stack([render(scene, size, rng) for scene in wanted])


def attributes_right(wanted, seen):
    """The share of all shapes, colours, sizes, places and backgrounds, an extra object counting as four wrong ones."""
    right = total = 0
    for got, want in zip(seen, wanted, strict=True):
        standing = {thing.place: vars(thing) for thing in got.objects}
        for thing in want.objects:
            there = standing.pop(thing.place, {})
            right += sum(there.get(name) == getattr(thing, name) for name in ATTRIBUTES)
        right += (got.background == want.background) - 4 * len(standing)
        total += 4 * len(want.objects) + 1
    return right / total


# ---- Scenes and words


@given(some_scenes())
def test_a_scene_survives_json_and_its_caption(scene):
    assert Scene.from_dict(scene.to_dict()) == scene
    said = parse(describe(scene))
    assert said == ParsedScene(tuple(ParsedThing(**vars(thing)) for thing in scene.objects), scene.background)
    short = parse(describe(scene, "short"))
    assert [(t.shape, t.color, t.size, t.place) for t in short.objects] == [
        (t.shape, t.color, None, None) for t in scene.objects
    ]
    assert len(describe(scene).replace(",", " ,").split()) <= 34


def test_captions_read_well():
    assert describe(TWO) == (
        "a large red circle at the top left, a small blue square at the bottom right, on a white background"
    )
    assert describe(TWO, "short") == "a red circle and a blue square"
    orange = Thing("cross", "orange", "small", "top right")
    assert describe(Scene((*TWO.objects, orange), "gray"), "short") == (
        "a red circle, an orange cross and a blue square"
    )


some_words = st.sampled_from([*SHAPES, *COLORS, *BACKGROUNDS, *SIZES, "top", "left", "right", "background", "a", "and"])


@given(st.one_of(st.text(), st.lists(some_words).map(" ".join), st.none()))
def test_any_text_can_be_parsed_and_what_was_understood_can_be_said_again(text):
    said = parse(text)
    again = parse(phrase(said))
    assert sum(thing.shape is not None for thing in said.objects) == sum(t.shape is not None for t in again.objects)


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("IMG_2041.jpg", ParsedScene()),
        ("red_circle-3.png", ParsedScene((ParsedThing("circle", "red"),))),
        ("two big circles, grey background", ParsedScene((ParsedThing("circle", None, "large"),), "gray")),
        ("a large red at the top left", ParsedScene((ParsedThing(None, "red", "large", "top left"),))),
        ("Upper left: a red, large circle!", ParsedScene((ParsedThing("circle", "red", "large", "top left"),))),
        (
            "a large red circle at the top left, a small bl",
            ParsedScene((ParsedThing("circle", "red", "large", "top left"),)),
        ),
        ("on a white background on a black background", ParsedScene((), "white")),
    ],
)
def test_what_captions_say(caption, said):
    assert parse(caption) == said


def test_scenes_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="share a place"):
        Scene((ONE.objects[0], Thing("cross", "blue", "small", "top left")), "white")
    with pytest.raises(ValueError, match="shape is 'star'"):
        Thing("star", "red", "large", "top left")
    with pytest.raises(ValueError, match="background is 'red'"):
        Scene((), "red")
    with pytest.raises(ValueError, match="uint8"):
        read(np.zeros((32, 32, 3), np.float32))
    with pytest.raises(ValueError, match="too small"):
        read(np.zeros((8, 8, 3), np.uint8))


# ---- Scenes and pixels


@pytest.mark.parametrize(
    ("size", "least"),
    [
        ((32, 32), 0.999),
        ((64, 64), 0.999),
        ((48, 64), 0.999),
        ((100, 400), 0.999),
        ((24, 24), 0.999),
        ((33, 37), 0.999),
    ],
)
def test_the_reader_reads_what_the_renderer_draws(size, least):
    wanted, images = pictures(2_000 if max(size) < 100 else 300, size)
    assert attributes_right(wanted, read_many(images)) >= least
    assert read(images[0]) == wanted[0]


def blur(radius):
    return lambda image, rng: Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius))


def noise(sigma):
    return lambda image, rng: np.clip(image + rng.normal(0, sigma, image.shape), 0, 255)


def jpeg(quality):
    def squeeze(image, rng):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return Image.open(file)

    return squeeze


@pytest.mark.parametrize(
    ("harm", "least"),
    [
        (blur(0.5), 0.999),
        (blur(0.8), 0.98),
        (blur(1.0), 0.94),
        (noise(10), 0.999),
        (noise(20), 0.99),
        (jpeg(75), 0.93),
        (jpeg(50), 0.82),
        (lambda image, rng: 128 + (image - 128.0) * 0.8, 0.999),
    ],
    ids=["blur 0.5", "blur 0.8", "blur 1", "noise 10", "noise 20", "jpeg 75", "jpeg 50", "faded"],
)
def test_mild_harm_at_32_pixels_costs_little(harm, least):
    wanted, images = pictures(500, (32, 32))
    rng = np.random.default_rng(1)
    harmed = np.stack([np.asarray(harm(image, rng)).astype(np.uint8) for image in images])
    assert attributes_right(wanted, read_many(harmed)) >= least


def unknown_share(images):
    things = [thing for scene in read_many(np.stack(images)) for thing in scene.objects]
    return sum(UNKNOWN in vars(thing).values() for thing in things) / len(things)


def test_plain_pictures_are_empty():
    for name, color in BACKGROUNDS.items():
        assert read(np.full((32, 32, 3), color, np.uint8)) == Scene((), name)
    assert read(np.full((32, 32, 3), COLORS["red"], np.uint8)) == Scene((), UNKNOWN)


def test_an_object_across_cells_or_cut_in_half_is_not_known():
    rng = np.random.default_rng(0)
    images = [render(Scene((draw_scene(rng).objects[0],), "black"), (32, 32)) for _ in range(200)]
    assert unknown_share([np.roll(image, (8, 8), (0, 1)) for image in images]) == 1
    halves = [image.copy() for image in images]
    for half in halves:
        half[:, 8:16] = half[:, 24:] = 0
    assert unknown_share(halves) > 0.95


def test_a_second_blob_in_a_cell_and_holes_are_not_forgiven():
    image = render(TWO, (32, 32))
    assert read(image) == TWO
    spotted, holed, extra = image.copy(), image.copy(), image.copy()
    spotted[16:20, 16:20] = COLORS["green"]
    holed[6:10, 6:10] = 255
    extra[22:26, 5:8] = COLORS["pink"]
    assert [thing.shape for thing in read(spotted).objects] == ["circle", UNKNOWN]
    assert [thing.shape for thing in read(holed).objects] == [UNKNOWN, "square"]
    assert [thing.place for thing in read(extra).objects] == ["top left", "bottom left", "bottom right"]


def test_static_is_full_of_unknown_things():
    images = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3)).astype(np.uint8)
    assert all(len(scene.objects) == len(PLACES) for scene in read_many(images))
    assert unknown_share(list(images)) == 1


# ---- Scores


def test_perfect_captions_score_one():
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng) for _ in range(100)]
    for style in ("short", "descriptive"):
        scores = caption_scores([describe(scene, style) for scene in scenes], scenes, style)
        assert scores == {"precision": 1, "recall": 1, "f1": 1}


@pytest.mark.parametrize(
    ("caption", "right", "said"),
    [  # of 9 true facts
        (None, 0, 0),
        ("IMG_1.jpg", 0, 0),
        ("on a white background", 1, 1),
        ("a large red circle at the top left", 4, 4),
        ("a circle and a square", 2, 2),
        (describe(TWO).replace("red", "x").replace("blue", "red").replace("x", "blue"), 7, 9),
        (describe(TWO) + " and a small green cross at the top right", 9, 13),
        (describe(TWO) + ", " + describe(TWO), 9, 17),
    ],
)
def test_caption_scores_in_closed_form(caption, right, said):
    scores = caption_scores([caption], [TWO])
    assert scores["precision"] == pytest.approx(right / max(said, 1))
    assert scores["recall"] == pytest.approx(right / 9)
    assert scores["f1"] == pytest.approx(2 * right / (9 + said))


def test_short_scores_count_shape_and_color_only():
    caption = "a small red circle at the bottom left and a square"
    assert caption_scores([caption], [TWO], "short") == pytest.approx({"precision": 1, "recall": 3 / 4, "f1": 6 / 7})


def test_scores_need_something_to_score():
    with pytest.raises(ValueError, match="found 1 captions, 0 scenes"):
        caption_scores(["a circle"], [])
