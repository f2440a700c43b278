"""Class, attributes, boxes and maps of a row become columns, and come to the copy's size with the picture."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.data.readers import find_corpus, write_sources
from infra.data.samples import Sample
from t2i.conditions.words import WordsConfig
from tests.infra.data.zoo import encode, picture, tar
from workflows.conditions import ConditionsConfig
from workflows.corpora.shapes import BACKGROUNDS, COLORS, SHAPES, ShapesConfig, edges_of, write_shards
from workflows.ingest import IngestConfig, IngestWork
from workflows.train_prior import TrainPriorConfig

MAPS = ("segmentation=seg.png", "edges=edge.png")
ALL = ConditionsConfig(class_field="class", attributes_field="tags", boxes_field="boxes", maps=MAPS)


def rows_of(config, out):
    corpus = find_corpus(config.corpus, config.shard_rows, config.reading)
    write_sources(corpus, str(out))
    work = IngestWork(config, corpus.sources, str(out))
    return [row for name in corpus.sources for row in work(name).to_pylist()]


def opened(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_shapes_say_what_is_drawn(tmp_path):
    config = ShapesConfig(samples=12, labelled=2, shard_size=12, jitter=0.05, conditions=True)
    write_shards(config, tmp_path / "shapes")
    told = replace(ALL, attributes_field="attributes")
    rows = rows_of(IngestConfig(corpus=f"{tmp_path}/shapes", image_size=(32, 32), conditions=told), tmp_path / "out")
    assert len(rows) == 12
    for row in rows:
        pixels, labels = opened(row["image"]).astype(int), opened(row["map_segmentation"])
        assert np.array_equal(opened(row["map_edges"]), edges_of(labels))
        things = json.loads(row["scene"])["objects"]
        assert row["box_classes"][0] == row["class_label"]
        assert sorted(row["box_classes"]) == sorted(f"{thing['color']} {thing['shape']}" for thing in things)
        assert row["attributes"] == sorted(set(row["attributes"])), row["attributes"]
        words, seen = set(row["attributes"]), COLORS | BACKGROUNDS
        assert words & seen.keys() == {name for name, rgb in seen.items() if (pixels == rgb).all(-1).any()}
        assert words & set(SHAPES) == {SHAPES[label - 1] for label in np.unique(labels) if label}
        assert words - seen.keys() - set(SHAPES) == {thing["size"] for thing in things}
        held = np.zeros((32, 32), bool)
        for (left, top, right, bottom), name in zip(row["boxes"], row["box_classes"], strict=True):
            color, shape = name.split()
            y, x = np.mgrid[0.5:32, 0.5:32] / 32
            box = (x > left) & (x < right) & (y > top) & (y < bottom)
            inside = box & (labels == 1 + SHAPES.index(shape))
            assert inside.any()
            within = inside & (opened(row["map_edges"]) == 0)  # what no antialiasing touches
            assert (np.abs(pixels[within] - COLORS[color]).max(initial=0)) <= 1
            held |= inside
        assert np.array_equal(held, labels > 0)  # every labelled pixel lies in its object's box


def test_without_the_option_not_a_byte_is_other(tmp_path):
    (plain,) = write_shards(ShapesConfig(samples=8, labelled=2, shard_size=8), tmp_path / "a")
    (told,) = write_shards(ShapesConfig(samples=8, labelled=2, shard_size=8, conditions=True), tmp_path / "b")
    rows = [rows_of(IngestConfig(corpus=str(path)), tmp_path / f"{path.parent.name}-out") for path in (plain, told)]
    for name in ("sha256", "caption_alt"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]]
    told_only = {"class", "attributes", "boxes"}
    for one, other in zip(rows[0], rows[1], strict=True):
        one, other = json.loads(one["meta"]), json.loads(other["meta"])
        assert not one.keys() & told_only
        assert one == {name: value for name, value in other.items() if name not in told_only}


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("form", ["tar", "folder", "parquet"])
def test_boxes_and_maps_move_with_the_picture(tmp_path, fit, form):
    pixels, labels = np.zeros((40, 80, 3), np.uint8), np.zeros((40, 80), np.uint8)
    pixels[10:30, 30:50], labels[10:30, 30:50] = 255, 7
    meta = {"class": " dog ", "tags": ["brown", " ", 3], "boxes": [{"bbox": [30, 10, 20, 20], "category": "dog"}]}
    files = {"a.png": encode(pixels), "a.seg.png": encode(labels), "a.json": json.dumps(meta).encode()}
    if form == "tar":
        (tmp_path / "c").mkdir()
        (tmp_path / "c/0.tar").write_bytes(tar(list(files.items())))
    elif form == "folder":
        (tmp_path / "c").mkdir()
        for name, content in files.items():
            (tmp_path / "c" / name).write_bytes(content)
    else:
        (tmp_path / "c").mkdir()
        columns = {"image": [files["a.png"]], "seg.png": [files["a.seg.png"]], "meta": [json.dumps(meta)]}
        pq.write_table(pa.table(columns), tmp_path / "c/0.parquet")
    conditions = ConditionsConfig(
        class_field="class", attributes_field="tags", boxes_field="boxes", boxes_as="xywh", maps=("seg=seg.png",)
    )
    config = IngestConfig(corpus=str(tmp_path / "c"), image_size=(20, 20), fit=fit, conditions=conditions)
    (row,) = rows_of(config, tmp_path / "out")
    assert (row["class_label"], row["attributes"], row["box_classes"]) == ("dog", ["brown", "3"], ["dog"])
    shown, held = opened(row["image"])[..., 0] > 127, opened(row["map_seg"]) == 7
    if fit == "pad":  # the border is white
        shown[:5] = shown[15:] = False
    assert np.mean(shown != held) <= 0.05
    left, top, right, bottom = np.array(row["boxes"][0]) * 20
    y, x = np.nonzero(held)
    assert np.allclose([x.min(), y.min(), x.max() + 1, y.max() + 1], [left, top, right, bottom], atol=0.6)


def test_labels_of_a_palette_and_depths_of_16_bits_stay_numbers(tmp_path):
    palette = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), "P")
    palette.putpalette([255 - n for n in range(48)] + [0] * 720)
    deep = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000
    members = [("a.png", encode(picture(0, 4, 4))), ("a.seg.png", encode(palette)), ("a.depth.png", encode(deep))]
    (tmp_path / "0.tar").write_bytes(tar(members))
    conditions = ConditionsConfig(maps=("seg=seg.png", "depth=depth.png", "gone=edge.png"))
    (row,) = rows_of(IngestConfig(corpus=str(tmp_path / "0.tar"), conditions=conditions), tmp_path / "out")
    assert np.array_equal(opened(row["map_seg"]), np.arange(16).reshape(4, 4))
    assert np.array_equal(opened(row["map_depth"]), deep)
    assert row["map_gone"] is None
    assert row["other_pictures"] is None


def test_a_map_is_as_it_was_or_null(tmp_path):
    """Depths as floats: whole numbers stay, and what a PNG cannot hold is not made into something else."""
    members = []
    for number, depth in enumerate([np.arange(16.0), np.arange(16) / 7, np.full(16, np.nan), np.arange(16) * 1e4]):
        image = Image.fromarray(depth.reshape(4, 4).astype(np.float32))
        members += [(f"{number}.png", encode(picture(0, 4, 4))), (f"{number}.depth.tiff", encode(image, "TIFF"))]
    (tmp_path / "0.tar").write_bytes(tar(members))
    conditions = ConditionsConfig(maps=("depth=depth.tiff",))
    rows = rows_of(IngestConfig(corpus=str(tmp_path / "0.tar"), conditions=conditions), tmp_path / "out")
    assert np.array_equal(opened(rows[0]["map_depth"]), np.arange(16).reshape(4, 4))
    assert [row["map_depth"] is None for row in rows] == [False, True, True, True]


def test_what_is_odd_costs_no_picture(tmp_path):
    metas = [{"boxes": "none", "class": {"a": 1}}, {"boxes": [[0, 0, 1], "x", [1, 1, 1, 5], [float("nan")] * 4]}, {}]
    members = []
    for number, meta in enumerate(metas):
        members += [(f"{number}.png", encode(picture(number))), (f"{number}.json", json.dumps(meta).encode())]
        members += [(f"{number}.seg.png", b"no picture")]
    (tmp_path / "0.tar").write_bytes(tar(members))
    rows = rows_of(IngestConfig(corpus=str(tmp_path / "0.tar"), conditions=ALL), tmp_path / "out")
    assert [row["state"] for row in rows] == ["accepted"] * 3
    assert [row["boxes"] for row in rows] == [None, [], None]
    assert [row["map_segmentation"] for row in rows] == [None] * 3
    assert rows[0]["class_label"] is None


@pytest.mark.parametrize("maps", [("seg",), ("=seg.png",), ("seg=",)])
def test_unclear_maps_are_refused(maps):
    with pytest.raises(ValueError, match=r"segmentation=seg\.png"):
        ConditionsConfig(maps=maps)


def test_a_sample_has_no_parts_unasked():
    assert Sample(key="a").parts == {}


def test_a_prior_is_told_of_conditions_that_cannot_be():
    with pytest.raises(ValueError, match="one vocabulary"):
        TrainPriorConfig(conditions=(WordsConfig(), WordsConfig(name="more")))
