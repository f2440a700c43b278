import json
import math
import pickle
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.collapse import LONGEST, Collapse, describe, merge
from captioner.sketches import Distinct, Frequent

WORDS = ["a", "an", "A", "An", "the", "red", "Blue", "fox.", "猫", "it's", "X", "3"]
sentences = st.lists(st.sampled_from(WORDS), max_size=12).map(lambda line: " ".join(line))
captions = st.lists(st.none() | st.text(max_size=8) | sentences, max_size=40)
plain = st.lists(sentences | st.none(), max_size=40)


def simple(text):
    """Words of the plain captions in `WORDS`, told apart by another way than the code's."""
    spaced = text.lower().replace("'", " ").replace(".", " ").replace("猫", " 猫 ")
    return spaced.split()


def by_hand(lines):
    """All statistics with everything held in memory."""
    texts = [line.strip() for line in lines if line and line.strip()]
    said = [simple(text) for text in texts]
    grams = {n: [" ".join(line[i : i + n]) for line in said for i in range(len(line) - n + 1)] for n in (1, 2, 3)}
    lengths = np.array([len(text.split()) for text in texts])

    def share(values):
        return sum(values) / len(texts) if texts else 0

    def top(items):
        return [list(entry) for entry in sorted(Counter(items).items(), key=lambda e: (-e[1], e[0]))[:20]]

    return {
        "count": len(texts),
        "blank": len(lines) - len(texts),
        "begins_with_article": share(bool(line) and line[0] in ("a", "an") for line in said),
        "begins_with_capital": share(text[0] != text[0].lower() for text in texts),
        "lower_case": share(text == text.lower() and text != text.upper() for text in texts),
        "final_stop": share(text[-1] == "." for text in texts),
        "words": {
            "mean": lengths.mean() if texts else 0,
            "median": np.quantile(lengths, 0.5, method="inverted_cdf") if texts else 0,
            "p95": np.quantile(lengths, 0.95, method="inverted_cdf") if texts else 0,
        },
        "duplicates": 1 - len(set(texts)) / len(texts) if texts else 0,
        **{f"distinct_{n}": len(set(grams[n])) / len(grams[n]) if grams[n] else 0 for n in (1, 2, 3)},
        "openings": top(" ".join(line[:2]) for line in said if len(line) > 1),
        "trigrams": top(grams[3]),
        "undercount": {"openings": 0, "trigrams": 0},
    }


@given(plain)
def test_describe_agrees_with_counting_by_hand(lines):
    found = describe(iter(lines))
    histogram = found["words"].pop("histogram")
    wanted = by_hand(lines)
    for name, value in wanted.items():
        assert found[name] == (pytest.approx(value) if isinstance(value, (float, dict)) else value), name
    assert set(found) == set(wanted)
    lengths = [len(line.split()) for line in lines if line]
    for name, count in histogram.items():
        low, _, high = name.rstrip("+").partition("-")
        assert count == sum(int(low) <= length <= int(high or 10**9) for length in lengths)
    assert sum(histogram.values()) == found["count"]


def test_one_corpus_by_eye():
    found = describe(["a red fox.", "A red fox", "a red fox.", "An owl", "two owls at a lake", "", None, " \n"])
    assert (found["count"], found["blank"]) == (5, 3)
    assert found["begins_with_article"] == 4 / 5
    assert found["begins_with_capital"] == 2 / 5
    assert found["lower_case"] == 3 / 5
    assert found["final_stop"] == 2 / 5
    assert found["words"]["median"] == 3
    assert found["words"]["p95"] == 5
    assert found["words"]["histogram"]["1-5"] == 5
    assert found["duplicates"] == pytest.approx(1 / 5)
    assert found["distinct_1"] == pytest.approx(9 / 16)
    assert found["openings"][0] == ["a red", 3]
    assert found["trigrams"][0] == ["a red fox", 3]


@given(captions, st.integers(0, 40), st.integers(0, 40))
def test_parts_merge_to_the_whole(lines, first, second):
    first, second = sorted((first, second))
    parts = []
    for chunk in (lines[:first], lines[first:second], lines[second:]):
        part = Collapse()
        part.add(chunk)
        parts.append(pickle.loads(pickle.dumps(part)))
    before = [part.report() for part in parts]
    assert merge(parts).report() == describe(lines)
    assert merge(reversed(parts)).report() == describe(lines)
    assert [part.report() for part in parts] == before


@given(captions)
def test_the_report_is_plain_data(lines):
    found = describe(lines)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert describe(lines) == found


def test_nothing_is_described():
    found = describe([])
    assert found["count"] == 0
    assert found["distinct_2"] == found["duplicates"] == found["words"]["mean"] == 0
    assert merge([]).report() == found


def test_very_long_captions_are_counted():
    found = describe(["a " * (LONGEST + 500), "a"])
    assert found["words"]["histogram"]["201+"] == 1
    assert found["words"]["p95"] == LONGEST
    assert found["words"]["mean"] == (LONGEST + 501) / 2


def test_memory_does_not_grow_and_estimates_hold():
    """A corpus of ten times as many n-grams as are held: habits exact, the rest near."""
    draw = random.Random(0)
    lines = [
        f"a {draw.choice(['cat', 'dog'])} on mat {draw.randrange(3000)} of {draw.randrange(3000)}" for _ in range(4000)
    ]
    collapse, wanted = Collapse(size=1000), by_hand(lines)
    collapse.add(lines)
    assert all(len(distinct._hashes) <= 2000 for distinct in (*collapse.distinct.values(), collapse.captions))
    assert all(len(frequent._counts) <= 2000 + 512 * 9 for frequent in (collapse.openings, collapse.trigrams))
    found = collapse.report()
    assert found["begins_with_article"] == 1
    for name in ("distinct_1", "distinct_2", "distinct_3"):
        assert found[name] == pytest.approx(wanted[name], rel=0.15)
    assert found["duplicates"] == pytest.approx(wanted["duplicates"], abs=0.15)
    assert found["openings"] == wanted["openings"]
    error = found["undercount"]["trigrams"]
    assert 0 < error <= sum(len(simple(line)) - 2 for line in lines) / 1001
    assert [text for text, _ in found["trigrams"][:4]] == [text for text, _ in wanted["trigrams"][:4]]
    for (_, count), (_, real) in zip(found["trigrams"][:4], wanted["trigrams"][:4], strict=True):
        assert real - error <= count <= real


texts = st.lists(st.text("abc", max_size=4), max_size=60)


@given(texts, texts, st.integers(2, 8))
def test_distinct_depends_on_the_set_alone(first, second, size):
    whole, one, other = (Distinct(size) for _ in range(3))
    whole.add(sorted(set(first + second), reverse=True))
    one.add(first)
    assert one.estimate() >= 0
    one.add(first[::-1])
    other.add(second)
    assert other.estimate() >= 0  # which prunes it
    one.merge(other)
    assert one.estimate() == whole.estimate()
    if len(set(first + second)) <= size:
        assert whole.estimate() == len(set(first + second))
    assert len(one._hashes) <= 2 * size


def test_an_empty_count_takes_over_an_estimate():
    one, other = Distinct(4), Distinct(4)
    other.add("abcdefghijklmnop")
    one.merge(other)
    assert one.estimate() == other.estimate() != 4


@pytest.mark.parametrize("n", [1_000, 100_000])
def test_distinct_is_within_its_error(n):
    """Unbiased, with a relative deviation of 1 / sqrt(size - 2): four of them over, eleven corpora of texts."""
    ratios = []
    for corpus in range(11):
        distinct = Distinct(256)
        distinct.add(f"{corpus} {text}" for text in range(n // 10))
        ratios.append(distinct.estimate() / (n // 10))
    assert max(abs(ratio - 1) for ratio in ratios) < 4 / math.sqrt(254)
    assert abs(np.mean(ratios) - 1) < 4 / math.sqrt(254 * 11)


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=30), max_size=6), st.integers(1, 6), st.booleans())
def test_frequent_is_low_by_its_bound_at_most(chunks, size, merging):
    frequent = Frequent(size)
    for chunk in chunks:
        part = Frequent(size) if merging else frequent
        part.add(Counter(chunk))
        if merging:
            frequent.merge(part)
    true = Counter(text for chunk in chunks for text in chunk)
    found = dict(frequent.top(99))
    assert frequent.undercount <= true.total() / (size + 1)
    for text, count in true.items():
        assert count - frequent.undercount <= found.get(text, 0) <= count
    if len(true) <= size:
        assert found == true
    assert len(found) < 2 * size + 1


def test_equals_come_by_the_alphabet():
    frequent = Frequent(9)
    frequent.add({"b": 2, "c": 3, "a": 2})
    assert frequent.top(2) == [("c", 3), ("a", 2)]
