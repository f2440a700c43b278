import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import storage
from infra.cluster import laptop
from infra.data.ledger import commit, tally
from infra.data.readers import find_corpus, write_sources
from infra.data.shards import ShardReader, shard_names, shard_url
from infra.store import Store
from tests.infra.data.here import work_here
from tests.infra.data.zoo import as_members, encode, picture, samples, tar, write_folder, write_parquet, write_tars
from workflows.corpora.shapes import ShapesConfig
from workflows.ingest import INDEX, IngestConfig, IngestWork, corpus_key, ingest
from workflows.judge import label_by_json

PNG = encode(picture(0))


@pytest.fixture
def here(monkeypatch):
    work_here(monkeypatch, ingest)


def index(config, out):
    """Ingest without Ray."""
    corpus = find_corpus(config.corpus, config.shard_rows, config.reading)
    write_sources(corpus, out)
    work = IngestWork(config, corpus.sources, out)
    for name in corpus.sources:
        commit(out, name, work(name))
    return rows_of(out)


def rows_of(out):
    tables = [pq.read_table(storage.open_read(shard_url(out, name))) for name in shard_names(out)]
    return pa.concat_tables(tables).to_pylist()


def test_every_format_gives_the_same_index(tmp_path):
    write_tars(str(tmp_path / "tars"))
    write_parquet(str(tmp_path / "parquet"))
    write_parquet(str(tmp_path / "hugging_face"), hugging_face=True)
    write_folder(str(tmp_path / "files"))
    write_folder(str(tmp_path / "jsonl"), table="jsonl")
    columns = ("state", "reason", "width", "height", "caption_alt", "split", "scene", "sha256", "image", "length")
    found = {}
    for kind in ("tars", "parquet", "hugging_face", "files", "jsonl"):
        out = str(tmp_path / "out" / kind)
        config = IngestConfig(corpus=str(tmp_path / kind), image_size=(12, 16), shard_rows=5)
        rows = index(config, out)
        assert len({row["sample_id"] for row in rows}) == 12
        found[kind] = [[row[name] for name in columns] for row in rows]
        config = IngestConfig(corpus=str(tmp_path / kind), shard_rows=5)
        index(config, out + "-by-range")
        pixels = [
            one
            for name in shard_names(out + "-by-range")
            for reader in [ShardReader([out + "-by-range"], name)]
            for one in reader.rows(("pixels",), range(len(reader)))["pixels"]
        ]
        assert all(np.array_equal(one, picture(n)) for n, one in enumerate(pixels))
        assert len(pixels) == 12
    assert all(rows == found["tars"] for rows in found.values())
    assert found["tars"][0][:4] == ["accepted", None, 40, 24]


def test_bad_rows_are_recorded_each_with_its_reason(tmp_path):
    deep = b'{"a": ' + b"[" * 100_000
    members = {
        "good": (PNG, b"fine", b"{}"),
        "bom": (PNG, b"\xef\xbb\xbffine ", None),
        "no-caption": (PNG, None, None),
        "empty-caption": (PNG, b" \n", None),
        "latin": (PNG, "größer".encode("latin-1"), None),
        "endless": (PNG, b"x" * 100_000, None),
        "wide": (PNG, "ü".encode() * 10_001, None),
        "monstrous": (PNG, b"x" * 3_000_000, None),
        "no-image": (None, b"text", None),
        "broken": (b"GIF89a", b"text", None),
        "cut": (PNG[:300], b"text", None),
        "void": (b"", b"text", None),
        "meta-text": (PNG, b"text", b"hello"),
        "meta-list": (PNG, b"text", b"[1]"),
        "meta-latin": (PNG, b"text", b'{"a": "\xff"}'),
        "meta-deep": (PNG, b"text", deep),
        "meta-nan": (PNG, b"text", b'{"a": NaN}'),
        "meta-surrogate": (PNG, b"text", b'{"caption_short": "\\ud800"}'),
        "split": (PNG, b"text", b'{"split": "holiday"}'),
        "\udcff": (PNG, b"text", b"{}"),
    }
    files = [
        (f"{key}.{ending}", content)
        for key, contents in members.items()
        for ending, content in zip(("png", "txt", "json"), contents, strict=True)
        if content is not None
    ]
    storage.write_bytes(str(tmp_path / "c/0.tar"), tar(files, errors="surrogateescape"))
    out = str(tmp_path / "out")
    rows = {row["key"]: row for row in index(IngestConfig(corpus=str(tmp_path / "c")), out)}
    assert {key: row["reason"] for key, row in rows.items() if row["state"] != "accepted"} == {
        "no-image": "no image: there is only txt",
        "broken": "not an image",
        "cut": "truncated image",
        "void": "empty image",
    }
    faults = {key: row["alt_fault"] for key, row in rows.items() if row["state"] == "accepted" and row["alt_fault"]}
    assert faults == {
        "no-caption": "no caption",
        "empty-caption": "empty caption",
        "latin": "caption is not UTF-8",
        "endless": "caption too long: 100,000 characters, of at most 10,000",
        "wide": "caption too long: 10,001 characters, of at most 10,000",
        "monstrous": "caption too long: more than 1,048,576 bytes",
    }
    assert all((row["caption_alt"] is None) == (key in faults) for key, row in rows.items() if not row["reason"])
    assert {key: row["meta_fault"] for key, row in rows.items() if row["meta_fault"]} == {
        "meta-text": "broken metadata: not JSON",
        "meta-list": "broken metadata: not a JSON object",
        "meta-latin": "broken metadata: not UTF-8",
        "meta-deep": "broken metadata: not JSON",
    }
    assert rows["meta-nan"]["meta"] == '{"a": null}'  # strict JSON
    assert {key: row["split"] for key, row in rows.items() if row["split_fault"]} == {"split": "holiday"}
    assert "\ufffd" in rows
    counts = tally(out)
    assert counts["accepted"] == 16
    assert counts["rows_in"] == 20 == counts["accepted"] + counts["rejected"] + counts["failed"]


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 3000, 8000, 20_000, 30_000])
def test_a_cut_tar_never_loses_a_row_without_a_word(tmp_path, cut):
    data = tar(as_members(samples(8)))
    storage.write_bytes(str(tmp_path / "c/0.tar"), data[: max(0, len(data) - cut)])
    found = index(IngestConfig(corpus=str(tmp_path / "c")), str(tmp_path / "out"))
    whole = [row for row in found if row["state"] == "accepted"]
    assert [row["caption_alt"] for row in whole] == [text for _, _, text, _ in samples(8)][: len(whole)]
    padding = len(data) - len(data.rstrip(b"\0")) // 512 * 512 - 512 - 1024
    if cut <= padding:
        assert len(whole) == len(found) == 8
    else:
        assert found[-1]["key"] == "0.tar#truncated"
        assert found[-1]["state"] == "failed"


def test_labels_by_json():
    meta = {"split": "val", "scene": {"a": 1}, "caption_short": " s ", "caption_descriptive": ""}
    labels = {"split": "test", "reference_short": "s", "reference_descriptive": None, "scene": '{"a": 1}'}
    assert label_by_json("0" * 24, meta, 0.5, {}) == labels | {"split_fault": None}
    splits = [label_by_json(f"{n * 2**22:08x}" + "0" * 16, {}, 0.25, {})["split"] for n in range(1024)]
    assert splits.count("test") == 256


def test_a_corpus_of_useless_rows_is_an_error(here, tmp_path):
    storage.write_bytes(str(tmp_path / "c/0.tar"), tar([("a.png", PNG[:60]), ("b.txt", b"text")]))
    with pytest.raises(ValueError, match=r"None of the 2 rows of .* truncated image \(1\), no image \(1\)"):
        ingest.work(IngestConfig(corpus=str(tmp_path / "c")), out=str(tmp_path / "o"), cluster=laptop(), report=None)


def test_shapes_are_rendered_into_the_artifact_and_read_from_there(ray_cluster, place):
    config = IngestConfig(corpus=ShapesConfig(samples=60, shard_size=25, labelled=6, test_fraction=0.2))
    summary = ingest.work(config, out=place, cluster=laptop(), report=None)
    assert (summary["shards"], summary["rows_in"], summary["accepted"]) == (3, 60, 60)
    rows = rows_of(place)
    assert {row["split"] for row in rows} == {"train", "test"}
    assert sum(row["reference_short"] is not None for row in rows if row["split"] == "train") == 6
    assert all(row["reference_descriptive"] for row in rows if row["split"] == "test")
    assert "objects" in json.loads(rows[0]["scene"])
    assert rows[30]["source"] == "corpus/00001.tar"
    assert ShardReader([place], "000001").rows(("pixels",), [3])["pixels"][0].shape == (32, 32, 3)
    assert storage.list_names(place) == ["corpus", "ledger.json", "shards", "shards.json"]
    assert storage.read_json(storage.join(place, "shards.json"))["000002"]["name"] == "00002.tar"
    assert pq.read_schema(storage.open_read(shard_url(place, "000000"))).names == INDEX.names


def test_the_same_corpus_is_not_ingested_twice_and_a_changed_one_is(here, place):
    corpus = storage.join(place, "corpus")
    write_tars(corpus)
    store = Store(storage.join(place, "store"), laptop())
    config = IngestConfig(corpus=storage.join(corpus, "{00000..00001}.tar"), image_size=(16, 16))
    first = store.step(ingest, config)
    assert first.summary["accepted"] == 12
    assert store.step(ingest, config).path == first.path
    storage.write_bytes(storage.join(corpus, "00001.tar"), tar([("a.png", PNG), ("a.txt", b"new")]))
    assert store.step(ingest, config).summary["accepted"] == 7


def test_the_key_is_there_before_any_work():
    with pytest.raises(FileNotFoundError):
        corpus_key(IngestConfig(corpus="/nothing/{000..100}.tar"))
    assert corpus_key(IngestConfig(corpus=ShapesConfig(samples=60, labelled=6))) is None


@pytest.mark.parametrize(
    "options", [{"image_size": (0, 5)}, {"image_size": (5, 9000)}, {"shard_rows": 0}, {"test_fraction": 1.0}]
)
def test_wrong_settings_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} .*but it is"):
        IngestConfig(corpus="x", **options)


@pytest.mark.skipif("RESCRIBE_CORPORA" not in os.environ, reason="RESCRIBE_CORPORA names no folder of real corpora")
@pytest.mark.parametrize(("folder", "labels", "rows"), [("nlvr", "nlvr", 1000), ("noto-emoji", "emoji", 500)])
def test_real_corpora(tmp_path, folder, labels, rows):
    corpus = storage.join(os.environ["RESCRIBE_CORPORA"], folder, "00000.tar")
    found = index(IngestConfig(corpus=corpus, labels=labels, image_size=(32, 32)), str(tmp_path))
    assert len(found) == rows
    assert {row["state"] for row in found} == {"accepted"}
    assert all(row["split"] in ("train", "test") and row["caption_alt"] for row in found)
    assert any(row["reference_short"] for row in found)
