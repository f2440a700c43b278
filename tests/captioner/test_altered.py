import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.altered import Alternatives

START, END, UNK = 0, 1, 2
LINES = st.lists(st.lists(st.integers(2, 7), min_size=0, max_size=6).map(lambda line: [START, *line, END]), max_size=12)
DRAW = st.floats(0, 1, exclude_max=True)


def words(*texts):
    """Lines of the texts' words, and the number of each word."""
    known = {word: number for number, word in enumerate(sorted({word for text in texts for word in text.split()}), 3)}
    return [[START, *(known[word] for word in text.split()), END] for text in texts], known


@settings(deadline=None)
@given(LINES, DRAW, DRAW, st.data())
def test_one_token_becomes_another_that_was_seen_there(lines, place, word, data):
    table = Alternatives.count(lines, barred={UNK})
    beside = {pair for line in lines for pair in pairwise(line)}
    seen = {three for line in lines for three in zip(line, line[1:], line[2:], strict=False)}
    right = data.draw(st.lists(st.sampled_from(lines), max_size=3)) if lines else []
    for line in lines:
        altered = table.alter(line, place, word, right)
        assert altered == table.alter(line, place, word, right)
        if altered is None:
            continue
        (at,) = [at for at, (old, new) in enumerate(zip(line, altered, strict=True)) if old != new]
        assert 0 < at < len(line) - 1, "what opens and ends a text stays"
        assert tuple(altered[at - 1 : at + 2]) in seen
        assert UNK not in (line[at], altered[at])
        assert not {(line[at], altered[at]), (altered[at], line[at])} & beside
        assert altered not in right
        assert altered != line


@settings(deadline=None, max_examples=50)
@given(LINES, st.data())
def test_every_alternative_is_drawn_and_none_is_left_out_while_there_is_one(lines, data):
    table = Alternatives.count(lines)
    if not lines:
        return
    line = data.draw(st.sampled_from(lines))
    wanted = {
        (*line[:at], other, *line[at + 1 :])
        for at in range(1, len(line) - 1)
        for other in table.of(*line[at - 1 : at + 2])
    }
    draws = (np.arange(100) + 0.5) / 100
    drawn = {tuple(table.alter(line, place, word) or ()) for place in draws[::5] for word in draws}
    assert drawn == (wanted or {()})
    assert table.alter(line, 0.5, 0.5, right=[list(text) for text in wanted]) is None


def test_alternatives_are_drawn_as_often_as_they_were_seen():
    lines, known = words("a red dog", "a blue dog", "a blue dog", "a blue dog", "a green dog")
    table = Alternatives.count(lines)
    drawn = [table.alter(lines[0], 0.3, word)[2] for word in (np.arange(400) + 0.5) / 400]
    assert drawn.count(known["blue"]) == 300
    assert drawn.count(known["green"]) == 100


def test_words_that_stand_side_by_side_are_of_different_kinds():
    lines, known = words("a large red circle", "a red circle", "a large circle", "a small circle", "a blue circle")
    table = Alternatives.count(lines)
    places = (known["a"], known["red"], known["circle"])
    assert set(table.of(*places)) == {known["small"], known["blue"]}, "a red circle may well be large"
    assert set(table.of(known["a"], known["large"], known["circle"])) == {known["small"], known["blue"]}


def test_right_texts_are_not_made():
    lines, _ = words("a red dog", "a blue dog")
    table = Alternatives.count(lines)
    assert table.alter(lines[0], 0, 0) == lines[1]
    assert table.alter(lines[0], 0, 0, right=[lines[1]]) is None


def test_a_text_unlike_the_corpus_has_no_alternatives():
    lines, _ = words("a red dog", "a blue dog", "one cat")
    table = Alternatives.count(lines[:2])
    assert table.alter(lines[2], 0, 0) is None
    assert table.alter([START, END], 0, 0) is None
    assert Alternatives.count([]).alter(lines[0], 0, 0) is None


def test_the_most_frequent_places_are_kept():
    lines, _ = words("a red dog", "a blue dog", "a red dog", "the old cat", "the young cat")
    table = Alternatives.count(lines, limit=1)
    assert table.alter(lines[0], 0, 0) == lines[1]
    assert table.alter(lines[3], 0, 0) is None


@pytest.mark.parametrize("place", [0, 0.999])
def test_it_travels_and_does_not_depend_on_the_order_of_texts(place):
    lines, _ = words("a red dog", "a blue dog", "a green dog", "the red dog", "the blue dog")
    tables = [Alternatives.count(lines), Alternatives.count(lines[::-1])]
    tables.append(pickle.loads(pickle.dumps(tables[0])))
    for line in lines:
        assert len({tuple(table.alter(line, place, 0.4)) for table in tables}) == 1
