"""Held-out rows are the first by sample id, and shards that have none of them are not opened."""

import heapq
import threading
from collections import defaultdict

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import storage
from infra.data import first
from infra.data.ledger import LEDGER, Ledger, commit, counting
from infra.data.shards import ShardReader
from infra.store import Artifact
from workflows import evaluate, held_out
from workflows.held_out import first_held_out

TEXTS = ("caption_alt", "reference_short", "reference_descriptive", "scene", "caption_short")


def make(path, shards, columns=("split",), first=("split",)):
    """An artifact of shards, lists of (sample id, split)."""
    ledger = Ledger(path)
    for number, rows in enumerate(shards):
        table = pa.table(
            {
                "sample_id": pa.array([sample_id for sample_id, _ in rows], pa.string()),
                "state": pa.array(["accepted" if split else "rejected" for _, split in rows], pa.string()),
                "reason": pa.nulls(len(rows), pa.string()),
                "split": pa.array([split for _, split in rows], pa.string()),
                **{name: pa.array([sample_id for sample_id, _ in rows], pa.string()) for name in TEXTS},
            }
        )
        ledger.add(f"{number:06d}", commit(path, f"{number:06d}", counting(table, columns, first=first)))
    ledger.close()
    return Artifact(path, {"step": "ingest", "id": "i", "inputs": [], "summary": {}, "files": {LEDGER: {}}})


# The first two by id lie in shards 4 and 1; 0 and 3 have no held-out row, 2 and 5 have later ones.
SHARDS = [
    [("00", "train"), ("01", None)],
    [("20", "test"), ("92", "test"), ("02", "train")],
    [("30", "test"), ("03", "train")],
    [("04", "restval")],
    [("90", "test"), ("10", "test")],
    [("40", "test")],
]


@pytest.fixture
def opened(monkeypatch):
    """The shards whose files were opened, in this process."""
    found, read = [], storage.open_read
    monkeypatch.setattr(
        storage, "open_read", lambda url, *more: found.append(storage.name(url)[:6]) or read(url, *more)
    )
    return found


def rows_of(how, images, count):
    if how is held_out:
        return [prompt.sample_id for prompt in held_out.held_out(images, count)]
    return [row["sample_id"] for row in evaluate.held_out(images, images, count)]


@pytest.mark.parametrize("how", [held_out, evaluate])
@pytest.mark.parametrize(
    ("count", "wanted"), [(2, {"000001", "000004"}), (9, {"000001", "000002", "000004", "000005"})]
)
def test_only_shards_that_have_some_are_opened(tmp_path, opened, how, count, wanted):
    images = make(str(tmp_path), SHARDS)
    assert rows_of(how, images, count) == ["10", "20", "30", "40", "90", "92"][:count]
    assert {*opened} == wanted


@pytest.mark.parametrize("how", [held_out, evaluate])
@pytest.mark.parametrize("columns", [(), ("split",)])
def test_an_index_of_before_is_read(tmp_path, opened, how, columns):
    images = make(str(tmp_path), SHARDS, columns, first=())
    assert rows_of(how, images, 2) == ["10", "20"]
    # As far as it counts splits, it says which have none at all.
    assert len({*opened}) == (4 if columns else 6)


def test_no_rows_are_of_no_shard(tmp_path, opened):
    assert evaluate.held_out(make(str(tmp_path), SHARDS), make(str(tmp_path), SHARDS), 0) == []
    assert opened == []
    assert held_out.held_out(make(f"{tmp_path}/none", SHARDS[:1]), 3) == []


def mixed(images, **weights):
    return Artifact("mixed", {"inputs": [images.path, images.path], "config": {"weights": weights}})


def test_prompts_are_of_training_rows_where_none_is_held_out(tmp_path, capsys, monkeypatch):
    images = make(f"{tmp_path}/a", SHARDS[:1])
    monkeypatch.setattr(Artifact, "inputs", property(lambda self: [images, images]))
    assert [prompt.text for prompt in held_out.prompts_of(mixed(images, short=1), 3)] == ["00"]
    assert "those of training rows" in capsys.readouterr().err
    nobody = make(f"{tmp_path}/b", [[("01", None)]])
    monkeypatch.setattr(Artifact, "inputs", property(lambda self: [nobody, nobody]))
    with pytest.raises(ValueError, match="has a caption to draw a picture for"):
        held_out.prompts_of(mixed(nobody, short=1), 3)


def test_prompts_are_what_was_written_where_the_corpus_says_nothing(tmp_path, monkeypatch):
    images = make(str(tmp_path), SHARDS)
    monkeypatch.setattr(Artifact, "inputs", property(lambda self: [images, images]))
    monkeypatch.setattr(held_out, "KNOWN", ())
    monkeypatch.setattr(held_out.held_out, "__defaults__", ((), ()))
    found = held_out.prompts_of(mixed(images, short=1), 2)
    assert [(prompt.text, prompt.place) for prompt in found] == [("10", ("000004", 1)), ("20", ("000001", 0))]


def test_shards_are_read_several_at_a_time(tmp_path, monkeypatch):
    images = make(str(tmp_path), SHARDS)
    together = threading.Barrier(4, timeout=20)  # breaks, unless four are read at once

    class Reader(ShardReader):
        def __init__(self, *arguments):
            together.wait()
            super().__init__(*arguments)

    monkeypatch.setattr(held_out, "ShardReader", Reader)
    assert len(held_out.held_out(images, 9)) == 6


ROWS = st.lists(st.tuples(st.sampled_from(["test", "train", None]), st.integers(0, 11), st.booleans()), max_size=40)


@given(ROWS, st.integers(0, 12), st.sets(st.integers(0, 11)), st.integers(1, 3))
def test_the_draw_is_that_of_all_rows(rows, count, unsaid, at_once):
    """Whatever lies where, whichever records say nothing, and which rows are left out when they are read."""
    shards = defaultdict(list)
    for number, (split, shard, left_out) in enumerate(rows):
        shards[f"{shard:02d}"].append((f"{number * 7919 % 101:03d}", split, left_out))
    tests = {name: [row for row in all_ if row[1] == "test"] for name, all_ in shards.items()}
    records = {
        name: {
            "counts": {"split": {split: 1 for _, split, _ in all_ if split}},
            "firsts": {"split": {"test": min(tests[name])[0]} if tests[name] else {}},
        }
        for name, all_ in shards.items()
        if int(name) not in unsaid
    }

    class Images:
        path = ""

        def records(self):
            return records

    def read(name):
        assert name not in records or tests[name]
        return [sample_id for sample_id, _, left_out in tests[name] if not left_out]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(first, "shard_names", lambda path: sorted(shards))
        patched.setattr(first, "AT_ONCE", at_once)
        found = first_held_out(Images(), count, read, str)
    assert found == heapq.nsmallest(count, [i for all_ in tests.values() for i, _, out in all_ if not out])
