"""All but the engine: Ray Data is played by a list, and vLLM by an echo between Ray Data's own wrappers."""

import hashlib
import importlib.util
import random
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data

from infra import storage
from infra.data import llm, shards
from infra.data.images import encode_png
from infra.data.ledger import commit, pending
from infra.data.shards import ShardReader
from infra.data.verify import verify_shards
from infra.trouble import UnavailableError
from tests.infra.data.zoo import picture

STATES = ["accepted", "rejected", "accepted", "accepted"]
TORN = 2  # this row's picture is accepted by its header and broken behind it


class Ask:
    """Two columns of requests; the messages tell apart rows, columns and pictures."""

    reads = ("pixels", "caption_alt")
    writes = ("caption_short", "caption_long")

    def __init__(self):
        self.sizes = []

    def __call__(self, batch):
        self.sizes.append(len(batch["pixels"]))
        return {
            column: [
                {"messages": [{"role": column, "content": f"{alt} {int(image.sum())}"}], "sampling_params": {"seed": 1}}
                for image, alt in zip(batch["pixels"], batch["caption_alt"], strict=True)
            ]
            for column in self.writes
        }


def ingest(folder, named):
    for name, states in named.items():
        images = [encode_png(picture(n)) for n in range(len(states))]
        if len(images) > TORN:
            images[TORN] = images[TORN][:-40]
        storage.write_bytes(storage.join(folder, f"corpus/{name}"), b"".join(images))
        table = {
            "sample_id": [f"{name}-{n}" for n in range(len(states))],
            "state": states,
            "reason": [None if state == "accepted" else "no caption" for state in states],
            "source": [f"corpus/{name}"] * len(states),
            "offset": [sum(map(len, images[:n])) for n in range(len(states))],
            "length": [len(image) for image in images],
            "sha256": [hashlib.sha256(image).hexdigest() for image in images],
            "caption_alt": [f"{name} {n}" for n in range(len(states))],
        }
        commit(folder, name, pa.table(table))
    return folder


class Listed:
    """As much of a Dataset as is asked for here, in one process."""

    def __init__(self, rows):
        self.rows = rows

    def map_batches(self, function, batch_size, batch_format):
        assert batch_format == "numpy"
        names = dict.fromkeys(name for row in self.rows for name in row)
        size = batch_size or len(self.rows)
        parts = [self.rows[start : start + size] for start in range(0, len(self.rows), size)]
        batches = [
            function({key: np.array([row.get(key) for row in part], dtype=object) for key in names}) for part in parts
        ]
        made = [batch for several in batches for batch in ([several] if isinstance(several, dict) else several)]
        return Listed(
            [dict(zip(batch, values, strict=True)) for batch in made for values in zip(*batch.values(), strict=True)]
        )

    def iter_rows(self):
        return iter(self.rows)


def answer(row):
    """Fails what is about a row 3 in `caption_long`, and is silent on one."""
    from ray.llm._internal.batch.stages.base import wrap_postprocess, wrap_preprocess

    before, after = wrap_preprocess(llm._request, "__data"), wrap_postprocess(llm._answer, "__data", True)

    def generate(data):
        if data[llm.ERROR]:
            return data
        (message,) = data["messages"]
        assert data["sampling_params"] == {"seed": 1}
        said = f" {message['role']}: {message['content']}\n"
        if message["content"].startswith("b 3") and message["role"] == "caption_long":
            return data | {"generated_text": "", llm.ERROR: "the engine\nchoked"}
        return data | {"generated_text": "" if message["content"].startswith("c 0") else said}

    return after({"__data": generate(before(row)["__data"])})


def echo(engine, actors):
    """Answers in disorder what it is asked."""

    def run(dataset):
        rows = [answer(row) for row in dataset.rows]
        random.Random(0).shuffle(rows)
        return Listed(rows)

    return run


class Call:
    """A method of an actor, in this process."""

    def __init__(self, method):
        self.remote = method


def desks(count, arguments):
    here = [llm.Desk(*arguments) for _ in range(count)]
    return [SimpleNamespace(take=Call(desk.take)) for desk in here]


@pytest.fixture
def played(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.data, "from_items", lambda rows, override_num_blocks: Listed(rows))
    monkeypatch.setattr(llm, "_processor", echo)
    monkeypatch.setattr(llm, "_desks", desks)
    monkeypatch.setattr(ray, "get", lambda values: values)


SHARDS = {"a": STATES, "b": STATES, "c": ["accepted"], "d": ["rejected"] * 3}


def test_shards_are_answered_and_committed(played, tmp_path):
    images, out, told = ingest(str(tmp_path / "images"), SHARDS), str(tmp_path / "out"), []
    ask = Ask()
    counts = llm.run_requests(
        ask, {"batch_size": 2}, [images], out, report=lambda done, total, unit: told.append((done, total))
    )
    assert {name: counts[name] for name in ("shards", "rows_in", "accepted", "rejected", "failed")} == {
        "shards": 4,
        "rows_in": 12,
        "accepted": 3,
        "rejected": 5,
        "failed": 4,
    }
    assert counts["reasons"] == {"no caption": 5, "decode_error": 2, "error": 2}
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert max(ask.sizes) <= 2

    reader = ShardReader([images, out], "b")
    pixels = int(picture(3).sum())
    assert reader.states == ["accepted", "rejected", "failed", "failed"]
    assert reader.reasons[2].startswith("decode_error: image: ")
    assert reader.reasons[3] == "error: caption_long: the engine choked"
    assert reader.columns(["caption_long"])["caption_long"].tolist() == [f"caption_long: b 0 {int(picture(0).sum())}"]
    stored = storage.read_bytes(f"{out}/shards/b.parquet")
    table = pa.parquet.read_table(pa.BufferReader(stored)).to_pylist()
    assert table[3]["caption_short"] == f"caption_short: b 3 {pixels}", "what the other style said is kept"
    assert ShardReader([out], "c").reasons == ["error: caption_short: the answer is empty"]


def test_what_is_committed_is_not_asked_again(played, tmp_path):
    images, out = ingest(str(tmp_path / "images"), SHARDS), str(tmp_path / "out")
    first = llm.run_requests(Ask(), {}, [images], out)
    storage.remove(f"{out}/shards/b.parquet")
    ask = Ask()
    assert llm.run_requests(ask, {}, [images], out) == first
    assert ask.sizes == [2]
    assert llm.run_requests(ask, {}, [images], out) == first
    assert ask.sizes == [2]


def test_answers_are_signed(played, tmp_path):
    class Sign:
        writes = ("by_short",)

        def setup(self):
            self.name = "me"

        def __call__(self, batch):
            return {"by_short": [text and self.name for text in batch["caption_short"]]}

    images, out = ingest(str(tmp_path / "images"), SHARDS), str(tmp_path / "out")
    llm.run_requests(Ask(), {}, [images], out, sign=Sign())
    for name in SHARDS:
        table = pa.parquet.read_table(pa.BufferReader(storage.read_bytes(f"{out}/shards/{name}.parquet"))).to_pydict()
        assert table["by_short"] == [text and "me" for text in table["caption_short"]]
    assert table["by_short"] == [None] * 3


def test_a_shard_without_all_its_answers_is_not_committed(played, monkeypatch, tmp_path):
    images, out = ingest(str(tmp_path / "images"), SHARDS), str(tmp_path / "out")

    def forgetful(engine, actors):
        return lambda dataset: Listed(
            [row for row in echo(engine, actors)(dataset).rows if row["name"] != "a" or row["row"]]
        )

    monkeypatch.setattr(llm, "_processor", forgetful)
    with pytest.raises(RuntimeError, match=r"1 shards of .* lack answers, such as a; run it again"):
        llm.run_requests(Ask(), {}, [images], out)
    assert pending(out, list(SHARDS)) == ["a"]


@pytest.mark.timeout(120)
def test_no_answer_and_no_commit_goes_through_the_driver(ray_cluster, monkeypatch, tmp_path):
    images = ingest(str(tmp_path / "images"), SHARDS)
    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
        patched.setattr(llm, "_processor", lambda engine, actors: lambda dataset: dataset.map(answer))
        here, told = [], []
        for module, name in ((llm, "ShardReader"), (shards, "ShardReader"), (llm, "commit"), (llm, "_table")):
            patched.setattr(module, name, lambda *_, **__: here.append(1))  # of this process alone
        counts = llm.run_requests(
            Ask(), {"batch_size": 2}, [images], f"{tmp_path}/out", actors=(1, 2), report=lambda *done: told.append(done)
        )
    assert here == []
    assert (counts["shards"], counts["accepted"], counts["rejected"], counts["failed"]) == (4, 3, 5, 4)
    assert [done for done, _, _ in told] == [1, 2, 3, 4]
    assert list(verify_shards(f"{tmp_path}/out", [images], counts)) == []


def test_answers_that_come_twice_change_nothing(tmp_path):
    images, out = ingest(str(tmp_path / "images"), {"a": ["accepted", "rejected", "accepted"]}), str(tmp_path / "out")
    desk = llm.Desk(("caption",), [images], out, None)
    first, last = ({"name": "a", "row": n, "column": "caption", "of": 2, "text": f"{n}", llm.ERROR: ""} for n in (0, 1))
    assert desk.take([first, first]) == {}
    (record,) = desk.take([last]).values()
    assert desk.take([first]) == {"a": record}  # it is told again, as the task may be that heard it
    assert ShardReader([out], "a").columns(["caption"])["caption"].tolist() == ["0", "1"]


def test_a_store_that_is_away_is_its_own_sentence(played, monkeypatch, tmp_path):
    def away(*_):
        raise UnavailableError("The server of s3://b does not answer.")

    monkeypatch.setattr(llm, "commit", away)
    with pytest.raises(UnavailableError, match=r"^The server of s3://b does not answer\.$"):
        llm.run_requests(Ask(), {}, [ingest(str(tmp_path / "images"), SHARDS)], str(tmp_path / "out"))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_extra_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"install rescribe\[vllm\]"):
        llm.run_requests(Ask(), {}, [str(tmp_path)], str(tmp_path / "out"))
