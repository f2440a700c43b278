import io
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance

from captioner.filters import Hash
from infra import storage
from infra.data.ledger import commit
from infra.data.readers import find_corpus, write_sources
from infra.data.shards import shard_names, shard_url
from infra.data.work import StageWork
from tests.captioner.test_hashing import photo
from tests.infra.data.zoo import encode, tar
from workflows.deduplicate import DeduplicateConfig, HashConfig, mark_duplicates
from workflows.ingest import IngestConfig, IngestWork

A, B, C, D = (photo(seed) for seed in range(4))
PNG = encode(A)


def resized(array):
    return encode(Image.fromarray(array).resize((90, 60), Image.Resampling.BICUBIC))


SHARDS = [
    # key, image, caption; what it repeats
    [("cut", PNG[: len(PNG) // 2], b"x", None), ("silent", encode(B), None, None), ("a", PNG, b"x", None)],
    [("a", PNG, b"another text", "a exact"), ("b", encode(B, "WEBP", lossless=True), b"x", "silent near")],
    [("cut", PNG[: len(PNG) // 2], b"x", None), ("nothing", PNG, None, "a exact")],
    [
        ("jpeg", encode(A, "JPEG", quality=60), b"x", "a near"),
        ("small", resized(B), b"x", "silent near"),
        ("c", encode(C), b"x", None),
        ("bright", encode(ImageEnhance.Brightness(Image.fromarray(C)).enhance(1.08)), b"x", "c near"),
        ("grey", encode(Image.fromarray(C).convert("L")), b"x", None),
    ],
    [("small", resized(B), b"x", "small exact"), ("d", encode(D), b"x", None), ("c", encode(C), b"x", "c exact")],
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """An index and its hashes."""
    folder = tmp_path_factory.mktemp("duplicates")
    corpus, images, hashes = (str(folder / name) for name in ("corpus", "images", "hashes"))
    for number, rows in enumerate(SHARDS):
        members = [(f"{key}.img".replace("img", "png"), image) for key, image, _, _ in rows]
        members += [(f"{key}.txt", text) for key, _, text, _ in rows if text is not None]
        storage.write_bytes(storage.join(corpus, f"{number}.tar"), tar(members))
    config = IngestConfig(corpus=corpus)
    found = find_corpus(corpus)
    write_sources(found, images)
    for name in found.sources:
        commit(images, name, IngestWork(config, found.sources, images)(name))
        work = StageWork((Hash(),), (images,), 2)
        work.setup()
        commit(hashes, name, work(name))
    return images, hashes


def verdicts(inputs, out):
    """(key, "key kind" of what it repeats or None) of all rows, and their states."""
    tables = [pq.read_table(io.BytesIO(storage.read_bytes(shard_url(out, name)))) for name in shard_names(out)]
    index = [pq.read_table(io.BytesIO(storage.read_bytes(shard_url(inputs[0], name)))) for name in shard_names(out)]
    keys = {row["sample_id"]: row["key"] for table in index for row in table.to_pylist()}
    return [
        [
            (keys[row["sample_id"]], row["duplicate_of"] and f"{keys[row['duplicate_of']]} {row['duplicate_kind']}")
            for row in table.to_pylist()
        ]
        for table in tables
    ]


def test_planted_copies_are_found_and_nothing_else(inputs, tmp_path):
    out = str(tmp_path)
    counts = mark_duplicates(DeduplicateConfig(), inputs, out)
    assert verdicts(inputs, out) == [[(key, repeats) for key, _, _, repeats in rows] for rows in SHARDS]
    assert (counts["exact_duplicates"], counts["near_duplicates"]) == (4, 4)
    assert (counts["rows_in"], counts["accepted"], counts["rejected"]) == (15, 13, 2)


def test_files_of_the_same_bytes_only(inputs, tmp_path):
    counts = mark_duplicates(DeduplicateConfig(distance=None), inputs, str(tmp_path))
    assert (counts["exact_duplicates"], counts["near_duplicates"]) == (4, 0)
    assert verdicts(inputs, str(tmp_path))[3] == [(key, None) for key, _, _, _ in SHARDS[3]]


def test_a_row_repeats_an_earlier_row_that_is_accepted(inputs, tmp_path):
    mark_duplicates(DeduplicateConfig(distance=16, tolerance=255), inputs, str(tmp_path))
    order = [row for name in shard_names(str(tmp_path)) for row in rows_of(str(tmp_path), name)]
    places = {row["sample_id"]: place for place, row in enumerate(order)}
    for place, row in enumerate(order):
        assert (row["duplicate_of"] is None) == (row["duplicate_kind"] is None)
        if row["duplicate_of"]:
            assert row["state"] == order[places[row["duplicate_of"]]]["state"] == "accepted"
            assert places[row["duplicate_of"]] < place


def rows_of(out, name):
    return pq.read_table(io.BytesIO(storage.read_bytes(shard_url(out, name)))).to_pylist()


def test_a_rerun_writes_what_is_missing_and_the_same(inputs, tmp_path):
    out = str(tmp_path)
    counts = mark_duplicates(DeduplicateConfig(), inputs, out)
    before = {name: storage.read_bytes(shard_url(out, name)) for name in shard_names(out)}
    written = {file.url: file.tag for file in storage.listing(storage.join(out, "shards"))}
    storage.remove(shard_url(out, "000003"))
    assert mark_duplicates(DeduplicateConfig(), inputs, out) == counts
    assert {name: storage.read_bytes(shard_url(out, name)) for name in shard_names(out)} == before
    rewritten = [f.url for f in storage.listing(storage.join(out, "shards")) if f.tag != written[f.url]]
    assert rewritten == [shard_url(out, "000003")]


def test_columns_have_the_same_types_in_every_shard(inputs, tmp_path):
    mark_duplicates(DeduplicateConfig(), inputs, str(tmp_path))
    schemas = {str(pq.read_schema(shard_url(str(tmp_path), name))) for name in shard_names(str(tmp_path))}
    assert len(schemas) == 1


def test_an_empty_corpus(tmp_path):
    out = str(tmp_path / "out")
    counts = mark_duplicates(DeduplicateConfig(), (str(tmp_path / "images"),), out)
    assert (counts["rows_in"], counts["exact_duplicates"]) == (0, 0)


@pytest.mark.parametrize("fields", [{"distance": -1}, {"distance": 17}, {"tolerance": -1}, {"tolerance": 256}])
def test_the_config_checks_itself(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} is .*but it is {next(iter(fields.values()))}"):
        DeduplicateConfig(**fields)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        HashConfig(batch=0)


def test_it_needs_no_torch():
    code = "import sys, workflows.deduplicate, workflows.examine; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
