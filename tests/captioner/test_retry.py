import json

import pytest
import torch

from captioner import retry
from captioner.decoding import Captions, caption
from captioner.detect import DetectConfig
from captioner.retry import caption_checked, decodings
from captioner.styles import RETRIES, Search, Style
from infra.config import from_dict, to_dict

STYLE = Style(name="short", max_tokens=15)
CONFIG = DetectConfig(characters=12)


@pytest.fixture
def captioner(make_captioner):
    """Its weights are random, so it loops, babbles and ends at odd moments: what a detector is for."""
    model = make_captioner(decoders=("alt", "short"), layers=3, hidden=128)
    with torch.no_grad():
        model.decoders["short"].cls.predictions.decoder.bias[model.vocabulary.sep] += 13
    return model


@pytest.fixture
def features(captioner, pixels):
    with torch.no_grad():
        return captioner.encode(pixels)


def test_only_the_faulty_rows_change(captioner, features):
    first = caption(captioner, features, STYLE)
    checked = caption_checked(captioner, features, STYLE, CONFIG)
    clean = [row for row, tries in enumerate(checked.tries) if tries == 1]
    assert 3 < len(clean) < 11
    for row in clean:
        assert checked.texts[row] == first.texts[row]
        assert checked.logp[row] == first.logp[row]
        assert checked.flags[row] is None
    assert {1, 2, 3} == set(checked.tries)
    redone = [row for row, tries in enumerate(checked.tries) if tries > 1]
    assert any(checked.flags[row] is None and checked.texts[row] != first.texts[row] for row in redone)
    assert all(checked.tries[row] == 3 for row in redone if checked.flags[row])
    assert "repetition" not in checked.flags


def test_batched_equals_single(captioner, features):
    together = caption_checked(captioner, features, STYLE, CONFIG)
    for row in range(len(features)):
        alone = caption_checked(captioner, features[row : row + 1], STYLE, CONFIG)
        assert alone.texts == together.texts[row : row + 1]
        assert alone.flags == together.flags[row : row + 1]
        assert alone.tries == together.tries[row : row + 1]
        assert alone.logp == pytest.approx(together.logp[row : row + 1], abs=1e-4)


def test_without_retries_captions_are_only_judged(captioner, features):
    first = caption(captioner, features, STYLE)
    checked = caption_checked(captioner, features, STYLE, CONFIG, retries=())
    assert (checked.texts, checked.logp) == (first.texts, first.logp)
    assert set(checked.tries) == {1}
    assert {"repetition", "cut off", None} == set(checked.flags)


def test_logp_is_of_the_caption_that_was_kept(captioner, features):
    checked = caption_checked(captioner, features, STYLE, CONFIG, retries=RETRIES[1:])
    redone = caption(captioner, features, STYLE, search=RETRIES[1])
    rows = [row for row, text in enumerate(redone.texts) if text == checked.texts[row] and checked.tries[row] == 2]
    assert rows
    assert [checked.logp[row] for row in rows] == pytest.approx([redone.logp[row] for row in rows], abs=1e-4)


def test_short_captions_are_asked_for_more(captioner, features):
    words = (2, 200)
    judged = caption_checked(captioner, features, STYLE, CONFIG, words, retries=())
    checked = caption_checked(captioner, features, STYLE, CONFIG, words, retries=(Search(beams=2),))
    short = [row for row, flag in enumerate(judged.flags) if flag == "too short"]
    mended = [row for row in short if checked.flags[row] is None]
    assert mended
    assert all(len(checked.texts[row].split()) >= 2 for row in mended)


class Script:
    """Says what the script says for each row, attempt by attempt; features are the rows' numbers."""

    def __init__(self, lines):
        self.lines, self.calls, self.said = lines, [], dict.fromkeys(range(len(lines)), 0)

    def __call__(self, captioner, features, style, prompts=None, search=None):
        rows = [int(row) for row in features[:, 0, 0]]
        self.calls.append((rows, style, search))
        texts = []
        for row in rows:
            texts.append(self.lines[row][self.said[row]])
            self.said[row] += 1
        return Captions(
            [text.rstrip("…") for text in texts],
            [-float(self.said[row]) for row in rows],
            [not text.endswith("…") for text in texts],
        )


@pytest.fixture
def play(monkeypatch):
    def run(lines, retries, **more):
        script = Script(lines)
        monkeypatch.setattr(retry, "caption", script)
        features = torch.arange(len(lines), dtype=torch.float32)[:, None, None]
        return caption_checked(None, features, STYLE, DetectConfig(), retries=retries, **more), script.calls

    return run


LOOP = "no no no no no no"
THREE = (Search(beams=2), Search(beams=3), Search(beams=4))


def test_the_better_attempt_is_kept(play):
    checked, _ = play(
        [
            ["a dog"],
            [LOOP, "a cat"],
            [LOOP, "a cat on…", LOOP, "…"],  # the least fault, though it came in the middle
            ["a bird and…", "another bird and…", LOOP, ""],  # of equals the first
            ["", LOOP, "", "I'm sorry, but I cannot"],
            ["", "", "", ""],
        ],
        THREE,
    )
    assert checked.texts == ["a dog", "a cat", "a cat on", "a bird and", "I'm sorry, but I cannot", ""]
    assert checked.flags == [None, None, "cut off", "cut off", "refusal", "empty"]
    assert checked.tries == [1, 2, 4, 4, 4, 4]
    assert checked.logp == [-1, -2, -2, -1, -4, -1]
    assert checked.attempts == [1, 2, 2, 1, 4, 1]


def test_rows_leave_as_they_are_mended(play):
    lines = [["a dog"], [LOOP, "a cat"], [LOOP, LOOP, "a fox"], ["", "", "", "a cow"]]
    _, calls = play(lines, THREE)
    assert [rows for rows, _, _ in calls] == [[0, 1, 2, 3], [1, 2], [3], [2], [3], [3]]
    assert [search for _, _, search in calls] == [None, THREE[0], THREE[0], THREE[1], THREE[1], THREE[2]]


def test_beams_at_a_time_are_no_more_than_rows_at_first(play):
    _, calls = play([[LOOP, LOOP, LOOP, "a dog"]] * 9, THREE)
    assert all(len(rows) * (search.beams if search else 1) <= 9 for rows, _, search in calls)
    assert sum(len(rows) for rows, _, _ in calls) == 36


def test_retries_ask_for_the_fewest_words(play):
    _, calls = play([["one", "two", "three", "four"]], THREE, words=(5, 9))
    assert [style.min_tokens for _, style, _ in calls] == [1, 5, 5, 5]
    _, calls = play([["one"] * 4], THREE, words=(50, 99))
    assert [style.min_tokens for _, style, _ in calls] == [1, 15, 15, 15]


def test_what_is_told_of_decodings_is_what_is_done(play):
    _, calls = play([["one", "two", "three", "four"]], THREE, words=(5, 9))
    done = [(style.min_tokens, style.max_tokens, search.beams if search else 1) for _, style, search in calls]
    told = decodings(STYLE, (5, 9), THREE)
    assert [(each["min_tokens"], each["max_tokens"], each["beams"]) for each in told] == done
    assert told[0] == {"beams": 1, "no_repeat_ngram": 0, "repetition_penalty": 1.0, "min_tokens": 1, "max_tokens": 15}


def test_clean_rows_cost_nothing(play):
    _, calls = play([["a dog"], ["a cat"]], THREE)
    assert len(calls) == 1


def test_retries_are_plain_data():
    assert from_dict(tuple[Search, ...], json.loads(json.dumps(to_dict(RETRIES)))) == RETRIES


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Search(beams=0), "at least 1 beam"),
        (lambda: Search(no_repeat_ngram=-1), "number of tokens"),
        (lambda: Search(repetition_penalty=0.5), "rewards repetition"),
    ],
)
def test_searches_check_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()
