"""The ledger says what was committed, whoever died on the way, and no finished shard is read again."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest

from infra import storage
from infra.data import ledger
from infra.data.ledger import JOURNAL, LEDGER, Ledger, commit, counting, inspect, recorded, tally
from infra.data.shards import shard_url
from infra.data.verify import verify_shards

NAMES = [f"{n:06d}" for n in range(4)]


def put(out, name, failed=1):
    states = ["accepted"] * 3 + ["failed"] * failed
    reasons = [None] * 3 + ["oom: Caption: too large"] * failed
    ids = [f"{name}{row}" for row in range(len(states))]
    return commit(out, name, pa.table({"sample_id": ids, "state": states, "reason": reasons}))


def test_a_record_is_that_of_the_file(place):
    record = put(place, "000000")
    assert record == inspect(place, "000000")
    assert record | storage.digest(shard_url(place, "000000")) == record
    assert record["reasons"] == {"oom": 1}


ROWS = {
    "sample_id": ["d", "c", "b", "a", "e"],
    "state": ["accepted", "accepted", "accepted", "failed", "accepted"],
    "reason": [None, None, None, "oom", None],
    "fault": ["small: 1", "small: 2", None, "lost", "narrow"],
    "weight": pa.array([0.1, 0.25, None, 9.0, 1e8], pa.float32()),
}


def test_figures_of_a_shard_are_those_of_its_accepted_rows(place):
    table = counting(pa.table(ROWS), ["fault"], summed=["weight"], first=["fault"])
    record = commit(place, "000000", table)
    assert record["counts"] == {"fault": {"narrow": 1, "small": 2}}
    assert record["sums"] == {"weight": math.fsum(np.float32([0.1, 0.25, 1e8]).tolist())}
    assert record["firsts"] == {"fault": {"narrow": "e", "small": "c"}}
    assert record == inspect(place, "000000")
    Ledger(place).close()
    assert list(verify_shards(place, [], {})) == []


def test_figures_that_a_record_lacks_are_read_and_no_others(place, monkeypatch):
    for name in NAMES:
        noted = {NAMES[0]: ([],), NAMES[1]: (["fault"], ["weight"]), NAMES[2]: (["fault"],), NAMES[3]: (["state"],)}
        commit(place, name, counting(pa.table(ROWS), *noted[name]))
    Ledger(place).close()
    opened, read = [], storage.open_read
    monkeypatch.setattr(storage, "open_read", lambda url, *more: opened.append(url) or read(url, *more))
    found = recorded(place, ["fault"], ["weight"])
    assert {shard_url(place, name) for name in NAMES} - {*opened} == {shard_url(place, NAMES[1])}
    assert [record["counts"]["fault"] for record in found] == [{"narrow": 1, "small": 2}] * 4
    assert len({record["sums"]["weight"] for record in found}) == 1
    opened.clear()
    assert [each["counts"]["fault"] for each in recorded(place, ["fault"])] == [{"narrow": 1, "small": 2}] * 4
    assert {*opened} == {shard_url(place, name) for name in (NAMES[0], NAMES[3])}


def test_what_was_noted_is_not_read_again(place, monkeypatch):
    first = Ledger(place)
    for name in NAMES[:2]:
        first.add(name, put(place, name))
    first.save()
    put(place, NAMES[2])  # committed, and its driver killed before it noted it
    read = []
    monkeypatch.setattr(ledger, "inspect", lambda out, name: read.append(name) or inspect(out, name))
    second = Ledger(place)
    second.add(NAMES[3], put(place, NAMES[3], failed=2))
    second.close()
    assert read == [NAMES[2]]
    assert storage.list_names(place) == [LEDGER, "shards"]
    assert tally(place) == {
        "shards": 4,
        "rows_in": 17,
        "accepted": 12,
        "rejected": 0,
        "failed": 5,
        "reasons": {"oom": 5},
    }
    assert read == [NAMES[2]]


def test_a_ledger_is_opened_without_reading(place, monkeypatch):
    for name in NAMES:
        first = Ledger(place)  # one piece of the journal for each shard, as many drivers leave it
        first.add(name, put(place, name))
        first.save()

    def refuse(*_):
        raise AssertionError("nothing is asked of the storage")

    with monkeypatch.context() as patched:
        for function in ("read_bytes", "read_json", "list_names", "exists"):
            patched.setattr(storage, function, refuse)
        second = Ledger(place)
    monkeypatch.setattr(ledger, "inspect", refuse)
    assert sorted(second.complete()) == NAMES


def test_a_finished_ledger_is_not_written_again(place):
    one = Ledger(place)
    one.add("000000", put(place, "000000"))
    one.close()
    before = storage.listing(storage.join(place, LEDGER))
    Ledger(place).close()
    assert storage.listing(storage.join(place, LEDGER)) == before


def test_a_shard_that_is_gone_is_not_counted(place):
    one = Ledger(place)
    for name in NAMES:
        one.add(name, put(place, name))
    one.close()
    storage.remove(shard_url(place, NAMES[1]))
    assert tally(place)["shards"] == 3
    Ledger(place).close()
    assert sorted(storage.read_json(storage.join(place, LEDGER))) == [NAMES[0], *NAMES[2:]]


@pytest.mark.parametrize("shards", [10, 1000])
def test_a_record_takes_some_hundred_bytes_however_many_there_are(tmp_path, shards):
    one = Ledger(str(tmp_path))
    record = put(str(tmp_path), "000000")
    for n in range(shards):
        one.add(f"{n:06d}", record)
    one.save()
    (journal,) = storage.list_names(f"{tmp_path}/{JOURNAL}")
    text = storage.read_bytes(f"{tmp_path}/{JOURNAL}/{journal}")
    assert len(json.loads(text)) == shards
    assert len(text) / shards < 300


def test_values_of_chosen_columns_are_counted_in_accepted_rows(tmp_path):
    table = pa.table(
        {
            "sample_id": ["a", "b", "c", "d"],
            "state": ["accepted", "accepted", "failed", "accepted"],
            "reason": pa.array([None, None, "oops", None], pa.string()),
            "flag": pa.array(["loop", None, "loop", "loop"], pa.string()),
            "tries": [1, 1, 2, 3],
        }
    )
    record = commit(str(tmp_path), "000000", counting(table, ["flag", "tries"]))
    assert record["counts"] == {"flag": {"loop": 2}, "tries": {"1": 2, "3": 1}}
    assert inspect(str(tmp_path), "000000") == record, "a record that is made anew says the same"
    assert "counts" not in commit(str(tmp_path), "000001", table)
