"""The gallery of made-up artifacts: which rows are drawn, and that bad ones are shown with what is left of them."""

import base64
import hashlib
import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infra import storage
from infra.data.images import encode_png
from infra.data.shards import ShardReader
from infra.store import Artifact
from workflows import gallery as module
from workflows.gallery import draw, gallery, shares

PER_SHARD = 20
STEPS = ("ingest", "recaption", "mix")


def sample_id(n):
    return hashlib.sha256(str(n).encode()).hexdigest()[:24]


def colour(n):
    return (n * 37 % 256, n * 91 % 256, n * 13 % 256)


def picture(n):
    return encode_png(np.full((30, 40, 3), colour(n), np.uint8))


def put(folder, name, columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    storage.write_bytes(storage.join(folder, "shards", f"{name}.parquet"), sink.getvalue().to_pybytes())


def state_of(n):
    """Of twenty rows one is no image, one has no caption, one has neither, and one fails to be captioned."""
    return {3: ("rejected", "not an image"), 7: ("rejected", "empty caption"), 11: ("rejected", "no image")}.get(
        n % 20, ("accepted", None)
    )


def make(place, rows=60, per_shard=PER_SHARD, copies=False):
    """An ingest, a recaption and a mix of the same rows."""
    paths = {step: storage.join(place, step, hashlib.sha256(step.encode()).hexdigest()[:16]) for step in STEPS}
    for number, start in enumerate(range(0, rows, per_shard)):
        name, part = f"{number:06d}", range(start, min(start + per_shard, rows))
        files = [b"" if n % 20 == 11 else b"GIF8 no" if n % 20 == 3 else picture(n) for n in part]
        storage.write_bytes(storage.join(paths["ingest"], "corpus", name), b"".join(files))
        ids, states = [sample_id(n) for n in part], [state_of(n) for n in part]
        base = {
            "sample_id": ids,
            "state": [s for s, _ in states],
            "reason": pa.array([r for _, r in states], pa.string()),
        }
        index = base | {
            "key": [f"key-{n}" for n in part],
            "caption_alt": [f"alt {n}" if s == "accepted" else None for n, (s, _) in zip(part, states, strict=True)],
            "source": [f"corpus/{name}"] * len(part),
            "offset": np.cumsum([0, *map(len, files)])[:-1],
            "length": [len(file) for file in files],
            "sha256": [hashlib.sha256(file).hexdigest() if file else None for file in files],
        }
        if copies:
            index["image"] = [file if s == "accepted" else None for file, (s, _) in zip(files, states, strict=True)]
        put(paths["ingest"], name, index)
        told = [("failed", "Caption: OSError: gone") if n % 20 == 15 else state_of(n) for n in part]
        fine = [s == "accepted" for s, _ in told]
        base = {"sample_id": ids, "state": [s for s, _ in told], "reason": pa.array([r for _, r in told], pa.string())}
        columns = {
            "caption_short": [f"short {n}" if ok else None for n, ok in zip(part, fine, strict=True)],
            "logp_short": [-n / 10 if ok else None for n, ok in zip(part, fine, strict=True)],
            "flag_short": pa.array([n % 2 == 0 if ok else None for n, ok in zip(part, fine, strict=True)], pa.bool_()),
            "other": list(part),
        }
        order = list(range(len(part)))[::-1]  # a later step need not keep the order
        put(paths["recaption"], name, pa.table(base | columns).take(order))
        keep = [n % 5 != 0 if ok else None for n, ok in zip(part, fine, strict=True)]
        why = ["short unlikely" if one is False else None for one in keep]
        mixed = base | {"keep": pa.array(keep, pa.bool_()), "keep_reason": pa.array(why, pa.string())}
        mixed |= {
            f"weight_{style}": pa.array([share * k if k is not None else None for k in keep], pa.float32())
            for style, share in SHARES.items()
        }
        put(paths["mix"], name, mixed)
    for step, path in paths.items():
        storage.write_json(storage.join(path, "manifest.json"), {"step": step, "id": path[-16:], "summary": {}})
    return [Artifact.open(path) for path in paths.values()]


SHARES = {"alt": 0.0, "short": 1.0}


def told(out):
    text = storage.read_bytes(out).decode()
    found = json.loads(re.search(r'<script type="application/json" id="rows">(.*?)</script>', text, re.S)[1])
    return {row["id"]: row for row in found["rows"]}, found["totals"]


def middle(row):
    data, height, width = row["image"]
    with Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))) as image:
        assert image.size == (width, height) == (40, 30)
        return image.convert("RGB").getpixel((20, 15))


@pytest.mark.parametrize("copies", [False, True])
def test_every_row_is_shown_with_what_is_left_of_it(tmp_path, copies):
    images, captions, mixture = make(str(tmp_path), copies=copies)
    out = str(tmp_path / "pages" / "gallery.html")
    counts = gallery(images, captions, mixture, out=out, count=100)
    rows, totals = told(out)
    verdicts = {sample_id(n): "rejected" if n % 5 == 0 or n % 20 in (3, 7, 11) else "keep" for n in range(60)}
    verdicts |= {sample_id(n): "failed" for n in range(15, 60, 20)}
    assert {id_: row["verdict"] for id_, row in rows.items()} == verdicts
    assert counts["drawn_from"] == totals == {name: list(verdicts.values()).count(name) for name in totals}
    assert (counts["rows"], counts["pictures"], counts["page"]) == (60, 54, out)
    assert counts["bytes"] == len(storage.read_bytes(out))
    for n in (1, 21, 5, 7, 15):  # of those without a caption, too, the picture is shown
        assert middle(rows[sample_id(n)]) == colour(n)
    kept = rows[sample_id(21)]
    assert kept["captions"] == {"alt": "alt 21", "short": "short 21"}
    assert kept["scores"] == {"logp_short": -2.1}
    assert kept["read"] == {"short": 1.0}  # of its captions this one is read
    assert "read" not in rows[sample_id(5)]
    assert (kept["key"], kept["state"], "reason" in kept, "flags" in kept) == ("key-21", "accepted", False, False)
    assert rows[sample_id(22)]["flags"] == ["short"]
    assert (rows[sample_id(5)]["state"], rows[sample_id(5)]["reason"]) == ("accepted", "short unlikely")
    assert rows[sample_id(15)]["reason"] == "Caption: OSError: gone"
    assert rows[sample_id(7)]["reason"] == "empty caption"
    assert (rows[sample_id(11)]["reason"], rows[sample_id(11)]["lost"]) == ("no image", "there is no image")
    assert "image" not in rows[sample_id(3)]
    assert rows[sample_id(3)]["lost"]


@pytest.mark.timeout(120)
def test_it_reads_and_writes_s3(s3):
    images, captions, mixture = make(s3, rows=20)
    counts = gallery(images, captions, mixture, out=f"{s3}/pages/gallery.html")
    assert (counts["rows"], counts["pictures"]) == (20, 18)
    assert len(told(counts["page"])[0]) == 20


def test_without_a_mixture_all_accepted_rows_are_kept(tmp_path):
    images, captions, _ = make(str(tmp_path))
    gallery(images, captions, out=str(tmp_path / "page.html"))
    rows, totals = told(str(tmp_path / "page.html"))
    assert totals == {"keep": 48, "rejected": 9, "failed": 3}
    assert rows[sample_id(5)]["verdict"] == "keep"
    assert "read" not in rows[sample_id(5)]


def test_all_accepted_captions_are_looked_at_not_the_drawn_ones_alone(tmp_path):
    images, captions, mixture = make(str(tmp_path))
    out = str(tmp_path / "page.html")
    gallery(images, captions, mixture, out=out, count=3)
    text = " ".join(re.sub(r"<[^>]*>", " ", storage.read_bytes(out).decode()).split())
    assert "figures below are of these. 48 48 Begin with" in text  # of 60 rows, whatever `mix` decided
    assert "short Faulty 62.5 % of 48 flagged 62.5 %" in text
    assert "along the 3 shards" in text
    first = storage.read_bytes(out)
    gallery(images, captions, mixture, out=out, count=3)
    assert storage.read_bytes(out) == first
    gallery(images, captions, mixture, out=out, count=3, whole=False)
    assert b'id="collapse"' not in storage.read_bytes(out)


def test_lost_and_changed_images_are_said_on_the_page(tmp_path):
    images, captions, mixture = make(str(tmp_path))
    storage.write_bytes(images.url("corpus", "000000"), bytes(100_000))
    storage.remove(images.url("corpus", "000001"))
    out = str(tmp_path / "page.html")
    assert gallery(images, captions, mixture, out=out)["pictures"] == 18
    rows, _ = told(out)
    assert "has changed" in rows[sample_id(1)]["lost"]
    assert "lost" in rows[sample_id(21)]


def test_the_draw_is_of_ids_and_even_among_verdicts(tmp_path):
    inputs = [one.path for one in make(str(tmp_path / "a"), rows=400, per_shard=100)]
    other = [one.path for one in make(str(tmp_path / "b"), rows=400, per_shard=150)]

    def ids(inputs, drawn):
        return {ShardReader(inputs, name).sample_ids[row] for name, rows in drawn.rows.items() for row in rows}

    drawn = draw(inputs, 90, 0)
    found = ids(inputs, drawn)
    assert len(found) == 90
    assert drawn.totals == {"keep": 260, "rejected": 120, "failed": 20}
    failed = {sample_id(n) for n in range(15, 400, 20)}
    assert failed <= found  # fewer than their share: all of them, and the others get what is left
    rejected = {sample_id(n) for n in range(400) if n % 5 == 0 or n % 20 in (3, 7, 11)} - failed
    assert len(found & rejected) == 35
    assert all(np.all(np.diff(rows) > 0) for rows in drawn.rows.values())
    assert ids(other, draw(other, 90, 0)) == found  # whatever shards the rows lie in
    assert ids(inputs, draw(inputs, 90, 1)) != found
    assert ids(inputs, draw(inputs, 60, 0)) < found  # a smaller page shows rows of the larger one


def test_only_the_images_of_drawn_rows_are_read(tmp_path, monkeypatch):
    images, captions, mixture = make(str(tmp_path), rows=200)
    seen = []
    shrunk = module._shrunk
    monkeypatch.setattr(module, "_shrunk", lambda image, edge: seen.append(image) or shrunk(image, edge))
    gallery(images, captions, mixture, out=str(tmp_path / "page.html"), count=12)
    assert len(seen) == 12


def test_large_pictures_are_made_small(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (1600, 800), (200, 10, 10)).save(buffer, "JPEG", exif=_turned())
    found = module._shrunk(buffer.getvalue(), 100)
    assert found.shape == (100, 50, 3)
    assert isinstance(module._shrunk(b"no image", 100), ValueError)
    assert module._shrunk(picture(1), 100).shape == (30, 40, 3)


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 50), max_size=5), st.integers(1, 120))
def test_shares_are_even_as_far_as_the_sizes_allow(sizes, count):
    found = shares(sizes, count)
    assert sum(found.values()) == min(count, sum(sizes.values()))
    assert all(found[name] <= sizes[name] for name in sizes)
    # Who got less than another by more than the remainder had no more to give.
    for name in sizes:
        assert found[name] == sizes[name] or found[name] >= max(found.values()) - 1


def test_a_broken_count_is_refused_before_anything_is_read(tmp_path):
    images, captions, mixture = make(str(tmp_path), rows=20)
    with pytest.raises(ValueError, match="at least one row"):
        gallery(images, captions, mixture, out=str(tmp_path / "page.html"), count=0)


def test_a_file_of_somebody_else_s_stays(tmp_path):
    images, captions, mixture = make(str(tmp_path), rows=20)
    mine = tmp_path / "mine.html"
    mine.write_text("<!doctype html><title>Mine</title>")
    with pytest.raises(ValueError, match="is no page of Rescribe's"):
        gallery(images, captions, mixture, out=str(mine))
    assert "Mine" in mine.read_text()
    for _ in range(2):  # a page of ours is made anew
        gallery(images, captions, mixture, out=str(tmp_path / "ours.html"))
