"""Rows that are done are kept before their shard is: killed anywhere, nothing is lost and little is done twice."""

import os
import random
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import storage
from infra.data import work
from infra.data.actor import Actor
from infra.data.attempts import ATTEMPTS
from infra.data.faults import Faults
from infra.data.ledger import Ledger, commit, inspect, pack, record_of, tally
from infra.data.parts import PARTS, Part, all_parts, commit_part, cover, cut, gaps, parts_of, read_item
from infra.data.revision import Redo, revise
from infra.data.run import _plan
from infra.data.shards import shard_names, shard_url
from infra.data.telling import Telling
from infra.data.verify import verify_shards
from infra.data.work import Calls, StageWork

NAMES = ["000000", "000001"]
ROWS = {"000000": 23, "000001": 0}


class Killed(BaseException):
    """Ends a process where it stands."""


@dataclass
class Shout:
    """Speaks loudly; every seventh row is unfit, every fifth fails, and `calls` says what was asked."""

    calls: list[str] = field(default_factory=list)
    reads: tuple[str, ...] = ("text",)
    writes: tuple[str, ...] = ("loud", "size", "flag")
    cpus: float = 1
    gpus: float = 0
    counted: tuple[str, ...] = ("flag",)

    def setup(self):
        pass

    def __call__(self, batch):
        self.calls += batch["text"]
        numbers = [int(text) for text in batch["text"]]
        return {
            "loud": [f"{number}!" for number in numbers],
            "size": [number if number < 12 else number + 0.5 for number in numbers],  # whole numbers, then halves
            "flag": ["odd" if number % 2 and number > 15 else None for number in numbers],  # None alone at first
            "state": ["failed" if number % 5 == 0 else None for number in numbers],
            "reason": ["oom: five" if number % 5 == 0 else None for number in numbers],
        }


@dataclass
class Look(Shout):
    """Notes which rows came together."""

    batches: list[tuple[str, ...]] = field(default_factory=list)

    def __call__(self, batch):
        self.batches.append(tuple(batch["text"]))
        return super().__call__(batch)


class Dies(Shout):
    """Ends its process at its second batch."""

    def __call__(self, batch):
        if self.calls:
            raise Killed
        return super().__call__(batch)


def write_index(folder, rows=ROWS):
    for name, count in rows.items():
        states = ["rejected" if row % 7 == 3 else "accepted" for row in range(count)]
        table = {
            "sample_id": [f"{name}-{row}" for row in range(count)],
            "state": pa.array(states, pa.string()),
            "reason": pa.array(["no image" if state == "rejected" else None for state in states], pa.string()),
            "text": [str(row) for row in range(count)],
        }
        commit(folder, name, pa.table(table))
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_power_cut():
    """Processes are killed here, not machines: nothing need wait for a disk."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_index(str(tmp_path_factory.mktemp("index")))


@pytest.fixture(scope="module")
def plain(index, tmp_path_factory):
    """What an undisturbed actor makes, which commits nothing apart."""
    out = str(tmp_path_factory.mktemp("plain"))
    assert drive(out, index, seconds=100) == []
    assert PARTS not in storage.list_names(out)
    return {name: read(out, name) for name in NAMES}


def read(out, name):
    with storage.open_read(shard_url(out, name)) as file:
        return pq.read_table(file)


def plan(whole, out, actors):
    left = [name for name in NAMES if name not in shard_names(out)]
    return _plan(whole, left, all_parts(out), actors, Faults(out))


def drive(out, index, seconds=0.0, actors=1, calls=None, order=None):
    """A driver and its actors, one after another; what went wrong. A part is committed after each batch of three."""
    storage.remove(storage.join(out, ATTEMPTS))
    stage = Shout(calls if calls is not None else [])
    whole = StageWork((stage,), (index,), 3, Redo.of_folder(out))
    items = plan(whole, out, actors)
    actor = Actor(whole, out, 1000, seconds, resumed=bool(all_parts(out)))
    if order:
        order.shuffle(items)
    results = [actor._run(item) for item in items]
    return [result["error"] for result in results if result["error"]]


def check(out, index, plain):
    """The shards are those of an undisturbed run, and their records say so."""
    for name, table in plain.items():
        found = read(out, name)
        assert found.to_pylist() == table.to_pylist()
        assert found.schema.names == table.schema.names
        record, wanted = inspect(out, name), record_of(table, pack(table))
        assert {**record, "size": 0, "sha256": ""} == {**wanted, "size": 0, "sha256": ""}
    Ledger(out).close()
    assert list(verify_shards(out, [index], tally(out))) == []


def acts(monkeypatch, dies_at=-1, after=False, counted=None):
    """Count what is done to the storage, and die before or after one of the acts."""
    done = [0]

    def around(function):
        def act(*arguments, **options):
            done[0] += 1
            number = done[0]
            if counted is not None:
                counted.append(function.__name__)
            if number == dies_at and not after:
                raise Killed
            try:
                return function(*arguments, **options)
            finally:
                if number == dies_at and after:
                    raise Killed

        return act

    for name in ("write_bytes", "write_json", "remove", "read_json", "list_names", "exists"):
        monkeypatch.setattr(storage, name, around(getattr(storage, name)))


@pytest.mark.parametrize("actors", [1, 3])
def test_killed_between_any_two_acts_nothing_is_lost_and_nothing_done_twice(
    index, plain, tmp_path, monkeypatch, actors
):
    counted = []
    with monkeypatch.context() as patched:
        acts(patched, counted=counted)
        assert drive(str(tmp_path / "whole"), index, actors=actors) == []
    assert len(counted) > 20
    for number in range(1, len(counted) + 1):
        out, calls = str(tmp_path / str(number)), []
        with monkeypatch.context() as patched:
            acts(patched, number)
            with pytest.raises(Killed):
                drive(out, index, actors=actors, calls=calls)
        first = len(calls)
        assert drive(out, index, actors=actors, calls=calls) == []
        check(out, index, plain)
        again = sorted(calls, key=int)
        assert set(again) == {str(row) for row in range(23) if row % 7 != 3}
        twice = [text for text in set(again) if calls.count(text) > 1]
        assert len(twice) <= 3, f"killed at act {number}, {counted[number - 1]}: {twice} were asked twice"
        assert len(calls) - first <= 20


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_killed_again_and_again_with_ever_other_actors(index, plain, tmp_path_factory, seed):
    draw, out, calls = random.Random(seed), str(tmp_path_factory.mktemp("out")), []
    kills = draw.randint(1, 5)
    for _ in range(kills):
        with pytest.MonkeyPatch.context() as patched:
            acts(patched, draw.randint(1, 40), after=draw.random() < 0.5)
            try:
                seconds = draw.choice([0.0, 0.0, 100.0])
                drive(out, index, seconds, draw.randint(1, 4), calls, draw)
            except Killed:
                pass
    errors = drive(out, index, actors=draw.randint(1, 4), calls=calls, order=draw)
    assert [error for error in errors if "workers died" not in error] == []
    check(out, index, plain)


def test_rows_of_an_actor_that_outlived_its_driver_are_no_matter(index, plain, tmp_path):
    """Two actors at the same rows, in other parts: whoever merges takes each row once."""
    out, order = str(tmp_path), random.Random(0)
    whole = StageWork((Shout(),), (index,), 3)
    orphan, actor = (Actor(whole, out, 1000, 0.0) for _ in range(2))
    items = ["000000.0-9", "000000.4-12", "000000.15-23", "000000.2-16"]
    order.shuffle(items)
    for item in items[:3]:
        assert orphan._run(item)["error"] == ""
    assert drive(out, index, actors=4) == []
    assert orphan._run(items[3])["error"] == ""
    assert actor._run("000000")["error"] == ""
    check(out, index, plain)


def test_a_part_that_is_not_what_it_says_is_done_again(index, plain, tmp_path):
    out = str(tmp_path)
    whole = StageWork((Shout(),), (index,), 3)
    assert Actor(whole, out, 1000, 0.0)._run("000000.0-9")["error"] == ""
    first, second = parts_of(out, "000000")[:2]
    urls = [storage.join(out, PARTS, "000000", part.file) for part in (first, second)]
    storage.write_bytes(urls[0], b"torn")
    storage.write_bytes(urls[1], storage.read_bytes(urls[1])[:-1] + b"?")
    for url in urls:
        (error,) = drive(out, index)[:1]
        assert url in error
        assert "was removed" in error
    assert drive(out, index) == []
    check(out, index, plain)


def test_failed_rows_keep_their_state_and_are_tried_again_in_parts(index, plain, tmp_path):
    old, new = str(tmp_path / "0123456789abcdef"), str(tmp_path / "0123456789abcdef.1")
    assert drive(old, index) == []
    assert revise(old, new, ["oom"], leave=()) == ["000000"]
    calls = []
    assert drive(new, index, actors=3, calls=calls) == []
    assert sorted(map(int, calls)) == [0, 5, 15, 20]
    check(new, index, plain)  # they fail again


def test_how_rows_are_shared_out_is_no_matter_to_batches(index, tmp_path):
    """So that what a model says does not depend on the number of actors, nor on what was cut off."""
    seen = []
    for actors, seconds in ((1, 100.0), (2, 100.0), (4, 100.0), (4, 0.0)):
        stage, out = Look(), str(tmp_path / f"{actors}{seconds}")
        whole = StageWork((stage,), (index,), 3)
        items = plan(whole, out, actors)
        assert (len(items) > len(NAMES)) == (actors > len(NAMES))
        actor = Actor(whole, out, 1000, seconds)
        assert not any(actor._run(item)["error"] for item in items)
        seen.append(sorted(stage.batches))
    assert seen[0] == seen[1] == seen[2] == seen[3]


def test_a_shard_that_is_soon_done_has_no_parts_and_asks_for_no_more(index, tmp_path, monkeypatch):
    counted = []
    acts(monkeypatch, counted=counted)
    whole = StageWork((Shout(),), (index,), 3)
    actor = Actor(whole, str(tmp_path), 1000, 100.0, resumed=False)
    assert actor._run("000000")["error"] == ""
    assert counted == ["exists", "read_json", "write_json", "write_bytes", "write_bytes", "remove"]


class Ends(Shout):
    """Its server goes away at its third batch."""

    def __call__(self, batch):
        if len(self.calls) >= 6:
            raise storage.UnavailableError("The server is away.")
        return super().__call__(batch)


def test_a_place_that_is_away_fails_no_row_and_what_was_done_before_stays(index, plain, tmp_path):
    out = str(tmp_path)
    stage = Ends()
    result = Actor(StageWork((stage,), (index,), 3), out, 1000, 100.0)._run("000000")
    assert (result["error"], result["ended"]) == ("The server is away.", "away")
    assert parts_of(out, "000000") == [Part(0, 7, 4, 1, 2)]
    calls = []
    assert drive(out, index, calls=calls) == []
    assert sorted(map(int, stage.calls + calls)) == [row for row in range(23) if row % 7 != 3]
    check(out, index, plain)


def test_deaths_are_counted_anew_when_something_was_committed(index, tmp_path):
    out = str(tmp_path)
    for _ in range(5):
        actor = Actor(StageWork((Dies(),), (index,), 3), out, 1000, 0.0, resumed=False)
        with pytest.raises(Killed):
            actor._run("000000")
        assert storage.read_json(storage.join(out, ATTEMPTS, "000000"))["attempts"] == 1
    assert len(parts_of(out, "000000")) == 5


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8), st.integers(0, 30))
def test_gaps_are_the_rows_that_no_part_has(spans, count):
    parts = [Part(min(a, b), max(a, b), 0, 0, 0) for a, b in spans if a != b]
    covered = {row for part in parts for row in range(part.first, part.end)}
    found = gaps((0, count), parts)
    assert [row for first, end in found for row in range(first, end)] == [r for r in range(count) if r not in covered]
    assert all(first < end for first, end in found)
    assert {row for part in cover(parts) for row in range(part.first, part.end)} == covered


@given(st.lists(st.integers(0, 40)), st.integers(1, 20), st.integers(0, 20), st.integers(1, 20))
def test_pieces_are_the_gap(starts, least, first, length):
    gap = (first, first + length)
    pieces = cut(gap, sorted(starts), least)
    assert [row for a, b in pieces for row in range(a, b)] == list(range(*gap))
    assert all(b - a >= least for a, b in pieces[:-1])
    assert {a for a, _ in pieces[1:]} <= set(starts)


def test_items_are_named():
    assert [read_item(item) for item in ("000007", "000007.0-12")] == [("000007", None), ("000007", (0, 12))]


def test_a_stage_that_takes_any_rows_is_given_as_many_as_take_some_seconds(monkeypatch):
    monkeypatch.setattr(work, "CALL_SECONDS", 10)
    calls = Calls(16)
    calls.took(16, 1.0)
    assert calls.rows == 32
    calls.took(32, 5.0)
    assert calls.rows == 32
    calls.took(32, 40.0)
    assert calls.rows == 16
    calls.took(3, 0.1)  # the last of a shard says nothing of sixteen
    assert calls.rows == 16
    calls.took(16, 100.0)
    assert calls.rows == 16, "sixteen take no longer than one"


def test_what_is_told_is_rows_and_never_less(tmp_path):
    out, seen = str(tmp_path), []

    def report(done, total, unit, why, **figures):
        seen.append((done, total, unit, figures["rows"], figures["accepted"]))

    left = [Part(0, 10, 8, 1, 1)]
    telling = Telling(["a", "b", "c"], ["b", "c"], {"b": left}, {"a": 5, "b": 30, "c": 7}, out, report, lambda: "")
    record = {"rows_in": 30, "accepted": 25, "rejected": 3, "failed": 2}
    with telling:
        assert seen == [(15, 42, "rows", 0, 0)]
        for part in (*left, Part(10, 20, 10, 0, 0), Part(5, 20, 14, 0, 0)):
            commit_part(out, "b", part, pa.table({"state": []}))
        commit_part(out, "a", Part(0, 5, 5, 0, 0), pa.table({"state": []}))  # of a shard that was done before
        telling.look()
        assert seen[-1][:4] == (25, 42, "rows", 10)
        storage.remove(storage.join(out, PARTS))
        telling.look()
        assert seen[-1][0] == 25, "they were merged, and it is not told yet"
        assert seen[-1] == seen[-2], "nothing that was told is taken back"
        telling.ended("b", record)
        telling.ended("b", record)
        assert seen[-1] == (35, 42, "rows", 20, 17)
        telling.ended("c", {"rows_in": 7, "accepted": 7, "rejected": 0, "failed": 0})
        assert seen[-1] == (42, 42, "rows", 27, 24)


def test_without_counts_shards_are_told(tmp_path):
    seen = []
    with Telling(["a", "b"], ["b"], {}, {}, str(tmp_path), lambda *told, **_: seen.append(told), lambda: "") as telling:
        telling.ended("b", {"rows_in": 3, "accepted": 3, "rejected": 0, "failed": 0})
    assert seen == [(1, 2, "shards"), (2, 2, "shards")]
