"""Two thousand and more broken inputs, taken through the readers and the ingest as a corpus would be."""

import io
import json
import os
import random
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.data.images import FORMATS, decode, measure
from infra.data.readers import find_corpus, write_sources
from tests.infra.data.zoo import as_members, encode, picture, samples, tar
from workflows.ingest import IngestConfig, IngestWork

# Of each kind; together more than 2,000.
CUT_IMAGES, FLIPPED_IMAGES, ZEROED_IMAGES = 300, 420, 180
TEXTS, CUT_TARS, FLIPPED_TARS, MIXED_TARS, PARQUETS, TABLES = 200, 250, 200, 150, 300, 60

PICTURE = picture(0)
PNG = encode(PICTURE)
ENCODED = {kind: encode(PICTURE, kind) for kind in FORMATS}


def ingest(folder, out, **options):
    """The rows of all shards, without Ray; what it took in seconds of this process is bounded as well."""
    config = IngestConfig(corpus=str(folder), **options)
    corpus = find_corpus(config.corpus, config.shard_rows)
    write_sources(corpus, str(out))
    work = IngestWork(config, corpus.sources, str(out))
    started = time.process_time()
    rows = [row for name in corpus.sources for row in work(name).to_pylist()]
    assert time.process_time() - started < 40
    assert len({row["sample_id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["state"] in ("accepted", "rejected", "failed")
        assert (row["reason"] is None) == (row["state"] == "accepted")
        if row["state"] == "accepted":
            assert (row["caption_alt"] is None) <= (row["alt_fault"] is not None)
            assert row["width"] > 0
            assert row["height"] > 0
        else:
            assert 4 < len(row["reason"]) < 400
            assert "\n" not in row["reason"]
    return rows


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def flip(data, rng, most=8):
    data = bytearray(data)
    for _ in range(rng.randint(1, most)):
        data[int(rng.random() ** 2 * len(data))] ^= 1 << rng.randrange(8)  # more often in the header
    return bytes(data)


def zero(data, rng):
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.randint(1, 200))
    return data[:start] + bytes(end - start) + data[end:]


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, pixels, depth=8, color=2, before=b""):
    """A PNG of compressed scan lines."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def squeezed(size):
    """So many zero bytes, compressed."""
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(min(2**20, size - at))) for at in range(0, size, 2**20)) + packer.flush()


def scans(count, size=64):
    """A progressive JPEG whose last scan comes again and again."""
    data = encode(np.zeros((size, size, 3), dtype=np.uint8), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


def wide(kind, width, height):
    return encode(Image.linear_gradient("L").resize((width, height)).convert("RGB"), kind)


def animated(kind, frames=30):
    images = [Image.fromarray(picture(n)) for n in range(frames)]
    return encode(images[0], kind, save_all=True, append_images=images[1:], duration=20)


GREY16 = (np.arange(24 * 40, dtype=np.uint16) * 60).reshape(24, 40)
FINE = {
    **{f"wrong-ending-{kind}": data for kind, data in ENCODED.items()},
    **{f"1x1-{kind}": encode(picture(1, 1, 1), kind) for kind in FORMATS},
    **{f"wide-{kind}": wide(kind, 20_000, 3) for kind in FORMATS if kind != "WEBP"},
    **{f"tall-{kind}": wide(kind, 3, 20_000) for kind in FORMATS if kind != "WEBP"},
    **{f"animated-{kind}": animated(kind) for kind in ("GIF", "WEBP", "PNG", "TIFF")},
    "cmyk-jpeg": encode(Image.fromarray(PICTURE).convert("CMYK"), "JPEG"),
    "cmyk-tiff": encode(Image.fromarray(PICTURE).convert("CMYK"), "TIFF"),
    "16-bit-png": encode(GREY16),
    "16-bit-tiff": encode(GREY16, "TIFF"),
    "32-bit-tiff": encode(Image.fromarray(GREY16.astype(np.int32)), "TIFF"),
    "float-tiff": encode(Image.fromarray(GREY16.astype(np.float32)), "TIFF"),
    "lab-tiff": encode(Image.fromarray(PICTURE).convert("LAB"), "TIFF"),
    "ten-scans": encode(PICTURE, "JPEG", progressive=True),
    "more-data-than-pixels": png(100, 100, squeezed(2**26)),
    "bytes-after-the-end": PNG + b"<html>",
}
REFUSED = {
    **{f"header-bomb-{w}x{h}": (png(w, h, squeezed(9)), "too many pixels") for w, h in [(9000, 9000), (2**31 - 1, 1)]},
    "bmp-bomb": (ENCODED["BMP"][:18] + struct.pack("<ii", 30_000, 30_000) + ENCODED["BMP"][26:], "too many pixels"),
    "gif-bomb": (ENCODED["GIF"][:6] + b"\xff\xff\xff\xff" + ENCODED["GIF"][10:], None),
    "scan-bomb": (scans(5000), "too many scans"),
    "text-bomb": (png(8, 8, squeezed(200), before=chunk(b"zTXt", b"a\0\0" + squeezed(2**26))), None),
    "profile-bomb": (png(8, 8, squeezed(200), before=chunk(b"iCCP", b"a\0\0" + squeezed(2**26))), None),
    "empty": (b"", "empty image"),
    "zeros": (bytes(5000), "not an image"),
    "html": (b"<html>404 not found</html>", "not an image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "pdf": (b"%PDF-1.4\n", "not an image"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "mp4": (b"\0\0\0\x18ftypmp42" + bytes(100), "not an image"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "not an image"),
    "tar": (tar([("a.png", PNG)]), "not an image"),
    "psd": (b"8BPS\0\1" + bytes(100), "not an image"),
    "magic-only-png": (PNG[:8], None),
    "magic-only-jpeg": (ENCODED["JPEG"][:3], None),
    "magic-only-webp": (ENCODED["WEBP"][:12], None),
}


def broken_images():
    """(key, bytes, what the reason must begin with, or "" for any, or None where it is accepted or not)."""
    rng = random.Random(0)
    kinds = list(FORMATS)
    for number in range(CUT_IMAGES):
        data = ENCODED[kinds[number % len(kinds)]]
        yield f"cut{number}", data[: rng.randrange(len(data) // 2)], ""
    for number in range(FLIPPED_IMAGES):
        yield f"flipped{number}", flip(ENCODED[kinds[number % len(kinds)]], rng), None
    for number in range(ZEROED_IMAGES):
        yield f"zeroed{number}", zero(ENCODED[kinds[number % len(kinds)]], rng), None


def test_broken_images(tmp_path):
    images = list(broken_images())
    endings = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
    for shard in range(9):
        members = []
        for number, (key, data, _) in enumerate(images[shard::9]):
            members += [(f"{key}.{endings[number % len(endings)]}", data), (f"{key}.txt", b"a caption")]
        put(tmp_path / f"c/{shard}.tar", tar(members))
    rows = {row["key"]: row for row in ingest(tmp_path / "c", tmp_path / "out", image_size=(16, 16))}
    assert rows.keys() == {key for key, _, _ in images}
    for key, _, expected in images:
        if expected is not None:
            assert rows[key]["state"] == "rejected", key
    states = Counter(row["state"] for row in rows.values())
    assert states["accepted"] > 50  # a flipped bit of a pixel is a pixel
    assert states["failed"] == 0
    assert len({row["reason"].split(":")[0] for row in rows.values() if row["reason"]}) >= 4


def test_a_corpus_whose_own_name_is_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xfe")
    folder.mkdir()
    (folder / "0.tar").write_bytes(tar(HEALTHY))
    assert {row["reason"] for row in ingest(folder, tmp_path / "out")} == {"the file's name is not UTF-8"}


@pytest.mark.parametrize("image_size", [None, (16, 16)])
def test_odd_images(tmp_path, image_size):
    members = [(f"{key}.jpg", data) for key, data in FINE.items()]
    members += [(f"{key}.jpg", data) for key, (data, _) in REFUSED.items()]
    members += [(name.replace(".jpg", ".txt"), b"a caption") for name, _ in members]
    put(tmp_path / "c/0.tar", tar(members))
    rows = {row["key"]: row for row in ingest(tmp_path / "c", tmp_path / "out", image_size=image_size)}
    assert {key: rows[key]["reason"] for key in FINE} == dict.fromkeys(FINE)
    assert (rows["wide-PNG"]["width"], rows["wide-PNG"]["height"]) == (20_000, 3)
    for key, (_, reason) in REFUSED.items():
        if reason is not None or rows[key]["state"] != "accepted":
            assert rows[key]["reason"].startswith(reason or ""), key
    for key in ("text-bomb", "profile-bomb"):  # the pixels are well; what matters is that little memory was taken
        assert rows[key]["state"] in ("accepted", "rejected")


def test_pictures_of_several_pictures_are_bounded_too():
    """A JPEG that says it holds two is of another format to Pillow."""
    data = encode(PICTURE, "MPO", progressive=True, save_all=True, append_images=[Image.fromarray(PICTURE)])
    last = data[data.rindex(b"\xff\xda") : -2]
    assert decode(data).shape == PICTURE.shape
    with pytest.raises(ValueError, match="too many scans"):
        decode(data[:-2] + last * 200 + data[-2:])


def test_many_scans_are_refused_before_they_take_time():
    """Each of 30 bytes takes as long as the whole image: of 4096 x 4096 pixels, a megabyte would take hours."""
    data = scans(30_000, 1024)
    started = time.process_time()
    for function in (decode, measure):
        with pytest.raises(ValueError, match="too many scans"):
            function(data)
    assert time.process_time() - started < 1


FAULT_STARTS = {
    "reason": ("no image", "duplicate key"),
    "alt_fault": ("caption", "empty caption", "no caption", "1 of 2 captions"),
    "meta_fault": ("broken metadata",),
    "split_fault": ("unknown split",),
}


def broken_text(rng):
    """A caption or a json that may be anything."""
    return rng.choice(
        [
            lambda: rng.randbytes(rng.randint(1, 300)),
            lambda: "größer".encode("latin-1") * rng.randint(1, 50),
            lambda: "текст".encode("utf-16"),
            lambda: "文字".encode("shift-jis"),
            lambda: b"x" * rng.choice([10_000, 10_001, 100_000, 2**20 + 5]),
            lambda: "\U0001f600".encode() * 25_000,
            lambda: b"\0" * rng.randint(0, 40),
            lambda: b" \n\t" * 20,
            lambda: b"\xef\xbb\xbf",
            lambda: b"\xed\xa0\x80 a surrogate",
            lambda: b"\xc0\xaf overlong",
            lambda: b"right\xe2\x80\xaeleft \x1b[31m red \x07",
            lambda: b"",
        ]
    )()


def broken_json(rng):
    return rng.choice(
        [
            lambda: broken_text(rng),
            lambda: b'{"split": "train"',
            lambda: b'{"a":' * 50_000,
            lambda: b'{"split": ["train"]}',
            lambda: b'{"split": 1e999, "scene": NaN}',
            lambda: b'{"caption_short": "\\ud800", "caption_descriptive": 5}',
            lambda: b'{"n": ' + b"9" * 5000 + b"}",
            lambda: b"null",
            lambda: json.dumps({"scene": {"a": [None] * 100}, "split": "train", "\0": "\0"}).encode(),
        ]
    )()


def test_broken_texts(tmp_path):
    rng = random.Random(1)
    members = []
    for number in range(TEXTS):
        files = [(f"{number}.png", PNG), (f"{number}.txt", broken_text(rng)), (f"{number}.json", broken_json(rng))]
        rng.shuffle(files)
        members += files[: rng.choice([1, 2, 3, 3, 3])]
        if rng.random() < 0.1:
            members.append(rng.choice(files))
    put(tmp_path / "c/0.tar", tar(members))
    rows = ingest(tmp_path / "c", tmp_path / "out")
    assert {row["key"] for row in rows} == {name.split(".")[0] for name, _ in members}
    for name, starts in FAULT_STARTS.items():
        told = [row[name] for row in rows if row[name]]
        assert len(told) > (0 if name == "split_fault" else TEXTS / 20), name
        assert all(fault.startswith(starts) for fault in told), set(told)
    assert all((row["state"] == "accepted") == (row["sha256"] is not None) for row in rows)  # by its picture alone


HEALTHY = list(as_members(samples(3)))


def wholes(tmp_path):
    """Hash and caption of each healthy sample."""
    put(tmp_path / "whole/0.tar", tar(HEALTHY))
    return {(row["key"], row["sha256"], row["caption_alt"]) for row in ingest(tmp_path / "whole", tmp_path / "w")}


def test_tars_cut_at_any_byte(tmp_path):
    whole = wholes(tmp_path)
    rng = random.Random(2)
    forms = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    for number in range(CUT_TARS):
        data = tar(HEALTHY, format=forms[number % 3])
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            list(archive)
            end = archive.offset + 1024
        put(tmp_path / f"c/{number:03d}.tar", data[: rng.randrange(end)])
    rows = ingest(tmp_path / "c", tmp_path / "out")
    assert sum(row["key"].endswith("#truncated") for row in rows) == CUT_TARS
    kept = {(row["key"], row["sha256"], row["caption_alt"]) for row in rows if row["state"] == "accepted"}
    assert kept <= whole


def test_tars_with_flipped_bits(tmp_path):
    rng = random.Random(3)
    for number in range(FLIPPED_TARS):
        data = bytearray(tar(HEALTHY, format=(tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[number % 2]))
        for _ in range(rng.randint(1, 6)):  # half of them in headers
            place = rng.randrange(len(data))
            data[place // 512 * 512 + rng.randrange(160) if rng.random() < 0.5 else place] ^= 1 << rng.randrange(8)
        put(tmp_path / f"c/{number:03d}.tar", bytes(data))
    rows = ingest(tmp_path / "c", tmp_path / "out")
    assert len(rows) >= FLIPPED_TARS
    assert {row["state"] for row in rows} == {"accepted", "rejected", "failed"}


def odd_member(rng):
    name = rng.choice(["a", "b", "../a", "/a", "x/../../b", "..", "", "a.b", "é", "n" * 300, "\udcff", "a\nb", " "])
    name += rng.choice([".png", ".txt", ".json", ".JPG", ".png.txt", "", ".", ".exe", "/.png"])
    if rng.random() < 0.6:
        return name, rng.choice([PNG, b"text", b"{}", b"", PNG[:99], bytes(600)])
    info = tarfile.TarInfo(name)
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
    kinds += [tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, b"Z"]
    info.type, info.linkname = rng.choice(kinds), rng.choice(["a.png", "../../etc/passwd", "/dev/zero", ""])
    info.pax_headers = rng.choice([{}, {"path": "../up.png"}, {"size": "9" * 30}, {"GNU.sparse.map": "1,2,3"}])
    return name, info


def test_tars_of_odd_members(tmp_path):
    rng = random.Random(4)
    for number in range(MIXED_TARS):
        members = [*HEALTHY, *(odd_member(rng) for _ in range(rng.randint(1, 8)))]
        rng.shuffle(members)
        data = tar(members, errors="surrogateescape", format=(tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[number % 2])
        put(tmp_path / f"c/{number:03d}.tar", data)
    rows = ingest(tmp_path / "c", tmp_path / "out")
    unsafe = [row for row in rows if row["key"].startswith("/") or ".." in row["key"].split("/")]
    assert unsafe
    assert all(row["state"] != "accepted" for row in unsafe)
    reasons = {(row["reason"] or "").split(":")[0] for row in rows}
    assert {"unsafe name", "duplicate key", "no image", "image is not a plain file"} <= reasons


def test_long_names_and_headers_without_end(tmp_path):
    """Headers that follow headers are read by recursion, and global ones are copied for each member."""
    plain = tarfile.TarInfo("a.png")
    longname = tarfile.TarInfo("././@LongLink")
    longname.type, longname.size = tarfile.GNUTYPE_LONGNAME, 5
    nested = (longname.tobuf() + b"a.png".ljust(512, b"\0")) * 5000 + plain.tobuf() + bytes(1024)
    put(tmp_path / "c/0.tar", nested)
    many = {f"k{n}": "v" for n in range(3000)}
    crowd = tar([(f"{n}.txt", b"") for n in range(2000)], format=tarfile.PAX_FORMAT, pax_headers=many)
    put(tmp_path / "c/1.tar", crowd)
    sizes = bytearray(plain.tobuf())
    sizes[124:136] = b"\x80" + (2**62).to_bytes(11, "big")
    sizes[148:156] = b" " * 8
    sizes[148:156] = f"{sum(sizes):06o}\0 ".encode()
    put(tmp_path / "c/2.tar", bytes(sizes) + bytes(2048))
    rows = ingest(tmp_path / "c", tmp_path / "out")
    assert [row["state"] for row in rows if not row["key"].isdigit()] == ["failed"] * (len(rows) - 2000)
    assert sum(row["key"].isdigit() for row in rows) == 2000


def test_broken_parquet_files(tmp_path):
    rng = random.Random(5)
    table = pa.table(
        {
            "key": [f"k{n}" for n in range(12)],
            "jpg": [PNG] * 12,
            "caption": [f"text {n} ü" for n in range(12)],
            "json": ['{"split": "train"}'] * 12,
            "more": [{"a": [n, None]} for n in range(12)],
        }
    )
    for number in range(PARQUETS):
        sink = io.BytesIO()
        version = rng.choice(["1.0", "2.0"])
        pq.write_table(
            table, sink, row_group_size=5, compression=rng.choice(["none", "zstd", "snappy"]),
            use_dictionary=rng.random() < 0.5, data_page_version=version,
        )  # fmt: skip
        data = sink.getvalue()
        damaged = [
            lambda data: data[: rng.randrange(len(data))],
            lambda data: flip(data, rng, 4),
            lambda data: data[:-1500] + flip(data[-1500:], rng, 4),
            lambda data: zero(data, rng),
        ][number % 4](data)
        put(tmp_path / f"c/{number:03d}.parquet", damaged)
    rows = ingest(tmp_path / "c", tmp_path / "out")
    assert any(row["key"].endswith("#damaged") for row in rows)
    assert any(row["state"] == "accepted" for row in rows)


def test_broken_tables(tmp_path):
    """Folders of images whose CSV or JSONL is damaged: no row of it, and no image, goes without a word."""
    rng = random.Random(6)
    lines = [b"file_name,text"] + [b"%d.png,a caption" % n for n in range(4)]
    odd = [b'0.png,"no end', b"\xff.png,x", b"1.png,gr\xf6\xdfer", b"2.png," + b"x" * 200_000, b"\0,\0", b",,,", b""]
    odd += [b'3.png,"a""b",c,d', b"../0.png,up", b'{"file_name": "1.png"}', b'{"file_name": 5}', b"[" * 5000, b"\r"]
    for number in range(TABLES):
        folder = tmp_path / f"c{number}"
        for n in range(4):
            put(folder / f"{n}.png", PNG)
        kind = ("csv", "jsonl")[number % 2]
        rows = lines[1:] + rng.choices(odd, k=4)
        if kind == "jsonl":
            rows = [json.dumps({"file_name": f"{n}.png", "text": "a caption"}).encode() for n in range(4)] + rows[4:]
        rng.shuffle(rows)
        head = lines[:1] if kind == "csv" else []
        put(folder / f"t.{kind}", b"\n".join(head + rows))
        found = ingest(folder, tmp_path / f"out{number}")
        assert {str(n) for n in range(4)} <= {row["key"] for row in found}
        if kind == "jsonl":
            assert sum(row["state"] == "accepted" for row in found) >= 4


def test_broken_files_in_folders(tmp_path):
    rng = random.Random(7)
    for number in range(100):
        damaged = rng.choice([PNG, b"", PNG[: rng.randrange(300)], flip(PNG, rng)])
        put(tmp_path / f"c/{number}.jpg", damaged)
        put(tmp_path / f"c/{number}.txt", broken_text(rng))
    os.symlink("/nonexistent/image", tmp_path / "c/broken.png")
    for name in (b"\xff.png", b"\xff.txt"):
        (tmp_path / "c" / os.fsdecode(name)).write_bytes(PNG if b"png" in name else b"x")
    put(tmp_path / "c/broken.txt", b"its image is a link to nowhere")
    put(tmp_path / "c/endless.png", PNG)
    put(tmp_path / "c/endless.txt", b"x" * 2**22)
    rows = {row["key"]: row for row in ingest(tmp_path / "c", tmp_path / "out", shard_rows=30)}
    assert len(rows) == 102  # a link to nowhere is no picture, and a text without one no row
    assert rows["?"]["reason"] == "the file's name is not UTF-8"
    assert rows["endless"]["alt_fault"] == f"caption too long: more than {2**20:,} bytes"


def test_there_are_two_thousand():
    images = CUT_IMAGES + FLIPPED_IMAGES + ZEROED_IMAGES + len(FINE) + len(REFUSED)
    assert images + TEXTS + CUT_TARS + FLIPPED_TARS + MIXED_TARS + PARQUETS + TABLES + 100 >= 2000


MEASURED = """
import resource, sys
from tests.infra.data.test_fuzz import ingest
for corpus in ("fine", "bombs"):
    ingest(f"{sys.argv[1]}/{corpus}", f"{sys.argv[1]}/out", image_size=(16, 16))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.timeout(300)
def test_memory_is_bounded(tmp_path):
    """Pictures as large as they may be, four at a time if nobody minded: of this size each takes 200 MB."""
    bomb = png(5000, 5000, squeezed(5000 * (1 + 5000 * 4)), color=6)
    small = [("small.png", PNG), ("small.txt", b"x")]
    members = [(f"{n}.{ending}", data) for n in range(6) for ending, data in (("png", bomb), ("txt", b"x"))]
    members += [(f"{key}.jpg", data) for key, data in FINE.items()] + [(f"{k}.jpg", d) for k, (d, _) in REFUSED.items()]
    put(tmp_path / "fine/0.tar", tar(small))
    put(tmp_path / "bombs/0.tar", tar(small + members))
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    fine, bombs = subprocess.run(command, check=True, capture_output=True, text=True, timeout=280).stdout.split()
    assert int(bombs) - int(fine) < 450  # MB
