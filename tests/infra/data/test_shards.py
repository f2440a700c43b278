import hashlib

import numpy as np
import pyarrow as pa
import pytest

from infra import storage
from infra.data.images import encode_png
from infra.data.ledger import commit, inspect, pending, tally
from infra.data.shards import ShardReader, count_rows, joined_names, select_rows
from tests.infra.data.zoo import picture

IDS = [f"{n:024x}" for n in range(5)]
STATES = ["accepted", "rejected", "accepted", "accepted", "failed"]
REASONS = [None, "no caption", None, None, "oops: detail"]


def sidecar(artifact, name="000000", ids=IDS, states=STATES, reasons=REASONS, **columns):
    commit(artifact, name, pa.table({"sample_id": ids, "state": states, "reason": reasons, **columns}))


def ingest(folder, copies=False):
    """An index of five pictures that lie in one file, the first three apart from the others."""
    images = [encode_png(picture(n)) for n in range(5)]
    lengths = [len(image) for image in images]
    gap = 100_000
    offsets = [sum(lengths[:n]) + (gap if n > 2 else 0) for n in range(5)]
    data = b"".join(images[:3]) + bytes(gap) + b"".join(images[3:])
    storage.write_bytes(storage.join(folder, "corpus/0.bin"), data)
    columns = {
        "source": ["corpus/0.bin"] * 5,
        "offset": offsets,
        "length": lengths,
        "sha256": [hashlib.sha256(image).hexdigest() for image in images],
        "caption_alt": [f"caption {n}" for n in range(5)],
        "width": [40] * 5,
    }
    if copies:
        columns["image"] = [encode_png(picture(10 + n)) if STATES[n] == "accepted" else None for n in range(5)]
    sidecar(folder, **columns)
    return folder


@pytest.fixture
def index(place):
    return ingest(storage.join(place, "ingest/a"))


def test_rows_are_accepted_ones_in_any_order_with_repeats(index):
    reader = ShardReader([index], "000000")
    assert len(reader) == 3
    assert reader.columns(["caption_alt"])["caption_alt"].tolist() == ["caption 0", "caption 2", "caption 3"]
    rows = reader.rows(("sample_id", "caption_alt", "pixels", "image"), [2, 0, 0])
    assert rows["sample_id"] == [IDS[3], IDS[0], IDS[0]]
    assert rows["caption_alt"] == ["caption 3", "caption 0", "caption 0"]
    for seen, n in zip(rows["pixels"], [3, 0, 0], strict=True):
        assert np.array_equal(seen, picture(n))
    assert rows["image"][0] == encode_png(picture(3))


@pytest.mark.parametrize("copies", [False, True])
def test_every_row_may_be_shown_those_not_accepted_with_the_image_of_the_source(tmp_path, copies):
    reader = ShardReader([ingest(str(tmp_path / "i"), copies=copies)], "000000", every=True)
    assert len(reader) == 5
    assert reader.accepted.tolist() == [0, 2, 3]
    assert reader.columns(["caption_alt"])["caption_alt"].tolist() == [f"caption {n}" for n in range(5)]
    images = list(reader.images(np.array([1, 3, 4])))
    assert images == [encode_png(picture(n)) for n in (1, 13 if copies else 3, 4)]
    assert {"sample_id", "state", "caption_alt"} <= reader.names


def test_resized_copies_go_before_the_source(place):
    reader = ShardReader([ingest(storage.join(place, "i"), copies=True)], "000000")
    assert np.array_equal(reader.rows(("pixels",), [1])["pixels"][0], picture(12))


def test_artifacts_are_joined_by_sample_id(index, place):
    captions = storage.join(place, "recaption/b")
    order = [4, 2, 0, 1, 3]
    states = ["accepted", "accepted", "failed", "accepted", "failed"]
    columns = {"caption_short": [f"short {n}" for n in range(5)], "width": list(range(5))}
    columns["codes"] = [[n, n + 1] for n in range(4)] + [None]
    sidecar(
        captions,
        ids=[IDS[n] for n in order],
        states=[states[n] for n in order],
        reasons=[None if states[n] == "accepted" else "later" for n in order],
        **{name: [values[n] for n in order] for name, values in columns.items()},
    )
    reader = ShardReader([index, captions], "000000")
    assert reader.sample_ids == IDS
    assert reader.states == ["accepted", "rejected", "failed", "accepted", "failed"]
    assert reader.reasons == [None, "no caption", "later", None, "oops: detail"]
    rows = reader.rows(("caption_alt", "caption_short", "width", "codes", "pixels"), [0, 1])
    assert rows["caption_alt"] == ["caption 0", "caption 3"]
    assert rows["caption_short"] == ["short 0", "short 3"]
    assert rows["width"] == [0, 3]  # of the last artifact that has it
    assert [codes.tolist() for codes in rows["codes"]] == [[0, 1], [3, 4]]
    assert np.array_equal(rows["pixels"][1], picture(3))
    assert ShardReader([captions, index], "000000").rows(("pixels",), [1])["pixels"][0].shape == (24, 40, 3)


def test_counting_and_selecting(index, place):
    sidecar(index, "000001", ids=[f"{n:024x}" for n in range(5, 10)], caption_alt=["x"] * 5, width=[1, 1, 1, 2, 2])
    assert count_rows([index]) == {"000000": 3, "000001": 3}

    def wide(columns):
        assert columns["caption_alt"].dtype == object
        return columns["width"] > 1

    assert count_rows([index], wide, ("width", "caption_alt")) == {"000000": 3, "000001": 1}
    assert select_rows(ShardReader([index], "000001"), wide, ("width", "caption_alt")).tolist() == [2]


def test_columns_with_nulls(place):
    sidecar(
        place,
        states=["accepted"] * 5,
        keep=[True, False, None, True, False],
        score=[1.0, None, 2.0, 3.0, 4.0],
        text=["a", None, "c", "d", "e"],
        none=pa.nulls(5),
    )
    columns = ShardReader([place], "000000").columns(("keep", "score", "text", "none"))
    assert columns["keep"].tolist() == [True, False, None, True, False]
    assert columns["score"].dtype == np.float64
    assert np.isnan(columns["score"][1])
    assert columns["text"].tolist() == ["a", None, "c", "d", "e"]
    assert len(columns["none"]) == 5


def test_mistakes_are_sentences(index, place):
    other = storage.join(place, "other")
    sidecar(other, ids=[f"{n:024x}" for n in range(9, 14)])
    with pytest.raises(ValueError, match="does not hold the rows"):
        ShardReader([index, other], "000000")
    with pytest.raises(ValueError, match=r"no column 'codes' in the inputs; there are .*caption_alt"):
        ShardReader([index], "000000").columns(["codes"])
    with pytest.raises(ValueError, match="none of the artifacts is an ingest"):
        ShardReader([other], "000000").rows(["pixels"], [0])
    sidecar(other, "000001")
    with pytest.raises(ValueError, match="000001 is in one of them only"):
        joined_names([index, other])


def test_a_source_that_changed_or_vanished_is_noticed(index):
    url = storage.join(index, "corpus/0.bin")
    data = bytearray(storage.read_bytes(url))
    data[50] ^= 1
    storage.write_bytes(url, bytes(data))
    reader = ShardReader([index], "000000")
    found = list(reader.pixels(np.arange(3)))
    assert isinstance(found[0], ValueError)
    assert np.array_equal(found[1], picture(2))
    with pytest.raises(OSError, match=f"{IDS[0]} of shard 000000 is lost: .* has changed since it was ingested"):
        reader.rows(("pixels",), [0])
    storage.remove(url)
    assert all(isinstance(one, FileNotFoundError) for one in ShardReader([index], "000000").images(np.arange(3)))


def test_the_ledger(place):
    assert pending(place, ["000000", "000001"]) == ["000000", "000001"]
    sidecar(place)
    assert pending(place, ["000000", "000001"]) == ["000001"]
    other = pa.table({"sample_id": ["other"], "state": ["accepted"], "reason": pa.nulls(1, pa.string())})
    assert commit(place, "000000", other) == inspect(place, "000000")  # the first one stays
    assert inspect(place, "000000")["rows_in"] == 5
    sidecar(place, "000001", reasons=[None, "oops: another", None, None, None])
    assert tally(place) == {
        "shards": 2,
        "rows_in": 10,
        "accepted": 6,
        "rejected": 2,
        "failed": 2,
        "reasons": {"oops": 2, "no caption": 1},
    }
