"""Devices that fail: whatever fails where, every row ends in one state, and only rows at fault are failed.

Processes are objects here, and the driver gives items to them in turn; `test_run.py` has the same with Ray.
"""

import os
import pickle
from collections import Counter
from dataclasses import dataclass
from itertools import cycle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import storage
from infra.data import actor, run
from infra.data.actor import Actor
from infra.data.faults import Faults
from infra.data.health import Place
from infra.data.ledger import tally
from infra.data.parts import cut
from infra.data.shards import shard_names, shard_url
from infra.data.verify import verify_shards
from tests.infra.data.test_parts import Killed, write_index

ILL = "CUDA error: an illegal memory access was encountered"


class AcceleratorError(RuntimeError):
    """As torch calls its own."""


here = [Place("node", "host", "")]  # where the process is that is at work


@dataclass
class Sticky:
    """Numbers on a device that is lost to its process after a row of `poison`, or anywhere in the places `bad`."""

    poison: tuple[str, ...] = ()
    bad: tuple[Place, ...] = ()
    no_setup: tuple[Place, ...] = ()
    reads: tuple[str, ...] = ("sample_id", "text")
    writes: tuple[str, ...] = ("number",)
    cpus: float = 1
    gpus: float = 0
    lost: bool = False

    def setup(self):
        if here[0] in self.no_setup:
            raise RuntimeError("No CUDA GPUs are available")

    def __call__(self, batch):
        self.lost = self.lost or here[0] in self.bad or bool({*batch["sample_id"]} & {*self.poison})
        if self.lost:
            raise AcceleratorError(ILL)
        return {"number": [int(text) for text in batch["text"]]}


class Cluster:
    """Places that are given portions in turn, and which processes came and went; with `ends` the driver is killed."""

    def __init__(self, *places, ends=None):
        self.places, self.ends, self.born, self.rounds = places, ends, 0, 0

    def results(self, work, items, out, cpus, gpus, actors, resumed, avoided):
        self.rounds += 1
        processes = {place: None for place in self.places if place.node not in avoided}
        for place, portion in zip(cycle(processes), run.split(items, 8), strict=False):
            here[0] = place
            try:
                process = processes[place] or self.start(work, out, resumed)
                results = list(process({"names": [portion]}))
            except Killed:
                process = self.start(work, out, resumed)
                results = list(process({"names": [portion]}))
            processes[place] = process
            for result in results:
                if self.ends == 0:
                    raise Killed
                self.ends = self.ends and self.ends - 1
                yield {key: value[0] for key, value in result.items()}

    def start(self, work, out, resumed):
        self.born += 1
        return Actor(pickle.loads(pickle.dumps(work)), out, 1000, 100.0, resumed)


@pytest.fixture(scope="module", autouse=True)
def no_ray():
    def end(code):
        raise Killed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)
        patched.setattr(os, "_exit", end)
        patched.setattr(ray, "is_initialized", lambda: True)
        patched.setattr(actor, "_place", lambda: here[0])
        patched.setattr(run, "WAIT_SECONDS", 0)
        yield


def drive(stage, index, out, cluster, batch=8):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "_results", cluster.results)
        patched.setattr(run, "_nodes", lambda *_: {place.node for place in cluster.places})
        return run.run_stages([stage], [index], out, batch_size=batch, actors=(1, len(cluster.places)))


def rows_of(out):
    tables = [pq.read_table(storage.open_read(shard_url(out, name))) for name in shard_names(out)]
    return [row for table in tables for row in table.to_pylist()]


def check(out, index, poison):
    """Every row is there once, those of `poison` failed, and all others as they are without a fault."""
    rows, origin = rows_of(out), rows_of(index)
    assert [row["sample_id"] for row in rows] == [row["sample_id"] for row in origin]
    for row, before in zip(rows, origin, strict=True):
        if row["sample_id"] in poison:
            assert (row["state"], row["reason"]) == ("failed", f"device_error: Sticky: AcceleratorError: {ILL}")
        else:
            assert (row["state"], row["reason"]) == (before["state"], before["reason"])
        assert row["number"] == (int(before["text"]) if row["state"] == "accepted" else None)
    assert list(verify_shards(out, [index], tally(out))) == []
    assert {*storage.list_names(out)} <= {"ledger.json", "shards"}


ONE, TWO, THREE = (Place(name * 20, name, "") for name in "abc")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_index(str(tmp_path_factory.mktemp("index")), {"000000": 64, "000001": 64, "000002": 64})


@pytest.mark.parametrize("places", [(ONE,), (ONE, TWO)])
@pytest.mark.parametrize("batch", [8, 64])
def test_a_row_after_which_the_device_is_lost_is_found_and_no_other_fails(index, tmp_path, places, batch):
    out, cluster = str(tmp_path / "out"), Cluster(*places)
    counts = drive(Sticky(poison=("000001-37",)), index, out, cluster, batch)
    check(out, index, ["000001-37"])
    assert counts["failed"] == 1
    assert counts["reasons"]["device_error"] == 1
    assert counts["rows_in"] == 192 == counts["accepted"] + counts["rejected"] + counts["failed"]
    assert cluster.rounds <= 5


@pytest.mark.parametrize("ends", [0, 1, 2, 3, 5, 8, 13, 21, 30])
def test_a_driver_that_is_killed_on_the_way_is_followed_by_another(index, tmp_path, ends):
    out, poison = str(tmp_path / "out"), ("000000-0", "000001-63")
    try:
        drive(Sticky(poison), index, out, Cluster(ONE, ends=ends))
    except Killed:
        counts = drive(Sticky(poison), index, out, Cluster(TWO))
        assert counts["failed"] == 2
    check(out, index, poison)


@settings(max_examples=40)
@given(
    shards=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    picks=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=6),
    places=st.integers(1, 3),
    batch=st.integers(1, 50),
    kills=st.lists(st.integers(0, 25), max_size=3),
)
def test_whatever_rows_are_at_fault(tmp_path_factory, shards, picks, places, batch, kills):
    folder = tmp_path_factory.mktemp("drawn")
    rows = {"000000": 9} | {f"{number:06d}": count for number, count in enumerate(shards, 1)}
    index, out = write_index(str(folder / "index"), rows), str(folder / "out")
    names = [name for name in list(rows)[1:] if rows[name]]
    drawn = {(names[shard % len(names)], row) for shard, row in picks} if names else set()
    poison = tuple(sorted(f"{name}-{row % rows[name]}" for name, row in drawn))
    poison = tuple(each for each in poison if int(each.split("-")[1]) % 7 != 3)  # those are rejected, and never tried
    for ends in [*kills, None]:
        try:
            drive(Sticky(poison), index, out, Cluster(*[ONE, TWO, THREE][:places], ends=ends), batch)
        except Killed:
            continue
        break
    check(out, index, poison)


def test_a_bad_node_is_left_out_and_fails_no_row(tmp_path, capsys):
    index = write_index(str(tmp_path / "index"), {f"{n:06d}": 8 for n in range(40)})
    out, cluster = str(tmp_path / "out"), Cluster(ONE, TWO, THREE)
    drive(Sticky(bad=(TWO,)), index, out, cluster)
    check(out, index, [])
    err = capsys.readouterr().err
    assert err.count("is left out") == 1
    assert f"Node {TWO.node[:12]} (b) is left out: what it did failed 3 times in a row" in err
    assert cluster.rounds <= 3


def test_a_node_where_nothing_can_be_set_up_is_left_out(tmp_path, capsys):
    index = write_index(str(tmp_path / "index"), {f"{n:06d}": 8 for n in range(40)})
    out = str(tmp_path / "out")
    drive(Sticky(no_setup=(ONE,)), index, out, Cluster(ONE, TWO))
    check(out, index, [])
    assert "No CUDA GPUs are available" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shards", [{"000000": 3}, {"000000": 64}, {f"{n:06d}": 8 for n in range(40)}], ids=["few", "one", "many"]
)
def test_where_every_device_fails_the_run_ends_and_no_row_is_failed(tmp_path, shards):
    index, out = write_index(str(tmp_path / "index"), shards), str(tmp_path / "out")
    for places in ((ONE,), (ONE, TWO), (TWO,)):  # the first driver's knowledge is that of those that follow
        cluster = Cluster(*places)
        with pytest.raises(RuntimeError, match=rf"{len(shards)} shards of .* could not be made: .*{ILL}"):
            drive(Sticky(bad=(ONE, TWO)), index, out, cluster)
        assert cluster.born <= 40
        assert not shard_names(out)
    if len(shards) == 1:  # a device that is well finds what is left as it was
        drive(Sticky(), index, out, Cluster(THREE))
        check(out, index, [])


def test_where_nothing_can_be_set_up_the_run_ends_at_once(index, tmp_path):
    cluster = Cluster(ONE)
    with pytest.raises(RuntimeError, match=r"3 shards of .* could not be made: .*No CUDA GPUs are available"):
        drive(Sticky(no_setup=(ONE,)), index, str(tmp_path / "out"), cluster)
    assert cluster.born == 3


def test_one_bad_card_of_the_only_node_costs_time_alone(tmp_path):
    index = write_index(str(tmp_path / "index"), {f"{n:06d}": 8 for n in range(60)})
    out, cards = str(tmp_path / "out"), [ONE._replace(gpus=str(number)) for number in range(4)]
    drive(Sticky(bad=(cards[3],)), index, out, Cluster(*cards))
    check(out, index, [])


@dataclass
class Flaky:
    """Work that raises over a shard as often as is said, and keeps count of its tries."""

    raises: dict[str, int]

    def setup(self):
        pass

    def __call__(self, name):
        tries[name] += 1
        if tries[name] <= self.raises.get(name, 0):
            raise KeyError(name)
        return pa.table({"sample_id": [name], "state": ["accepted"], "reason": pa.array([None], pa.string())})


tries = Counter()


@pytest.mark.parametrize("every", [1, 4])
def test_shards_that_fail_are_tried_again_behind_the_others(tmp_path, monkeypatch, every):
    """Forty of 160 fail, many more than once ended a run, and one fails whenever it is tried."""
    names, out, cluster, waits = [f"{n:06d}" for n in range(160)], str(tmp_path), Cluster(ONE), []
    monkeypatch.setattr(run, "_results", cluster.results)
    monkeypatch.setattr(run.time, "sleep", waits.append)
    monkeypatch.setattr(run, "WAIT_SECONDS", 2)
    tries.clear()
    raises = dict.fromkeys(names[::4], 1) | {"000008": 2, "000012": 9}
    if every == 1:  # all do
        raises = dict.fromkeys(names, 9)
    with pytest.raises(RuntimeError, match=r"of .* could not be made: .* ended with KeyError"):
        run.run_shards(Flaky(raises), names, out)
    if every == 1:
        assert 17 <= len(tries) < 40
        assert waits == []
        return
    assert shard_names(out) == [name for name in names if name != "000012"]
    assert tries == {name: 1 + min(raises.get(name, 0), 2) for name in names}
    assert waits == [2, 4]


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 100)), min_size=1, max_size=12), st.integers(1, 300))
def test_cuts_go_down_to_single_rows(spans, rows):
    """Whatever failed, a run of rows that failed is in pieces next time, until it is one row."""

    class Told(Faults):
        def __init__(self):
            self._times = dict.fromkeys(["000000", *(f"000000.{a}-{a + n}" for a, n in spans if a + n <= rows)], 1)

    cuts = Told().cuts("000000", rows)
    assert cuts == sorted({*cuts})
    for first, end in [(0, rows), *((a, a + n) for a, n in spans if a + n <= rows)]:
        pieces = cut((first, end), cuts, 1)
        assert [row for a, b in pieces for row in range(a, b)] == list(range(first, end))
        assert max(b - a for a, b in pieces) <= -(-(end - first) // 16)
