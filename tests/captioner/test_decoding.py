from itertools import pairwise

import pytest
import torch

from captioner.decoding import caption, decoder_of, score
from captioner.slots import greedy
from captioner.styles import Search, Style

STYLE = Style(name="short", max_tokens=15)
PROMPTS = ["", "a large", "two green triangles", "a", "a red", "", "a white"] * 2


@pytest.fixture(autouse=True)
def keep_no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def captioner(make_captioner):
    model = make_captioner(decoders=("alt", "short"), layers=3, hidden=128)
    model.decoders["short"].cls.predictions.decoder.bias[model.vocabulary.sep] += 13  # captions of many lengths
    return model


def singles(captioner, features, style, prompts):
    return [
        caption(captioner, features[i : i + 1], style, [prompts[i]] if prompts else None) for i in range(len(features))
    ]


@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["one prompt", "a prompt a row"])
@pytest.mark.parametrize("beams", [1, 2])
def test_batched_equals_single(captioner, pixels, prompts, beams):
    features = captioner.encode(pixels)
    style = Style(name="short", max_tokens=15, beams=beams)
    together = caption(captioner, features, style, prompts)
    alone = singles(captioner, features, style, prompts)
    assert together.texts == [one.texts[0] for one in alone]
    assert together.logp == pytest.approx([one.logp[0] for one in alone], abs=1e-4)
    assert len({len(text.split()) for text in together.texts}) > 2, "captions of one length would show nothing"


def test_this_model_would_show_padding_errors(captioner, pixels):
    """The comparison above means something: a prefix padded on the left, or on the right, makes other captions."""
    features, vocabulary = captioner.encode(pixels), captioner.vocabulary
    prompt, pad = [vocabulary.bos, *vocabulary.encode(["a large"])[0]], vocabulary.pad
    clean, left, right = (
        greedy(
            captioner.decoders["short"], features, [start] * len(pixels), sep=vocabulary.sep, fewest=1, most=[15] * 14
        )[0]
        for start in (prompt, [pad, *prompt], [*prompt, pad])
    )
    assert clean != left
    assert clean != right


@pytest.mark.parametrize("beams", [1, 3])
def test_logp_is_the_mean_over_tokens_and_end(captioner, pixels, beams, decoded):
    features, vocabulary = captioner.encode(pixels), captioner.vocabulary
    said = caption(captioner, features, Style(name="short", prompt="a large", max_tokens=15, beams=beams))
    prompt = [vocabulary.bos, *vocabulary.encode(["a large"])[0]]
    for row, tokens in enumerate(decoded):
        tokens = [*tokens, vocabulary.sep][:15]
        ids = torch.tensor([[*prompt, *tokens]])
        logp = captioner.logits("short", features[row : row + 1], ids)[0].log_softmax(-1)
        mean = sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens)) / len(tokens)
        assert said.logp[row] == pytest.approx(mean, abs=1e-3)
        assert said.logp[row] <= 0


def test_score_reads_a_caption_as_decoding_said_it(captioner, pixels):
    features = captioner.encode(pixels[:2])
    texts = ["a small blue square", "two green triangles and a red circle"]
    vocabulary = captioner.vocabulary
    for row, text in enumerate(texts):
        tokens = [*vocabulary.encode([text])[0], vocabulary.sep]
        logp = captioner.logits("short", features[row : row + 1], torch.tensor([[vocabulary.bos, *tokens]]))[0]
        mean = float(logp.log_softmax(-1)[range(len(tokens)), tokens].mean())
        assert score(captioner, features, texts, STYLE)[row] == pytest.approx(mean, abs=1e-3)


def test_score_of_nothing_is_nothing(captioner, pixels):
    features = captioner.encode(pixels[:3])
    values = score(captioner, features, ["a red circle", None, "two"], STYLE)
    assert values[1] is None
    alone = score(captioner, features[2:], ["two"], STYLE)
    assert values[2] == pytest.approx(alone[0], abs=1e-4)


@pytest.fixture
def decoded(captioner, monkeypatch):
    """The token rows that were turned into text."""
    rows = []
    decode = captioner.vocabulary.decode
    monkeypatch.setattr(captioner.vocabulary, "decode", lambda tokens: rows.extend(tokens) or decode(tokens))
    return rows


def test_lengths_are_bounded(captioner, pixels, decoded):
    features = captioner.encode(pixels)
    caption(captioner, features, Style(name="short", min_tokens=5, max_tokens=8))
    assert all(5 <= len(row) <= 8 for row in decoded)
    decoded.clear()
    # A sequence cannot be longer than the decoder's positions.
    caption(captioner, features, Style(name="short", min_tokens=90, max_tokens=99))
    assert {len(row) for row in decoded} == {23}


@pytest.mark.parametrize("beams", [1, 2])
def test_a_style_searches_by_its_beams(captioner, pixels, beams):
    features = captioner.encode(pixels)
    style = Style(name="short", max_tokens=15, beams=beams)
    said = caption(captioner, features, style)
    assert caption(captioner, features, STYLE, search=Search(beams=beams)) == said
    # A bar that no caption meets changes nothing, though it goes through another implementation of greedy search.
    barred = caption(captioner, features, style, search=Search(beams=beams, no_repeat_ngram=99))
    assert barred.texts == said.texts
    assert barred.logp == pytest.approx(said.logp, abs=1e-4)
    assert barred.ended == said.ended


RETRY = Search(beams=3, no_repeat_ngram=2, repetition_penalty=1.3)


@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["one prompt", "a prompt a row"])
def test_another_search_is_batched_as_single(captioner, pixels, prompts):
    features = captioner.encode(pixels)
    together = caption(captioner, features, STYLE, prompts, RETRY)
    rows = [
        caption(captioner, features[i : i + 1], STYLE, prompts[i : i + 1] if prompts else None, RETRY)
        for i in range(len(features))
    ]
    assert together.texts == [row.texts[0] for row in rows]
    assert together.ended == [row.ended[0] for row in rows]
    assert together.texts != caption(captioner, features, STYLE, prompts).texts


def test_no_ngram_is_said_twice(captioner, pixels, decoded):
    def repeated(rows):
        pairs = [list(pairwise(row)) for row in rows]
        return sum(len(set(row)) < len(row) for row in pairs)

    features = captioner.encode(pixels)
    caption(captioner, features, STYLE)
    assert repeated(decoded) > 3
    decoded.clear()
    caption(captioner, features, STYLE, search=Search(no_repeat_ngram=2))
    assert len(decoded) == len(pixels)
    assert repeated(decoded) == 0


def test_the_penalty_is_that_of_ctrl(captioner, pixels, decoded):
    """Greedy by hand, with the logits of tokens that were said (arXiv 1909.05858, section 4.1, signs minded)."""
    features, vocabulary = captioner.encode(pixels), captioner.vocabulary
    caption(captioner, features, STYLE, search=Search(repetition_penalty=1.5))
    for row, found in enumerate(decoded):
        ids, said = [vocabulary.bos], []
        while len(said) < 15:
            logits = captioner.logits("short", features[row : row + 1], torch.tensor([ids + said]))[0, -1]
            for token in set(ids + said):
                logits[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
            if not said:
                logits[vocabulary.sep] = -torch.inf
            said.append(int(logits.argmax()))
            if said[-1] == vocabulary.sep:
                break
        assert found == [token for token in said if token != vocabulary.sep]


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["one prompt", "a prompt a row"])
def test_captions_that_ran_into_the_bound_did_not_end(captioner, pixels, beams, prompts):
    features = captioner.encode(pixels)
    short = caption(captioner, features, Style(name="short", max_tokens=6, beams=beams), prompts)
    assert set(short.ended) == {True, False}
    if beams == 1:  # then a caption goes on as it began
        more = caption(captioner, features, Style(name="short", max_tokens=7), prompts)
        # A caption of just six tokens fills its bound, so that nobody saw its end.
        same = [one == other for one, other in zip(short.logp, more.logp, strict=True)]
        assert same == short.ended


def test_styles_find_their_decoder(captioner, pixels):
    features = captioner.encode(pixels)
    assert decoder_of(captioner, STYLE) == "short"
    assert decoder_of(captioner, Style(name="third")) == "alt"
    third = Style(name="third", decoder="short", max_tokens=15)
    assert caption(captioner, features, third) == caption(captioner, features, STYLE)
    with pytest.raises(ValueError, match="this captioner has: alt, short"):
        decoder_of(captioner, Style(name="third", decoder="long"))


def test_a_prompt_without_room_is_refused(captioner, pixels):
    with pytest.raises(ValueError, match="no room"):
        caption(captioner, captioner.encode(pixels), Style(name="short", prompt="a " * 30))
