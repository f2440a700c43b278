import pickle

import numpy as np
import pytest

from captioner.filters import Hash, Language, Size
from captioner.hashing import phash
from infra.data.stage import Runner, Stage
from tests.infra.data.zoo import picture


def run(stage, **columns):
    stage = pickle.loads(pickle.dumps(stage))
    assert isinstance(stage, Stage)
    stage.setup()
    rows = len(next(iter(columns.values())))
    some = {name: [None] * rows for name in stage.reads if name.endswith("?")}
    result = Runner([stage])({"state": ["accepted"] * rows, "reason": [None] * rows, **some, **columns})
    assert result["state"] == ["accepted"] * rows
    assert result["reason"] == [None] * rows
    return result


def test_hash():
    pictures = [picture(0), picture(1, 300, 2), np.zeros((1, 1, 3), dtype=np.uint8)]
    result = run(Hash(), pixels=pictures)
    assert result["phash"] == [phash(one) for one in pictures]
    assert [len(colors) for colors in result["colors"]] == [48] * 3


def test_size():
    sizes = [(32, 32), (31, 500), (500, 31), (1, 1), (20_000, 32), (64, 32), (32, 64), (65, 32), (32, 65)]
    result = run(Size(32, 2.0), width=[w for w, _ in sizes], height=[h for _, h in sizes])
    assert result["unfit_size"] == [
        None,
        "too small: 31x500",
        "too small: 500x31",
        "too small: 1x1",
        "too narrow: 20000x32",
        None,
        None,
        "too narrow: 65x32",
        "too narrow: 32x65",
    ]


TEXTS = {
    "a dog runs through the park near the water": "en",
    "There is a black triangle touching the wall.": "en",
    "un chien court dans le parc au bord de la rivière": "fr",
    "größer Hund auf der Straße": "de",
    "犬が公園で走る": "ja",
    "빨간 신발": "ko",
}
SHORT = ["dog", "red square", "a cat", "IMG_1234.jpg", "1234", "!?", "a small blue dog | free stock photo"]


@pytest.fixture
def classifier():
    pytest.importorskip("py3langid")


def test_languages_are_told(classifier):
    result = run(Language(), caption_alt=list(TEXTS))
    assert result["language_alt"] == list(TEXTS.values())
    assert result["unfit_language"] == [None] * len(TEXTS)


def test_other_languages_are_unfit(classifier):
    result = run(Language(("en",)), caption_alt=list(TEXTS))
    expected = [None if code == "en" else f"other language: {code}" for code in TEXTS.values()]
    assert result["unfit_language"] == expected
    result = run(Language(("en", "ja", "fr")), caption_alt=list(TEXTS))
    assert [verdict is None for verdict in result["unfit_language"]] == [
        c in ("en", "ja", "fr") for c in TEXTS.values()
    ]


def test_each_of_several_texts_has_its_own_verdict(classifier):
    english, french, german = (next(text for text, code in TEXTS.items() if code == wanted) for wanted in
                               ("en", "fr", "de"))  # fmt: skip
    several = [[french, english, "1234"], [french, german], None, None, [english, french]]
    firsts = [french, french, french, None, english]
    result = run(Language(("en",)), caption_alt=firsts, **{"captions_alt?": several})
    assert result["language_alt"] == ["fr", "fr", "fr", None, "en"]
    assert result["unfit_language"] == [None, "other language: fr", "other language: fr", None, None]
    assert result["languages_alt"] == [["fr", "en", None], ["fr", "de"], None, None, ["en", "fr"]]
    french, german = "other language: fr", "other language: de"
    assert result["unfit_languages"] == [[french, None, None], [french, german], None, None, [None, french]]


def test_what_could_be_any_language_passes(classifier):
    result = run(Language(("en",)), caption_alt=SHORT)
    assert result["unfit_language"] == [None] * len(SHORT)
    assert [code is None for code in result["language_alt"]] == [text in ("1234", "!?") for text in SHORT]


def test_any_text_has_an_answer(classifier):
    texts = ["", " ", "\0", "x" * 10_000, "\U0001f600", "ẞ", "a\u0301", "\u202eabc", "A" * 50]
    assert run(Language(("en",)), caption_alt=texts)["unfit_language"][:3] == [None] * 3


def test_an_unknown_language_is_a_sentence(classifier):
    with pytest.raises(ValueError, match=r"There is no language english\. Give ISO 639 codes"):
        Language(("english", "de")).setup()
