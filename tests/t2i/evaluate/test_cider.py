"""CIDEr-D against the public implementation, and in closed form."""

import numpy as np
import pytest

from t2i.evaluate.cider import cider

CAPTIONS = [
    "a red circle on a white background",
    "two dogs run on the grass in the sun",
    "a man rides a horse",
    "a cat",
    "the the the the the",
    "a man rides a brown horse on the long beach today",
]
REFERENCES = [
    ["a large red circle on a white background", "a red disc, white background"],
    ["two dogs are running on grass", "dogs play in the sun on the grass", "two brown dogs run"],
    ["a man riding a horse on a beach"],
    ["a cat sits on a mat", "the cat sat on the mat"],
    ["the end of the road"],
    ["a man rides a brown horse on the beach", "a horse and a man"],
]
# By pycocoevalcap 1.2 (BSD) on these very words: `Cider().compute_score(references, captions)[1]`.
EXPECTED = [5.138695802753, 2.285019929278, 1.519687069114, 1.635999898988, 0.252813830643, 3.795591401635]


def test_scores_are_those_of_the_public_implementation():
    assert cider(CAPTIONS, REFERENCES) == pytest.approx(EXPECTED, abs=1e-11)


def test_ten_for_the_reference_itself():
    texts = ["one two three four five", "six seven eight nine ten"]
    assert cider(texts, [[text] for text in texts]) == pytest.approx([10, 10])
    assert cider(texts, [[text] for text in reversed(texts)]) == pytest.approx([0, 0])
    short = cider(["one two", "six"], [["one two"], ["six"]])
    assert short == pytest.approx([5, 2.5])  # it has no n-gram of three and four words, of two


def test_what_all_pictures_share_says_nothing():
    assert cider(["a red circle"], [["a red circle"]]) == pytest.approx([0])  # one picture: nothing is rare
    assert cider(["a", "a a"], [["a red circle"], ["a blue square"]]) == pytest.approx([0, 0])


def test_saying_it_again_does_not_help():
    references = [["a red circle and a cross"], ["a blue square"], ["two dogs"]]
    once = cider(["a red circle and a cross", None, ""], references)
    again = cider(["a red circle and a cross " * 3, None, ""], references)
    assert again[0] < once[0]
    np.testing.assert_array_equal(once[1:], 0)


def test_order_of_pictures_and_of_references_does_not_matter():
    order = [3, 1, 5, 0, 4, 2]
    turned = cider([CAPTIONS[i] for i in order], [REFERENCES[i][::-1] for i in order])
    assert turned == pytest.approx([EXPECTED[i] for i in order], abs=1e-11)


def test_a_caption_needs_a_reference():
    with pytest.raises(ValueError, match="found 2 captions, 1 pictures"):
        cider(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="1 of them without"):
        cider(["a"], [[]])
