"""Copies to train on: of one size or in buckets, and nothing changes where none of it is asked for."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from infra import storage
from infra.config import fingerprint, from_dict, to_dict
from infra.data.fitting import frame, nearest
from infra.data.images import decode
from infra.data.ledger import commit
from infra.data.readers import find_corpus, write_sources
from infra.data.shards import ShardReader, shard_url
from tests.infra.data.zoo import encode, picture, tar
from workflows.ingest import INDEX, IngestConfig, IngestWork, ingest
from workflows.options import step_options

SHAPES = [(24, 40), (40, 24), (30, 30), (10, 60), (24, 40)]
BUCKETS = ((16, 32), (32, 16), (20, 20))


def index(place, **options):
    """Ingest without Ray pictures of some shapes; returns the rows and a reader."""
    members = []
    for number, shape in enumerate(SHAPES):
        members += [(f"{number}.png", encode(picture(number, *shape))), (f"{number}.txt", b"text")]
    storage.write_bytes(f"{place}/c/0.tar", tar(members))
    config, out = IngestConfig(corpus=f"{place}/c", **options), f"{place}/out"
    corpus = find_corpus(config.corpus)
    write_sources(corpus, out)
    (name,) = corpus.sources
    commit(out, name, IngestWork(config, corpus.sources, out)(name))
    return pq.read_table(shard_url(out, name)), ShardReader([out], name)


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_copies_of_one_size(tmp_path, fit):
    table, reader = index(tmp_path, image_size=(16, 24), fit=fit)
    assert table.column_names == [*INDEX.names, "image"]
    for number, pixels in enumerate(reader.pixels(np.arange(len(SHAPES)))):
        assert np.array_equal(pixels, decode(encode(picture(number, *SHAPES[number])), (16, 24), fit=fit))


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_copies_in_buckets(tmp_path, fit):
    table, reader = index(tmp_path, buckets=BUCKETS, fit=fit)
    assert table.column_names == [*INDEX.names, "bucket", "image"]
    rows = table.to_pylist()
    assert [row["bucket"] for row in rows] == ["16x32", "32x16", "20x20", "16x32", "16x32"]
    for number, pixels in enumerate(reader.pixels(np.arange(len(SHAPES)))):
        row, size = rows[number], nearest(SHAPES[number], BUCKETS)
        assert pixels.shape == (*size, 3)
        assert np.array_equal(pixels, decode(encode(picture(number, *SHAPES[number])), size, fit=fit))
        # What the index says is enough to fit a map or boxes as the picture was.
        assert frame((row["height"], row["width"]), size, fit) == frame(SHAPES[number], size, fit)


def test_without_sizes_nothing_is_copied(tmp_path):
    assert index(tmp_path)[0].column_names == INDEX.names


def test_the_fingerprint_of_what_was_there_before_stays():
    plain = IngestConfig(corpus="c", image_size=(8, 8))
    table = to_dict(plain)
    del table["fit"], table["buckets"]
    assert from_dict(IngestConfig, table) == plain
    choices = [
        plain,
        IngestConfig(corpus="c", image_size=(8, 8), fit="crop"),
        IngestConfig(corpus="c", image_size=(8, 8), fit="pad"),
        IngestConfig(corpus="c", buckets=((8, 8),)),
        IngestConfig(corpus="c", buckets=((8, 8), (8, 4))),
        IngestConfig(corpus="c", buckets=((8, 8), (8, 4)), fit="crop"),
    ]
    assert len({fingerprint(config) for config in choices}) == len(choices)
    assert all(from_dict(IngestConfig, to_dict(config)) == config for config in choices)


def test_options_of_the_command():
    arguments = ["--corpus", "c", "--buckets", "64", "32", "32", "64", "--fit", "crop"]
    config = step_options(ingest, arguments).config
    assert (config.buckets, config.fit, config.image_size) == (((64, 32), (32, 64)), "crop", None)
    assert config.sizes == config.buckets
    assert step_options(ingest, ["--corpus", "c", "--image-size", "8", "9"]).config.sizes == ((8, 9),)


def test_a_fit_without_a_size_is_refused():
    with pytest.raises(ValueError, match="give an image_size or buckets"):
        IngestConfig(corpus="c", fit="crop")
    with pytest.raises(ValueError, match="with buckets it is None"):
        IngestConfig(corpus="c", image_size=(8, 8), buckets=((8, 8), (4, 8)))
