import numpy as np
import pytest

from t2i.vocabulary import NULL, PAD, UNKNOWN, TextVocabulary, pad

CAPTIONS = [
    "a large red circle at the top left, on a white background",
    "a small blue square at the bottom right, on a black background",
    "Grinning face with big eyes",
] * 5


@pytest.fixture(scope="module")
def words():
    return TextVocabulary.train(CAPTIONS, 600, 16)


def test_frequent_words_are_one_id_and_text_comes_back(words):
    ids = words.encode(CAPTIONS[:2])
    assert ids.dtype == np.int64
    assert len(words.encode(["a large red circle"])[0]) == 4
    for row, caption in zip(ids, CAPTIONS[:2], strict=True):
        assert words.decode(row).replace(" ,", ",") == caption


def test_case_does_not_matter(words):
    assert words.encode(["A LARGE Red circle"]).tolist() == words.encode(["a large red circle"]).tolist()


def test_captions_are_padded_with_zeros_and_cut(words):
    ids = words.encode(["a red circle", "a red circle at the top left"])
    assert ids.shape == (2, 7)
    assert ids[0].tolist()[3:] == [PAD] * 4
    assert (ids[1] > 0).all()
    assert words.encode([" ".join(["red"] * 40)]).shape == (1, 16)


def test_an_empty_caption_is_null(words):
    assert words.encode(["", "red"])[0, 0] == NULL
    assert NULL not in words.encode(CAPTIONS)


def test_what_it_never_saw_is_unknown(words):
    ids = words.encode(["☃"])
    assert UNKNOWN in ids
    assert PAD not in ids


def test_text_cannot_name_the_reserved_ids(words):
    ids = words.encode(["[NULL] a [PAD] red circle"])
    assert PAD not in ids
    assert NULL not in ids


def test_it_is_a_function_of_the_captions(words, tmp_path):
    again = TextVocabulary.train(iter(CAPTIONS), 600, 16)
    folders = [tmp_path / "one", tmp_path / "two"]
    for vocabulary, folder in zip((words, again), folders, strict=True):
        folder.mkdir()
        vocabulary.save(str(folder))
    one, two = (next(folder.iterdir()).read_bytes() for folder in folders)
    assert one == two


def test_it_comes_back_whole(words, tmp_path):
    words.save(str(tmp_path))
    loaded = TextVocabulary.load(str(tmp_path))
    assert len(loaded) == len(words)
    assert loaded.length == words.length
    assert loaded.encode(CAPTIONS).tolist() == words.encode(CAPTIONS).tolist()


def test_pad_makes_one_array():
    assert pad([[5], [6, 7]]).tolist() == [[5, 0], [6, 7]]
