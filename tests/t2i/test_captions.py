import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.train.draw import numeric_ids, uniforms
from t2i.captions import choose, shares

WEIGHTS = {"alt": 0.1, "short": 0.2, "descriptive": 0.7}
ROWS = 20_000
IDS = [f"{i * 0x9E3779B97F4A7C15 % 2**64:016x}{i:08x}" for i in range(ROWS)]
CAPTIONS = {style: [f"{style} {i}" for i in range(ROWS)] for style in WEIGHTS}


def draw(ids, seed=0, epoch=0):
    return uniforms(seed, np.full(len(ids), epoch), numeric_ids(ids), "caption")


def styles_of(texts):
    return np.array([text.split()[0] for text in texts])


def test_weights_are_met():
    said = styles_of(choose(CAPTIONS, WEIGHTS, draw(IDS)))
    for style, weight in WEIGHTS.items():
        assert np.mean(said == style) == pytest.approx(weight, abs=4 * np.sqrt(weight * (1 - weight) / ROWS))


@given(st.permutations(range(40)), st.integers(1, 40))
def test_order_and_batches_change_nothing(order, size):
    whole = choose({style: texts[:40] for style, texts in CAPTIONS.items()}, WEIGHTS, draw(IDS[:40]))
    parts = [order[start : start + size] for start in range(0, 40, size)]
    for part in parts:
        columns = {style: [CAPTIONS[style][i] for i in part] for style in reversed(list(CAPTIONS))}
        assert choose(columns, WEIGHTS, draw([IDS[i] for i in part])) == [whole[i] for i in part]


def test_another_epoch_or_seed_is_another_choice():
    first = styles_of(choose(CAPTIONS, WEIGHTS, draw(IDS)))
    for other in (draw(IDS, epoch=1), draw(IDS, seed=1)):
        changed = np.mean(styles_of(choose(CAPTIONS, WEIGHTS, other)) != first)
        # Two independent draws differ with probability 1 - sum of squares.
        assert changed == pytest.approx(1 - sum(weight**2 for weight in WEIGHTS.values()), abs=0.02)


captions_of_a_row = st.tuples(*[st.one_of(st.none(), st.sampled_from(["", "  ", "words"]))] * 3)


@given(
    st.lists(captions_of_a_row, min_size=1, max_size=20),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.floats(0, 1, exclude_max=True),
)
def test_rows_are_given_only_what_they_have(rows, weights, uniform):
    columns = {style: [row[i] and f"{style} {row[i]}" for row in rows] for i, style in enumerate(WEIGHTS)}
    columns = {s: [t if t and t.split()[1:] else None for t in texts] for s, texts in columns.items()}
    by_style = dict(zip(WEIGHTS, weights, strict=True))
    parts = shares(columns, by_style)
    totals = sum(parts.values())
    for row in range(len(rows)):
        has = [style for style in WEIGHTS if columns[style][row] and by_style[style] > 0]
        assert totals[row] == pytest.approx(1.0 if has else 0.0)
    usable = [row for row in range(len(rows)) if totals[row] > 0]
    columns = {style: [texts[row] for row in usable] for style, texts in columns.items()}
    for row, text in enumerate(choose(columns, by_style, np.full(len(usable), uniform)) if usable else []):
        assert text == columns[text.split()[0]][row]


def test_weights_may_be_a_column():
    weights = {"alt": np.array([1.0, 0.0]), "short": np.array([0.0, 1.0])}
    columns = {"alt": ["a", "b"], "short": ["c", "d"]}
    assert choose(columns, weights, np.array([0.999999, 0.0])) == ["a", "d"]


def test_a_row_without_captions_is_an_error():
    with pytest.raises(ValueError, match="Row 1 of the batch has no caption"):
        choose({"alt": ["a", None]}, {"alt": 1.0}, np.zeros(2))
    with pytest.raises(ValueError, match="no caption column"):
        choose({}, WEIGHTS, np.zeros(0))
