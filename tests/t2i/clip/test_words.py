"""CLIP's words are read by transformers as by us, and know every byte."""

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from t2i.clip.model import LEAST_WORDS
from t2i.clip.words import CLIPWords, train_words
from tests.t2i.clip import tiny


@pytest.fixture(scope="module")
def both():
    return CLIPWords(tiny.words(), tiny.LENGTH), transformers.AutoTokenizer.from_pretrained(tiny.words())


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_transformers_reads_them_alike(both, texts):
    ours, theirs = both
    ids, keys = ours(texts)
    wanted = theirs(texts, truncation=True, max_length=tiny.LENGTH, padding="longest")["input_ids"]
    assert ids.tolist() == wanted
    for row, text in enumerate(texts):
        assert ids[row, 0] == ours.end - 1
        assert ids[row, -1] == ours.end
        if "<|endoftext|>" not in text and "<|startoftext|>" not in text:
            inner = ids[row, 1:].tolist()
            assert all(each == ours.end for each in inner[inner.index(ours.end) :])
    for row, key in enumerate(keys):
        for other, its in enumerate(keys):
            assert (key == its) == (ids[row].tolist() == ids[other].tolist())


def test_a_key_is_of_what_is_read(both):
    ours, _ = both
    _, keys = ours(["Red over blue", "red  OVER blue", "red over green", "red " * 30, "red " * 40])
    assert keys[0] == keys[1] != keys[2]
    assert keys[3] == keys[4]


def test_words_that_are_seen_often_are_tokens(both):
    ours, theirs = both
    assert LEAST_WORDS < len(ours) <= 560
    assert theirs.tokenize("red over blue") == ["red</w>", "over</w>", "blue</w>"]
    assert theirs.model_max_length == tiny.LENGTH


def test_every_byte_is_known(tmp_path):
    """Where nothing is learned there are bytes alone, and every text is read whole."""
    train_words([], LEAST_WORDS, 200, str(tmp_path))
    words = CLIPWords(str(tmp_path), 200)
    assert len(words) == LEAST_WORDS
    text = "".join(chr(code) for code in range(33, 400) if not chr(code).isspace())[:90]
    ids, _ = words([text])
    assert (ids[0] == words.end).sum() == 1
    assert ids.shape[1] > 90
