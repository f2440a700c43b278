import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.detect import FAULTS
from captioner.faults import STRIP, WORST, Faults

flags = st.none() | st.sampled_from(FAULTS)
shards = st.lists(st.lists(st.tuples(flags, st.integers(1, 3)), max_size=9), max_size=40)


def count(parts):
    faults = Faults()
    for number, rows in enumerate(parts):
        faults.add(f"{number:06d}", [flag for flag, _ in rows], [tries for _, tries in rows])
    return faults


@given(shards)
def test_the_report_agrees_with_counting_by_hand(parts):
    found, rows = count(parts).report(), [row for part in parts for row in part]
    total = len(rows)
    assert found["count"] == total
    told = [flag for flag, _ in rows if flag]
    assert found["faults"] == pytest.approx({flag: told.count(flag) / total for flag in told})
    assert list(found["faults"]) == [fault for fault in FAULTS if fault in found["faults"]]
    assert found["faulty"] == pytest.approx(sum(found["faults"].values()))
    if total:
        assert found["decoded_again"] == sum(tries > 1 for _, tries in rows) / total
        assert found["mended"] == sum(tries > 1 and flag is None for flag, tries in rows) / total
    shares = {f"{n:06d}": sum(flag is not None for flag, _ in part) / len(part) for n, part in enumerate(parts) if part}
    faulty = sorted((share for share in shares.values() if share), reverse=True)
    assert [one["share"] for one in found["worst"]] == faulty[:WORST]
    assert all(shares[one["shard"]] == one["share"] for one in found["worst"])
    assert found["strip"] == pytest.approx(list(shares.values()))
    assert sum(n for _, n in found["histogram"]) == found["shards"] == len(shares)
    low = -1.0
    for end, n in found["histogram"]:
        assert n == sum(low < share <= end for share in shares.values())
        low = end
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_ten_thousand_shards_stay_small():
    draw = np.random.default_rng(0)
    rates = draw.random(10_000) * 0.1
    rates[7000] = 1
    faults = Faults()
    for number, rate in enumerate(rates):
        faults.add(f"{number:06d}", ["empty" if one < rate else None for one in draw.random(20)])
    found = faults.report()
    assert (found["shards"], len(found["worst"]), len(found["strip"])) == (10_000, WORST, STRIP)
    assert len(json.dumps(found)) < 8000
    assert len(pickle.dumps(faults)) < 1_000_000
    assert found["worst"][0] == {"shard": "007000", "rows": 20, "share": 1.0, "fault": "empty"}
    # Stretches of a strip lie side by side and leave none out: their mean, by their shards, is that of the corpus.
    sizes = np.diff([round(10_000 * place / STRIP) for place in range(STRIP + 1)])
    assert np.average(found["strip"], weights=sizes) == pytest.approx(found["faulty"])
    assert found["decoded_again"] is None


def test_flags_of_others_count_by_their_own_words():
    faults = Faults()
    faults.add("a", [True, False, np.bool_(True), float("nan"), None, "", "blurred", "empty"], [None] * 8)
    found = faults.report()
    assert found["faults"] == {"empty": 1 / 8, "blurred": 1 / 8, "flagged": 2 / 8}
    assert list(found["faults"]) == ["empty", "blurred", "flagged"]
    assert found["worst"][0]["fault"] == "flagged"
    assert (found["decoded_again"], found["mended"]) == (None, None)
    with pytest.raises(ValueError, match="zip"):
        faults.add("b", [None, None], [1])


def test_shards_without_rows_have_no_rate():
    faults = Faults()
    faults.add("a", [], [])
    assert faults.report()["shards"] == 0
    assert faults.report()["strip"] == []
