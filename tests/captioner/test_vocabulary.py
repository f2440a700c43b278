import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizerFast

from captioner.vocabulary import Vocabulary, train_vocabulary
from tests.captioner.conftest import CAPTIONS


def test_words_of_the_corpus_are_whole_and_come_back(vocabulary):
    text = "a large red circle at the top left, on a white background"
    ids = vocabulary.encode([text])[0]
    assert len(ids) == len(text.replace(",", " ,").split())
    assert vocabulary.decode([ids]) == [text]


def test_unseen_words_are_spelt(vocabulary):
    assert vocabulary.unk not in vocabulary.encode(["a bold tartan"])[0]
    assert vocabulary.unk in vocabulary.encode(["☃"])[0]


def test_the_size_is_a_bound():
    assert len(train_vocabulary([f"word{i} other{i}" for i in range(2000)], 200)) <= 200


def test_training_is_a_function_of_the_captions():
    captions = [f"{a} {b}" for a in ("red", "green", "blue") for b in ("cat", "dog", "cot", "cart")]
    first = train_vocabulary(captions, 64).to_json()
    assert all(train_vocabulary(captions, 64).to_json() == first for _ in range(5))


def test_no_captions_is_an_error():
    with pytest.raises(ValueError, match="No captions"):
        train_vocabulary([], 100)


def test_save_load_pickle(vocabulary, tmp_path):
    vocabulary.save(str(tmp_path))
    for other in (Vocabulary.load(str(tmp_path)), pickle.loads(pickle.dumps(vocabulary))):
        assert other.encode(CAPTIONS) == vocabulary.encode(CAPTIONS)
        assert (other.bos, other.sep, other.pad, len(other)) == (
            vocabulary.bos, vocabulary.sep, vocabulary.pad, len(vocabulary),
        )  # fmt: skip
    with pytest.raises(FileNotFoundError, match="no vocabulary"):
        Vocabulary.load(str(tmp_path / "elsewhere"))


def test_transformers_reads_it_alike(vocabulary, tmp_path):
    vocabulary.save(str(tmp_path))
    bert = BertTokenizerFast.from_pretrained(str(tmp_path))
    assert bert(CAPTIONS, add_special_tokens=False)["input_ids"] == vocabulary.encode(CAPTIONS)
    assert Vocabulary(AutoTokenizer.from_pretrained(str(tmp_path)).backend_tokenizer).bos == vocabulary.bos


def test_sequences_mask_prompt_and_padding(vocabulary):
    ids, mask = vocabulary.sequences(["a red circle", "two green triangles and a yellow cross", None], "a large", 24)
    prompt = [vocabulary.bos, *vocabulary.encode(["a large"])[0]]
    assert all(row[:3].tolist() == prompt for row in ids)
    assert mask[:, :3].sum() == 0
    assert mask.sum(1).tolist() == [4, 8, 0]  # words and [SEP]
    assert ids[0][mask[0] > 0][-1] == vocabulary.sep
    assert np.all(ids[0][7:] == vocabulary.pad)


def test_a_cut_caption_has_no_end(vocabulary):
    ids, mask = vocabulary.sequences(["two green triangles and a yellow cross"], "", 5)
    assert ids.shape == (1, 5)
    assert vocabulary.sep not in ids
    assert mask.sum() == 4


@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from(["a", "red", "circle", "zebra", "한국", "é", "[SEP]"])).map(" ".join),
    st.integers(1, 8),
)
def test_a_cut_text_has_the_first_tokens(vocabulary, text, most):
    cut = vocabulary.cut(text, most)
    whole, kept = vocabulary.encode([text, cut])
    assert text.startswith(cut)
    assert len(kept) <= most
    assert kept == whole[: len(kept)]
    if len(whole) <= most:
        assert cut == text
    elif text.isascii():  # a letter may be several tokens elsewhere, and stays whole
        assert len(kept) == most


def test_sequences_of_prompts_of_their_own(vocabulary):
    texts, prompts = ["a red circle", None, "two"], ["", "a large red", "a"]
    ids, mask = vocabulary.sequences(texts, prompts, 24)
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        alone, masked = vocabulary.sequences([text], prompt, 24)
        assert ids[row, : alone.shape[1]].tolist() == alone[0].tolist()
        assert mask[row, : alone.shape[1]].tolist() == masked[0].tolist()
        assert not mask[row, alone.shape[1] :].any()
    with pytest.raises(ValueError, match="zip"):
        vocabulary.sequences(texts, prompts[:2], 24)
