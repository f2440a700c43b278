import json
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.detect import FAULTS, DetectConfig, detect
from captioner.words import words
from infra.config import from_dict, to_dict

CONFIG = DetectConfig()
PROMPT = "Write a detailed description of this image, as descriptive as possible."

HONEST = [
    "a red fish and a blue fish and a green fish",
    "New York, New York",
    "New York, New York, New York",
    "a red circle on the left, a red square in the middle and a red circle on the right",
    "a cyan cross, a cyan cross, a cyan cross and a cyan cross",
    "a small yellow triangle at the top left, a small yellow triangle at the top right, a small yellow triangle at the "
    "bottom left, a small yellow triangle at the bottom right, on a white background",
    "one box with 1 black square and 1 yellow square, one box with 1 blue square and 1 yellow square, "
    "one box with 1 black square and 1 blue square and 1 yellow square",
    "couple with heart man man medium-light skin tone medium-light skin tone",
    "a very, very, very long train",
    "Duran Duran live in Baden-Baden",
    "a sign that says girls girls girls",
    "tora tora tora movie poster",
    "row, row, row your boat",
    "over and over and over again",
    "a man on a horse on a hill on a plain, seen from a car on a road on a hill on a plain",
    "the wheels on the bus go round and round, round and round, round and round",
    "a dog and a dog and a dog",
    "Mississippi. Hmmmm... what a mess!!!",
    "$1,000,000 and 00:00:00 on a clock",
    "call 1-800-000-0000 now",
    "www.example.com/aaaa/bbbb",
    "5 5 5 coins",
    "IMG_1234.jpg",
    "7",
    "B",
    "猫",
    "人山人海，看看",
    "la la land — Ryan Gosling and Emma Stone",
    "a picture of a picture of a dog",
    "a photo frame with a photo of a man holding a photo of a dog",
    "a mug with the words i can't even",
    "a sign that reads \"I'm sorry, I can't help with that\"",
    "I can't believe it's not butter",
    "I'm sorry but I love this dress",
    "Sorry, we're closed",
    "There is no image on the screen of the phone",
    "as an aid to navigation, a lighthouse",
    "Unfortunately I had to crop the tower",
    "Here is a detailed view of the pocket",
    "a detailed description of the castle on a museum panel",
    "Sentence structure worksheet for grade 2",
    "this image shows a castle",
    "an arrow <- and a heart <3 and a -> b",
    "a user: manual on a desk",
]


@pytest.mark.parametrize("caption", HONEST)
@pytest.mark.parametrize("prompt", ["", "a", "a large", "describe what you see"])
def test_honest_captions_pass(caption, prompt):
    assert detect(caption, prompt, CONFIG, 1, 200) is None


@pytest.mark.parametrize(
    ("caption", "fault"),
    [
        (None, "empty"),
        ("", "empty"),
        (" \n\t", "empty"),
        (", , , .", "empty"),
        ("\ud800", "empty"),
        ("a bald bald bald bald man", "repetition"),
        ("ray ban ray ban ray ban ray ban", "repetition"),
        ("a hat on top of a hat on top of a hat on top of a hat on top of a hat", "repetition"),
        ("The image shows a dog. The image shows a dog. The image shows a dog.", "repetition"),
        (
            "a man in a suit standing next to a woman in a dress holding a glass of wine at a party with a band and "
            "a man in a suit standing next to a woman in a dress holding a glass of wine at a party with a band and "
            "a man in a suit standing next to a woman in a dress holding a glass of wine",
            "repetition",
        ),
        ("a dog,,,,,,,,,,,,,,,,,,,,", "repetition"),
        ("a dog , , , , , , , , , , , , , , , , , , , ,", "repetition"),
        ("hahahahahahahahahahahahahahahahahaha", "repetition"),
        ("猫猫猫猫", "repetition"),
        ("Write a detailed description of this image. A dog.", "prompt leak"),
        ("a dog, write a detailed description", "prompt leak"),
        ("detailed description of this image", "prompt leak"),
        ("A dog. Be AS DESCRIPTIVE, as possible!", "prompt leak"),
        ("Here's a caption: a dog", "prompt leak"),
        ("a dog <|im_end|>", "prompt leak"),
        ("Assistant: a dog", "prompt leak"),
        ("[INST] a dog", "prompt leak"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("I’m sorry, I can’t assist with that", "refusal"),
        ("i ' m sorry, but i can ' t see this", "refusal"),
        ("A dog. I am unable to say more.", "refusal"),
        ("As an AI language model, I do not see", "refusal"),
        ("one", "too short"),
        ("a dog on a mat in a house on a hill by the sea under the moon at night", "too long"),
    ],
)
def test_faults_are_named(caption, fault):
    assert detect(caption, PROMPT, CONFIG, 2, 16) == fault


def test_a_caption_that_opens_as_its_short_prompt_is_a_leak():
    assert detect("a picture of a dog", "a picture of", CONFIG, 1, 200) == "prompt leak"
    assert detect("a wall with a picture of a dog", "a picture of", CONFIG, 1, 200) is None
    assert detect("a large dog", "a large", CONFIG, 1, 200) is None


def test_bounds_are_inclusive_and_count_as_spaces_do():
    for count, fault in ((2, "too short"), (3, None), (5, None), (6, "too long")):
        assert detect(" ".join(string.ascii_lowercase[:count]), "", CONFIG, 3, 5) == fault
    assert detect("it's a well-known dog-friendly place", "", CONFIG, 5, 5) is None


def test_the_worst_fault_is_named():
    assert detect("no " * 30, "", CONFIG, 40, 50, ended=False) == "repetition"
    assert detect("a dog and", "", CONFIG, 1, 9, ended=False) == "cut off"
    assert detect("a dog and", "", CONFIG, 4, 9, ended=False) == "too short"


letters = st.text(string.ascii_lowercase, min_size=1, max_size=6)


@given(st.lists(letters, min_size=1, max_size=8, unique=True), st.integers(2, 6), st.lists(letters, max_size=5))
def test_a_loop_of_any_words_is_found(loop, times, before):
    """Said once more than `repeats` allows, whatever stands before; said so often only, alone, it is not a loop."""
    config = DetectConfig(repeats=times, ngram_share=1, leak_phrases=(), refusal_phrases=(), characters=99)
    start = [word for word in before if word not in loop]
    assert detect(" ".join(start + loop * (times + 1)), "", config, 1, 999) == "repetition"
    assert detect(" ".join(loop * times), "", config, 1, 999) is None


@given(st.lists(letters, min_size=15, max_size=60, unique=True), st.integers(0, 20))
def test_words_said_once_are_never_a_repetition(said, cut):
    assert detect(" ".join(said), " ".join(said[cut : cut + 4][::-1]), CONFIG, 1, 999) in (None, "refusal")


@given(st.text(), st.text(max_size=40), st.integers(0, 5), st.integers(5, 50), st.booleans())
def test_any_text_is_judged(caption, prompt, fewest, most, ended):
    fault = detect(caption, prompt, CONFIG, fewest, most, ended)
    assert fault is None or fault in FAULTS
    assert (fault == "empty") == (not words(caption))


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=40), st.integers(1, 4))
def test_loops_agree_with_a_search_by_hand(said, repeats):
    config = DetectConfig(repeats=repeats, ngram_share=1, characters=99, leak_phrases=(), refusal_phrases=())
    by_hand = any(
        said[start : start + size] * (repeats + 1) == said[start : start + size * (repeats + 1)]
        for size in range(1, 17)
        for start in range(len(said) - size * (repeats + 1) + 1)
    )
    assert (detect(" ".join(said), "", config, 0, 999) == "repetition") == by_hand


def test_long_texts_take_no_time():
    start = time.perf_counter()
    for text in ("ab " * 3 + "a" * 200_000, "a b " * 50_000, "abc" * 5 + ("x y z w v u t s " * 3 + "q ") * 8_000):
        detect(text, PROMPT, CONFIG, 1, 200)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DetectConfig(repeats=0), "repeats of the detectors must be at least 1"),
        (lambda: DetectConfig(ngram_share=1.5), "between 0 and 1"),
        (lambda: DetectConfig(leak_phrases=("...",)), "must have a word"),
    ],
)
def test_configs_check_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_config_is_plain_data():
    assert from_dict(DetectConfig, json.loads(json.dumps(to_dict(CONFIG)))) == CONFIG


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("It's a RED-ish box_2!", ["it", "s", "a", "red", "ish", "box", "2"]),
        ("ｆｕｌｌ width", ["full", "width"]),
        ("cafe\u0301 हिन्दी", ["café", "हिन्दी"]),
        ("黒い猫 and 강아지", ["黒", "い", "猫", "and", "강아지"]),
        ("♥ … -", []),
    ],
)
def test_words(text, said):
    assert words(text) == said
