import io
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from infra import storage
from infra.data import attempts, run
from infra.data.ledger import commit
from infra.data.portions import split
from infra.data.readers import find_corpus
from infra.data.run import run_shards, run_stages
from infra.data.shards import shard_names, shard_url
from infra.data.verify import verify_shards
from infra.metrics import Progress
from tests.infra.data.here import shards_here
from tests.infra.data.zoo import as_members, encode, picture, samples, tar, write_tars
from workflows.ingest import IngestConfig, IngestWork


@dataclass(frozen=True)
class Numbers:
    """Work whose table says which process made it; on some shards it fails, as often as a folder has no mark of it."""

    marks: str = ""
    dies: tuple[str, ...] = ()
    raises: tuple[str, ...] = ()
    times: int = 1
    seconds: float = 0

    def setup(self):
        pass

    def __call__(self, name):
        time.sleep(self.seconds)
        if name in self.dies + self.raises:
            marks = [self.marks + f"/{name}-{n}" for n in range(self.times)]
            if left := [mark for mark in marks if not os.path.exists(mark)]:
                Path(left[0]).touch()
                if name in self.dies:
                    os._exit(1)
                raise ValueError(f"shard {name} is ill")
        return pa.table(
            {"sample_id": [f"{name}{n}" for n in range(5)], "state": ["accepted"] * 5, "reason": [None] * 5}
        )


NAMES = [f"{n:06d}" for n in range(6)]


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    """What failed is tried again at once."""
    monkeypatch.setattr(run, "WAIT_SECONDS", 0)


def read_table(out):
    tables = [pq.read_table(storage.open_read(shard_url(out, name))) for name in shard_names(out)]
    return pa.concat_tables(tables, promote_options="permissive")  # a shard without accepted rows has columns of nulls


def read_rows(out):
    return read_table(out).to_pylist()


def stamps(out):
    return {file.url: file.tag for file in storage.listing(storage.join(out, "shards"))}


def test_a_rerun_does_what_is_missing_and_no_more(ray_cluster, place):
    seen = []

    def report(done, total, unit, **figures):
        seen.append((done, total, unit, figures["rows"]))

    def counted(work):
        counts = run_shards(work, NAMES, place, report=report)
        spent = counts.pop("actor_seconds")
        assert sum(spent.get(part, 0) for part in ("idle", "load", "write")) <= spent.get("all", 0) + 0.05
        return counts

    counts = counted(Numbers())
    assert counts == {"shards": 6, "rows_in": 30, "accepted": 30, "rejected": 0, "failed": 0, "reasons": {}}
    assert seen == [(n, 6, "shards", 5 * n) for n in range(7)]
    seen.clear()
    before = stamps(place)
    assert counted(Numbers(raises=tuple(NAMES))) == counts
    assert stamps(place) == before
    gone = shard_url(place, "000003")
    storage.remove(gone)
    assert counted(Numbers(marks="/nonexistent", raises=tuple({*NAMES} - {"000003"}))) == counts
    after = stamps(place)
    assert after.keys() == before.keys()
    assert [url for url in after if after[url] != before[url]] == [gone][: after[gone] != before[gone]]
    assert storage.list_names(place) == ["ledger.json", "shards"]


def test_a_shard_that_raises_does_not_stop_the_others(ray_cluster, tmp_path):
    out = str(tmp_path / "out")
    work = Numbers(str(tmp_path), raises=("000001", "000004"), times=3)
    with pytest.raises(RuntimeError, match=r"2 shards of .* could not be made: 000001, 000004\. Shard .* is ill"):
        run_shards(work, NAMES, out)
    assert shard_names(out) == ["000000", "000002", "000003", "000005"]
    assert run_shards(work, NAMES, out)["rows_in"] == 30


def test_a_worker_that_dies_is_replaced(ray_cluster, tmp_path):
    out = str(tmp_path / "out")
    assert run_shards(Numbers(str(tmp_path), dies=("000002",)), NAMES, out)["rows_in"] == 30
    assert storage.list_names(out) == ["ledger.json", "shards"]


def test_a_shard_that_kills_its_workers_is_given_up_and_named(ray_cluster, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"1 shards of .*: 000002\. .*3 workers died over it"):
        run_shards(Numbers(str(tmp_path), dies=("000002",), times=100), NAMES, out)
    assert len(shard_names(out)) == 5
    assert len(list(tmp_path.glob("000002-*"))) == 3


def test_a_broken_set_up_is_given_up_soon(ray_cluster, tmp_path):
    names = [f"{n:06d}" for n in range(60)]
    work = Numbers(str(tmp_path), raises=tuple(names), times=100)
    with pytest.raises(RuntimeError, match=r"60 shards of .* could not be made: 000000, 000001, 000002"):
        run_shards(work, names, str(tmp_path / "out"))


def test_a_worker_that_dies_within_a_part_does_each_shard_once(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SHARES", 4)
    names, seen = [f"{n:06d}" for n in range(40)], []
    assert len(split(names, 4)[0]) == 10
    work = Numbers(str(tmp_path), dies=("000004",), raises=("000007",), times=3)

    for number in range(2):  # it dies once, and the other raises whenever it is tried
        (tmp_path / f"000004-{number}").touch()

    def report(done, total, unit, **figures):
        seen.append(done)

    with pytest.raises(RuntimeError, match=r"1 shards of .*: 000007"):
        run_shards(work, names, str(tmp_path / "out"), actors=(1, 1), report=report)
    assert seen == list(range(40))
    assert run_shards(work, names, str(tmp_path / "out"))["rows_in"] == 200


@pytest.mark.timeout(120)
def test_a_step_that_stalls_says_which_worker_is_at_which_shard_and_where(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "BEAT_SECONDS", 0.3)
    monkeypatch.setattr("infra.metrics.LOOK_SECONDS", 0.2)
    stream = io.StringIO()
    with Progress("numbers", stream, stall_seconds=4) as progress:
        run_shards(Numbers(seconds=5), NAMES[:1], str(tmp_path / "out"), report=progress)
    lines = [line for line in stream.getvalue().splitlines() if "no progress" in line]
    assert lines, stream.getvalue()
    assert lines[0].startswith("numbers  0/1 shards  no progress for ")
    last = lines[-1]
    assert "1 CPUs; Ray has" in last or re.search(
        r"shard 000000 is with process \d+ on \S+ for \d+ s"
        r"(, at actor\.py:\d+ _make > test_run\.py:\d+ __call__)?; Ray has [\d.]+ of 8 CPUs free",
        last,
    )


def test_what_a_driver_is_told_of_workers(tmp_path):
    out, now = str(tmp_path), time.time()
    assert attempts.at_work(out, 2, 1) == "no worker is at a shard, and each asks for 2 CPUs and 1 GPUs"
    attempt = {"attempts": 1, "host": "node", "process": 71, "since": now - 100}
    beats = [{"beat": now - 1, "doing": "run.py:1 f"}, {"beat": now - 50, "doing": "run.py:1 f"}, {}, {}, {}]
    for name, beat in zip(NAMES, beats, strict=False):
        storage.write_json(storage.join(out, attempts.ATTEMPTS, name), attempt | beat)
    first, second, third, rest = attempts.at_work(out, 2, 1).split("; ")
    assert first == "shard 000000 is with process 71 on node for 100 s, at run.py:1 f"
    assert second == "shard 000001 is with process 71 on node for 100 s, which says nothing for 50 s"
    assert third == "shard 000002 is with process 71 on node for 100 s, which says nothing for 100 s"
    assert rest == "2 more shards are at work"


def test_a_worker_says_where_it_is(tmp_path):
    url = str(tmp_path / "attempts" / "000000")
    with attempts.Attempt(str(tmp_path), "000000", 0.1):
        time.sleep(0.5)
        told = storage.read_json(url)
    assert told["attempts"] == 1
    assert time.time() - told["beat"] < 5
    assert re.search(r"test_run\.py:\d+ test_a_worker_says_where_it_is$", told["doing"])
    time.sleep(0.3)
    assert not storage.exists(url), "it is not written after its end"


@dataclass(frozen=True)
class Crowd:
    """Work that leaves its process's mark; on the last shard it waits until the other processes have gone."""

    marks: str
    last: str

    def setup(self):
        pass

    def __call__(self, name):
        Path(self.marks, str(os.getpid())).touch()
        time.sleep(0.3)
        deadline = time.monotonic() + 30
        while name == self.last and self.alive() > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        return pa.table({"sample_id": [name], "state": ["accepted"], "reason": [None], "alive": [self.alive()]})

    def alive(self):
        return sum(psutil.pid_exists(int(mark.name)) for mark in Path(self.marks).iterdir())


@pytest.mark.timeout(120)
def test_actors_come_as_there_is_work_and_go_when_it_ends(ray_cluster, tmp_path):
    names = [f"{n:06d}" for n in range(80)]
    marks, out = tmp_path / "marks", str(tmp_path / "out")
    marks.mkdir()
    run_shards(Crowd(str(marks), names[-1]), names, out, actors=(1, 3))
    alive = [row["alive"] for row in read_rows(out)]
    assert alive[0] == 1
    assert 2 <= max(alive) <= 3
    assert alive[-1] == 1


@dataclass(frozen=True)
class Mean:
    """The mean of an image, checked against the picture that it ought to be; pictures of one number are disliked."""

    reads: tuple[str, ...] = ("pixels", "image", "caption_alt")
    writes: tuple[str, ...] = ("mean", "codes")
    cpus: float = 1
    gpus: float = 0
    dislikes: int = -1
    raises_at: int = -1

    def setup(self):
        assert not hasattr(self, "ready")
        object.__setattr__(self, "ready", True)

    def __call__(self, batch):
        assert self.ready
        numbers = [int(caption.split()[2].strip(",")) for caption in batch["caption_alt"]]
        if self.raises_at in numbers:
            raise KeyError("a bad row")
        for number, pixels, image in zip(numbers, batch["pixels"], batch["image"], strict=True):
            assert np.array_equal(pixels, picture(number))
            assert image == encode(pixels)
        bad = [number == self.dislikes for number in numbers]
        return {
            "mean": [float(pixels.mean()) for pixels in batch["pixels"]],
            "codes": [np.array([number, 7], dtype=np.int16) for number in numbers],
            "state": ["rejected" if b else None for b in bad],
            "reason": ["disliked" if b else None for b in bad],
        }


@pytest.fixture
def index(place):
    """Two healthy shards of six rows, one torn in the middle, and an empty one."""
    corpus, out = storage.join(place, "corpus"), storage.join(place, "ingest")
    write_tars(corpus)
    rows = list(as_members(samples(6, 12)))
    storage.write_bytes(storage.join(corpus, "00002.tar"), tar(rows)[:5000])
    storage.write_bytes(storage.join(corpus, "00003.tar"), tar([]))
    sources = find_corpus(corpus).sources
    shards_here(IngestWork(IngestConfig(corpus=corpus), sources, out), list(sources), out)
    return out


def test_stages_write_sidecars_for_every_row(ray_cluster, index, place):
    out = storage.join(place, "means")
    counts = run_stages([Mean(dislikes=3, raises_at=8)], [index], out, batch_size=4)
    rows, origin = read_rows(out), read_rows(index)
    assert [row["sample_id"] for row in rows] == [row["sample_id"] for row in origin]
    assert counts["rows_in"] == len(rows) == counts["accepted"] + counts["rejected"] + counts["failed"]
    accepted = [row for row in rows if row["state"] == "accepted"]
    assert counts["accepted"] == len(accepted) == sum(row["state"] == "accepted" for row in origin) - 2
    assert all(row["mean"] is not None and row["codes"][1] == 7 for row in accepted)
    assert {row["reason"] for row in rows if row["state"] != "accepted"} >= {
        "disliked",
        "error: Mean: KeyError: 'a bad row'",
    }
    assert counts["reasons"] == {
        "disliked": 1,
        "error": 1,
        "cut off with its archive": 1,
        "truncated archive": 1,
        "the archive holds no samples": 1,
    }
    schema = pq.read_schema(storage.open_read(shard_url(out, "000000")))
    assert schema.field("codes").type == pa.list_(pa.int16())


def test_ids_do_not_depend_on_where_the_corpus_lies(tmp_path, s3):
    ids = []
    for folder in (str(tmp_path), s3):
        corpus, out = storage.join(folder, "corpus"), storage.join(folder, "ingest")
        write_tars(corpus)
        sources = find_corpus(corpus).sources
        shards_here(IngestWork(IngestConfig(corpus=corpus), sources, out), list(sources), out)
        ids.append(read_table(out).drop_columns(["source"]))
    assert ids[0] == ids[1]
    assert len(set(ids[0]["sample_id"].to_pylist())) == 12


def test_a_driver_that_is_killed_is_followed_by_another(ray_cluster, tmp_path):
    """SIGKILL in the middle: the next run does the rest, and every row is there once."""
    out = str(tmp_path / "out")
    script = (
        "import ray;"
        "ray.init('local', num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level='error');"
        "from tests.infra.data.test_run import NAMES, Numbers; from infra.data.run import run_shards;"
        f"run_shards(Numbers(seconds=0.7), NAMES, {out!r}, actors=(2, 2))"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 40
    while len(shard_names(out)) < 2 and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = stamps(out)
    assert 2 <= len(before) < 6
    counts = run_shards(Numbers(), NAMES, out)
    assert counts["rows_in"] == 30
    after = stamps(out)
    assert {url: after[url] for url in before} == before
    ids = [f"{name}{n}" for name in NAMES for n in range(5)]
    assert sorted(row["sample_id"] for row in read_rows(out)) == ids


@dataclass(frozen=True)
class Fragile(Numbers):
    """Kills the first worker that receives it, before it can say a word."""

    home: int = 0

    def __setstate__(self, state):
        mark = Path(state["marks"], "born")
        if os.getpid() != state["home"] and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        self.__dict__.update(state)


def test_a_worker_that_is_killed_at_birth_is_replaced(ray_cluster, tmp_path):
    out = str(tmp_path / "out")
    assert run_shards(Fragile(str(tmp_path), home=os.getpid()), NAMES, out)["rows_in"] == 30
    assert (tmp_path / "born").exists()


ORPHAN = """
import sys
import time
from infra.data.actor import Actor
from tests.infra.data.test_run import MANY, Numbers
actor = Actor(Numbers(seconds=0.02), sys.argv[1])
while True:
    for result in actor({"names": [MANY]}):
        assert not result["error"][0] or "FileNotFoundError" in result["error"][0], result
    time.sleep(0.1)  # all is done for now: two that never rest would leave the driver no core
"""
MANY = [f"{n:06d}" for n in range(60)]


@pytest.mark.long
@pytest.mark.timeout(240)
def test_actors_that_outlive_their_driver_do_no_harm(ray_cluster, tmp_path):
    """Two processes go on over all shards, as actors of a dead driver would, while another driver does its work."""
    out = str(tmp_path / "out")
    orphans = [subprocess.Popen([sys.executable, "-c", ORPHAN, out], cwd=Path(__file__).parents[3]) for _ in range(2)]
    try:
        deadline = time.monotonic() + 40
        while len(shard_names(out)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        counts = run_shards(Numbers(seconds=0.02), MANY, out)
        assert all(orphan.poll() is None for orphan in orphans)
    finally:
        for orphan in orphans:
            orphan.kill()
            orphan.wait()
    assert counts["rows_in"] == counts["accepted"] == 5 * len(MANY)
    ids = [row["sample_id"] for row in read_rows(out)]
    assert len(ids) == len(set(ids)) == 5 * len(MANY)
    assert list(verify_shards(out, [], counts)) == []


def test_a_node_that_goes_is_told_in_words(ray_cluster, tmp_path, monkeypatch):
    def results(*_):
        yield {"name": "000000", "ended": "raised", "error": "ill", "seconds": "{}", "place": '["a", "b", ""]'}
        raise ray.exceptions.NodeDiedError("The node has died.")

    monkeypatch.setattr(run, "_results", results)
    with pytest.raises(RuntimeError, match=r"Ray broke off: .*node has died\. .* give the same command again\."):
        run_shards(Numbers(), NAMES, str(tmp_path / "out"))


@dataclass(frozen=True)
class Away(Numbers):
    """Work whose server is away."""

    def __call__(self, name):
        Path(self.marks, name).touch()
        raise storage.UnavailableError("The server of s3://x is away.")


def test_a_place_that_is_away_ends_the_run_soon_and_in_its_words(ray_cluster, tmp_path):
    with pytest.raises(RuntimeError, match=r"60 shards .* ended with The server of s3://x is away\.$"):
        run_shards(Away(str(tmp_path)), MANY, str(tmp_path / "out"))
    assert len(list(tmp_path.glob("0*"))) < 30


@dataclass(frozen=True)
class Signed(Numbers):
    """Work that says which process did it."""

    def __call__(self, name):
        table = super().__call__(name)
        return table.append_column("pid", [[os.getpid()] * len(table)])


@pytest.mark.timeout(120)
def test_two_shards_are_two_actors_work(ray_cluster, tmp_path):
    """Not one actor's, one after the other, while the second has none."""
    for attempt in range(3):
        out = str(tmp_path / str(attempt))
        run_shards(Signed(seconds=1), ["000000", "000001"], out, actors=(2, 2))
        assert len({row["pid"] for row in read_rows(out)}) == 2


@dataclass
class Sticky:
    """Numbers on a device that is lost to its process after a row of `poison`, and always on the nodes but `well`."""

    poison: str = ""
    well: str = ""
    reads: tuple[str, ...] = ("sample_id", "text")
    writes: tuple[str, ...] = ("number", "pid")
    cpus: float = 1
    gpus: float = 0
    lost: bool = False

    def setup(self):
        self.lost = bool(self.well) and ray.get_runtime_context().get_node_id() != self.well

    def __call__(self, batch):
        self.lost = self.lost or self.poison in batch["sample_id"]
        if self.lost:
            raise AcceleratorError("CUDA error: an illegal memory access was encountered")
        return {"number": [int(text) for text in batch["text"]], "pid": [os.getpid()] * len(batch["text"])}


class AcceleratorError(RuntimeError):
    """As torch calls its own."""


def write_rows(folder, shards, rows):
    for name in [f"{number:06d}" for number in range(shards)]:
        ids = [f"{name}-{row}" for row in range(rows)]
        table = {"sample_id": ids, "state": ["accepted"] * rows, "reason": pa.array([None] * rows, pa.string())}
        commit(folder, name, pa.table(table | {"text": [str(row) for row in range(rows)]}))
    return folder


@pytest.mark.timeout(120)
def test_a_row_after_which_the_device_is_lost_is_found_by_processes_that_end(ray_cluster, tmp_path):
    index, out = write_rows(str(tmp_path / "index"), 2, 32), str(tmp_path / "out")
    counts = run_stages([Sticky("000001-21")], [index], out, batch_size=64, actors=(1, 1))
    rows = read_rows(out)
    assert [row["sample_id"] for row in rows] == [row["sample_id"] for row in read_rows(index)]
    (failed,) = [row for row in rows if row["state"] == "failed"]
    assert failed["sample_id"] == "000001-21"
    assert failed["reason"].startswith("device_error: Sticky: AcceleratorError: CUDA error: an illegal memory access")
    assert counts["accepted"] == 63
    assert counts["reasons"] == {"device_error": 1}
    assert [row["number"] for row in rows] == [*range(32), *range(21), None, *range(22, 32)]
    assert len({row["pid"] for row in rows}) > 2
    assert storage.list_names(out) == ["ledger.json", "shards"]


TWO_NODES = """
import sys
import ray
from ray.cluster_utils import Cluster
from infra.data.run import run_stages
from tests.infra.data.test_run import Sticky, write_rows
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
cluster.add_node(num_cpus=2)
ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
index, out = write_rows(sys.argv[1], 24, 8), sys.argv[2]
well = ray.get_runtime_context().get_node_id()
counts = run_stages([Sticky(well=well)], [index], out, batch_size=8, actors=(4, 4))
assert counts["accepted"] == counts["rows_in"] == 192, counts
(bad,) = [node["NodeID"] for node in ray.nodes() if node["NodeID"] != well]
print("left out:", bad[:12], flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_node_whose_devices_fail_is_left_out_by_its_id(tmp_path):
    line = [sys.executable, "-c", TWO_NODES, str(tmp_path / "index"), str(tmp_path / "out")]
    done = subprocess.run(line, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    bad = re.findall(r"^left out: (\w+)$", done.stdout, re.MULTILINE)[-1]  # Ray may say more while it ends
    assert re.search(rf"^rescribe: Node {bad} \(\S+\) is left out: .*illegal memory access", done.stderr, re.MULTILINE)
    assert {row["state"] for row in read_rows(str(tmp_path / "out"))} == {"accepted"}
