"""Habits and faults of a corpus of made-up shards: every accepted row counts once, and memory holds no rows."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.collapse import describe
from infra import storage
from infra.data.ledger import counting, record_of
from infra.data.shards import shard_names, shard_url
from infra.store import Artifact
from workflows import habits as module
from workflows.habits import habits
from workflows.recaption import _faults

FLAGS = [None, None, "repetition", None, "cut off", "empty"]


def put(folder, shards, columns, summary=None):
    for number, rows in enumerate(shards):
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        table = {name: [row[name] for row in rows] for name in ("sample_id", "state", "reason")}
        types = {"reason": pa.string()}
        for name in columns:
            table[name] = [row[name] for row in rows]
            types[name] = pa.int64() if name.startswith("tries") else pa.string()
        arrays = {name: pa.array(values, types.get(name)) for name, values in table.items()}
        pq.write_table(pa.table(arrays), folder / "shards" / f"{number:06d}.parquet")
    storage.write_json(str(folder / "manifest.json"), {"step": "x", "id": "0", "summary": summary or {}, "inputs": []})
    return Artifact.open(str(folder))


@pytest.fixture
def corpus(tmp_path):
    """Three shards of twelve; every fifth row failed to be captioned, its text still lies there."""
    rows = [
        {
            "sample_id": f"{n:04d}",
            "state": "failed" if n % 5 == 0 else "accepted",
            "reason": None,
            "caption_alt": None if n % 7 == 0 else f"Photo {n}",
            "caption_short": f"a dog {n % 4}",
            "caption_wide": f"a dog that runs {n}",
            "flag_short": FLAGS[n % 6] if n < 24 else None,
            "tries_short": 3 if FLAGS[n % 6] and n < 24 else 1 + (n % 9 == 0),
            "flag_wide": None,
            "flag_blurred": "yes",  # of no style
        }
        for n in range(36)
    ]
    shards = [rows[:12], rows[12:24], rows[24:]]
    index = [[row | {"state": "accepted"} for row in part] for part in shards]
    images = put(tmp_path / "images", index, ["caption_alt"])
    told = ["caption_short", "caption_wide", "flag_short", "tries_short", "flag_wide", "flag_blurred"]
    captions = put(tmp_path / "captions", shards, told, {"styles": [{"name": "wide"}, {"name": "short"}]})
    return images, captions, [row for row in rows if row["state"] == "accepted"]


def test_every_accepted_caption_counts_once(corpus):
    images, captions, rows = corpus
    found = habits(images, captions)
    assert list(found.collapse) == ["alt", "wide", "short"]  # as the captions' manifest has them
    for style, report in found.collapse.items():
        assert report == describe(row[f"caption_{style}"] for row in rows)
    assert list(found.faults) == ["wide", "short"]
    assert found.faults["short"]["count"] == len(rows)
    assert found.faults["wide"]["faulty"] == 0
    assert found.faults["wide"]["decoded_again"] is None


def test_faults_are_those_of_the_manifest(corpus):
    images, captions, _ = corpus
    shards = {name: pq.read_table(shard_url(captions.path, name)) for name in shard_names(captions.path)}
    records = {name: record_of(counting(table, ["flag_short", "tries_short"]), b"") for name, table in shards.items()}
    found, told = habits(images, captions).faults["short"], _faults(records, "short")
    assert {name: round(share, 6) for name, share in found["faults"].items()} == told["faults"]
    assert round(found["decoded_again"], 6) == told["decoded_again"]
    assert found["worst"][0]["shard"] == told["worst_shard"]
    assert round(found["worst"][0]["share"], 6) == told["worst"]
    assert found["strip"][2] == 0 < found["strip"][0]


def test_few_shards_are_held_at_a_time(corpus, monkeypatch):
    images, captions, _ = corpus
    added = []
    add = module.Collapse.add
    monkeypatch.setattr(module.Collapse, "add", lambda self, texts: added.append(len(texts)) or add(self, texts))
    habits(images, captions)
    assert sum(added) == 3 * 28
    assert max(added) <= 10  # one shard's accepted rows, never the corpus


def test_a_corpus_without_shards_has_no_habits(tmp_path):
    images, captions = put(tmp_path / "a", [], []), put(tmp_path / "b", [], [])
    found = habits(images, captions)
    assert (found.collapse, found.faults) == ({}, {})
