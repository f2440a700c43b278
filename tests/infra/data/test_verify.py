"""A whole artifact is proved whole, and whatever is done to it is found and named; what failed is tried again."""

import random
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import storage
from infra.cluster import Cluster
from infra.data.ledger import Ledger, commit, pending, tally
from infra.data.revision import Redo, revise
from infra.data.shards import joined_names, shard_url
from infra.data.verify import verify_files, verify_shards
from infra.data.work import StageWork
from infra.store import Artifact, Store, step

SHARDS, ROWS = 3, 8
BROKEN: set[str] = set()  # texts on which the stage fails, and how


@dataclass(frozen=True, kw_only=True)
class Config:
    batch: int = 3


@dataclass
class Shout:
    reads: tuple[str, ...] = ("text",)
    writes: tuple[str, ...] = ("loud", "codes")
    cpus: float = 1
    gpus: float = 0
    calls: list[str] = field(default_factory=list)

    def setup(self):
        pass

    def __call__(self, batch):
        self.calls += batch["text"]
        for text in batch["text"]:
            if f"oom {text}" in BROKEN:
                raise MemoryError(text)
            if f"slow {text}" in BROKEN:
                raise TimeoutError(text)
        return {"loud": [text.upper() for text in batch["text"]], "codes": [[len(text), 1] for text in batch["text"]]}


@step(version=1)
def index(config: Config, *, out, cluster, report):
    for shard in range(SHARDS):
        name = f"{shard:06d}"
        texts = [f"t{shard}-{row}" for row in range(ROWS)]
        states = ["accepted"] * (ROWS - 1) + ["rejected"]
        reasons = [None] * (ROWS - 1) + ["no image"]
        ids = [f"{name}-{row}" for row in range(ROWS)]
        if pending(out, [name]):
            commit(out, name, pa.table({"sample_id": ids, "state": states, "reason": reasons, "text": texts}))
    Ledger(out).close()
    return tally(out)


CALLS: list[str] = []


@step(version=1)
def shout(config: Config, rows: Artifact, *, out, cluster, report):
    stage = Shout()
    work = StageWork((stage,), (rows.path,), config.batch, Redo.of_folder(out))
    work.setup()
    for name in pending(out, joined_names([rows.path])):
        commit(out, name, work(name))
    Ledger(out).close()
    CALLS[:] = stage.calls
    return tally(out)


@step(version=1)
def listen(config: Config, loud: Artifact, *, out, cluster, report):
    return {"heard": loud.id}


@pytest.fixture
def store(place):
    BROKEN.clear()
    return Store(f"{place}/store", Cluster(name="test"))


def made(store):
    return store.step(shout, Config(), store.step(index, Config()))


def faults(artifact):
    found = list(verify_files(artifact.path, artifact.manifest["files"]))
    return found + list(verify_shards(artifact.path, [each.path for each in artifact.inputs], artifact.summary))


def table(artifact, name="000001"):
    with storage.open_read(shard_url(artifact.path, name)) as file:
        return pq.read_table(file)


def test_an_untouched_artifact_is_whole(store):
    artifact = made(store)
    assert artifact.summary["rows_in"] == SHARDS * ROWS == artifact.summary["accepted"] + artifact.summary["rejected"]
    assert faults(artifact) == []
    assert faults(artifact.inputs[0]) == []


def test_any_changed_byte_is_found_and_its_shard_named(tmp_path):
    BROKEN.clear()
    artifact = made(Store(str(tmp_path), Cluster(name="test")))
    url = shard_url(artifact.path, "000001")
    data = storage.read_bytes(url)
    for place in random.Random(0).sample(range(len(data)), 40):
        storage.write_bytes(url, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        found = faults(artifact)
        assert found, place
        assert all("shard 000001" in fault for fault in found)
    storage.write_bytes(url, data)
    assert faults(artifact) == []


def test_a_row_removed_or_twice_a_shard_missing_or_strange(store):
    artifact = made(store)
    url, whole = shard_url(artifact.path, "000001"), table(artifact)

    def put(changed):
        sink = pa.BufferOutputStream()
        pq.write_table(changed, sink)
        storage.write_bytes(url, sink.getvalue().to_pybytes())
        return " ".join(faults(artifact))

    assert "lacks 1 rows" in put(whole.slice(1))
    assert "holds 1 sample ids twice" in put(pa.concat_tables([whole.slice(1), whole.slice(1, 1)]))
    assert "other columns" in put(whole.drop_columns(["loud"]))
    odd = whole.set_column(1, "state", pa.array(["accepted"] * (ROWS - 1) + ["lost"]))
    assert "neither accepted, rejected nor failed" in put(odd)
    storage.remove(url)
    assert "shard 000001 is missing" in " ".join(faults(artifact))
    put(whole)
    commit(artifact.path, "000009", whole)
    assert "shard 000009 is not in the ledger" in " ".join(faults(artifact))


def test_a_changed_ledger_is_found(store):
    artifact = made(store)
    url = artifact.url("ledger.json")
    records = storage.read_json(url)
    records["000000"]["accepted"] += 1
    storage.write_json(url, records)
    found = " ".join(faults(artifact))
    assert "ledger.json has changed" in found
    assert "shard 000000 has changed: accepted" in found


def test_only_what_failed_is_tried_again(store):
    BROKEN.update({"oom t1-2", "slow t1-3", "oom t2-0"})
    artifact = made(store)
    assert artifact.summary["failed"] == 3
    assert artifact.summary["reasons"]["oom"] == 2
    BROKEN.clear()
    renewed = store.retry(artifact, shout, Config(), ["oom"])
    assert sorted(CALLS) == ["t1-2", "t2-0"]
    assert renewed.id == f"{artifact.id}.1"
    assert renewed.summary["failed"] == 1
    assert faults(renewed) == []
    assert faults(artifact) == []  # and it stays as it was
    assert table(renewed, "000000").equals(table(artifact, "000000"))
    before, after = table(artifact).to_pylist(), table(renewed).to_pylist()
    assert [a == b for a, b in zip(before, after, strict=True)] == [row != 2 for row in range(ROWS)]
    assert after[2]["loud"] == "T1-2"
    assert table(renewed).schema == table(artifact).schema
    again = store.retry(renewed, shout, Config())
    assert CALLS == ["t1-3"]
    assert again.id == f"{artifact.id}.2"
    assert again.summary["failed"] == 0


def test_what_stands_downstream_is_stale_then(store):
    BROKEN.add("oom t0-0")
    artifact = made(store)
    first = store.step(listen, Config(), artifact)
    BROKEN.clear()
    renewed = store.retry(artifact, shout, Config())
    assert made(store).id == renewed.id
    second = store.step(listen, Config(), made(store))
    assert second.id != first.id
    assert second.summary["heard"] == renewed.id


def test_a_retry_that_was_cut_continues(store, monkeypatch):
    BROKEN.add("oom t0-0")
    artifact = made(store)
    BROKEN.clear()
    copy, copied = storage.copy, []

    def cut(source, target):
        if len(copied) == 1:
            raise KeyboardInterrupt
        copied.append(target)
        copy(source, target)

    monkeypatch.setattr(storage, "copy", cut)
    with pytest.raises(KeyboardInterrupt):
        store.retry(artifact, shout, Config())
    monkeypatch.setattr(storage, "copy", copy)
    assert made(store).id == artifact.id
    renewed = store.retry(artifact, shout, Config())
    assert renewed.summary["failed"] == 0
    assert faults(renewed) == []


def test_a_retry_without_need_is_refused(store):
    BROKEN.add("oom t0-0")
    artifact = made(store)
    with pytest.raises(ValueError, match=r"No row of .* failed with timeout; reasons found beside failed rows: .*oom"):
        store.retry(artifact, shout, Config(), ["timeout"])
    assert storage.list_names(storage.join(store.root, artifact.step)) == [artifact.id]  # nothing is left of it
    BROKEN.clear()
    renewed = store.retry(artifact, shout, Config())
    with pytest.raises(ValueError, match="has a newer revision"):
        store.retry(artifact, shout, Config())
    with pytest.raises(ValueError, match=r"No row of .* failed"):
        store.retry(renewed, shout, Config())


def test_a_cut_retry_is_not_taken_for_one_of_other_rows(store):
    BROKEN.update({"oom t0-0", "slow t1-1"})
    artifact = made(store)
    revise(artifact.path, f"{artifact.path}.1", ["oom"], leave=("manifest.json",))  # and then its driver died
    with pytest.raises(ValueError, match="was begun for oom"):
        store.retry(artifact, shout, Config(), ["timeout"])
    BROKEN.clear()
    assert store.retry(artifact, shout, Config(), ["oom"]).summary["failed"] == 1
