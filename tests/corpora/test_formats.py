"""Formats: what Pillow opens is read, colours are sRGB, and of several pictures the main one is chosen."""

import hashlib
import io
import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, features

from infra.data.images import FORMATS, decode
from tests.corpora.make import lines, photo

# Display P3, adapted to D50: the columns of red, green and blue in the profile that phones write.
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
GAMMA = 2.2


def profile(matrix):
    """An ICC profile (version 2.4) of three primaries and one gamma."""

    def fixed(*values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    white = (0.9642, 1.0, 0.8249)
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(GAMMA * 256)) + bytes(2)
    told = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 3) + b"P3\0" + bytes(4 + 4 + 2 + 1 + 67)}
    told[b"cprt"] = b"text" + bytes(4) + b"none\0"
    told |= {
        name: b"XYZ " + bytes(4) + fixed(*xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T, strict=True)
    }
    told |= {b"wtpt": b"XYZ " + bytes(4) + fixed(*white), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    index, body, at = struct.pack(">I", len(told)), b"", 128 + 4 + 12 * len(told)
    for name, data in told.items():
        index += name + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", at + len(body), bytes(4), 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2026, 11, 30, 0, 0, 0) + b"acsp" + bytes(28) + fixed(*white)
    return head.ljust(128, b"\0") + index + body


def as_srgb(color):
    """What a colour of the profile above is in sRGB, by the matrices (IEC 61966-2-1)."""
    linear = np.linalg.inv(SRGB) @ P3 @ (np.array(color) / 255) ** GAMMA
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colours_of_another_profile_become_srgb(corpus, kind):
    """OpenDisplay/Home_Assistant_Integration#73: of 97 photos 14 are Adobe RGB or Display P3, and come out pale."""
    color, ending = (110, 160, 90), kind.lower()
    image = Image.new("RGB", (16, 16), color)
    more = {"quality": 100} if kind in ("JPEG", "WEBP") else {}
    for name, icc in (("p3", {"icc_profile": profile(P3)}), ("plain", {})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **more, **icc)
        corpus.put({f"{name}.{ending}": buffer.getvalue(), f"{name}.txt": "green"})
    copies = corpus.read("--image-size", "8", "8").column("image")
    for name, wanted in (("p3", as_srgb(color)), ("plain", np.array(color))):
        assert np.abs(decode(copies[name]).astype(float) - wanted).max() <= 4, name


def test_a_profile_that_is_broken_costs_no_picture(corpus):
    """The same thread's photos after a careless editor: the profile is cut off."""
    for name, icc in (("cut", profile(P3)[:150]), ("garbage", b"no profile"), ("grey", profile(P3))):
        mode = "L" if name == "grey" else "RGB"
        buffer = io.BytesIO()
        Image.new(mode, (16, 16), 100).save(buffer, "PNG", icc_profile=icc)
        corpus.put({f"{name}.png": buffer.getvalue(), f"{name}.txt": "grey"})
    assert corpus.read().captions == {"cut": ["grey"], "garbage": ["grey"], "grey": ["grey"]}


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_whatever_it_is_called(corpus):
    """wmatson/easy-comfy-nodes#5: AVIF files, and JPEG names that happen to be AVIF."""
    corpus.put({"a.avif": photo(0, "AVIF"), "b.jpg": photo(1, "AVIF"), "c.JPG": photo(2)})
    corpus.put({f"{name}.txt": name for name in "abc"})
    found = corpus.read()
    assert found.captions == {name: [name] for name in "abc"}
    assert found.refused == {}


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        pytest.param(kind, ending, marks=pytest.mark.skipif(kind not in FORMATS, reason=f"there is no {package}"))
        for kind, ending, package in [("HEIF", "heic", "pillow-heif"), ("JXL", "jxl", "pillow-jxl-plugin")]
    ],
)
def test_a_format_of_an_extra_is_read_where_its_package_is(corpus, kind, ending):
    """replicate/dreambooth#23 once more, on a machine that reads the photo."""
    corpus.put({f"a.{ending}": photo(0, kind), "b.jpg": photo(1, kind), "a.txt": "a", "b.txt": "b"})
    found = corpus.read("--image-size", "16", "16")
    assert (found.captions, found.refused) == ({"a": ["a"], "b": ["b"]}, {})
    for number, key in enumerate("ab"):
        pixels = decode(found.column("image")[key]).astype(int)
        assert np.abs(pixels - decode(photo(number, "PNG"))).mean() < 12
    packed = replace(corpus, name="packed")
    packed.tar("0.tar", {f"c.{ending}": photo(2, kind), "c.txt": "c"})
    assert packed.read().captions == {"c": ["c"]}


def test_a_jpeg_that_kept_the_name_of_its_heic_is_read(corpus):
    """strukturag/libheif#675: IMG.HEIC, as a phone exports it, is a JPEG; "a common issue"."""
    corpus.put({"IMG_1.HEIC": photo(0), "IMG_1.txt": "one", "IMG_2.heif": photo(1), "IMG_2.txt": "two"})
    assert corpus.read().captions == {"IMG_1": ["one"], "IMG_2": ["two"]}


@pytest.mark.parametrize("kind", ["folder", "table", "tar"])
def test_a_mask_beside_its_picture_is_never_the_picture(corpus, kind):
    """Particle1904/DatasetHelpers#10: the mask of photo.jpg is photo-masklabel.png, as OneTrainer wants it."""
    files = {}
    for n in range(2):
        files |= {f"photo{n}-masklabel.png": photo(20 + n, "PNG"), f"photo{n}.jpg": photo(n)}
        files |= {} if kind == "table" else {f"photo{n}.txt": f"text {n}"}
    if kind == "tar":
        corpus.tar("0.tar", files)
    else:
        corpus.put(files)
    if kind == "table":
        corpus.put({"metadata.jsonl": lines(*({"file_name": f"photo{n}.jpg", "text": f"text {n}"} for n in range(2)))})
    assert corpus.read().captions == {f"photo{n}": [f"text {n}"] for n in range(2)}


def test_the_picture_of_a_row_is_not_its_depth_or_its_edges(corpus):
    """andreacos/MultiBranch_CNNCopyMove_Disambiguation#16 and its like: `name.tm.png`, parts by a suffix, in a tar."""
    members, wanted = {}, {}
    for n in range(2):
        parts = {f"{n:03d}.{part}.png": photo(30 + n, "PNG") for part in ("depth", "mask", "seg", "edges")}
        picture = photo(n, "PNG")
        members |= parts | {f"{n:03d}.png": picture, f"{n:03d}.txt": f"text {n}"}
        wanted[f"{n:03d}"] = hashlib.sha256(picture).hexdigest()
    corpus.tar("0.tar", members)
    found = corpus.read()
    assert found.column("sha256") == wanted
    assert found.captions == {f"{n:03d}": [f"text {n}"] for n in range(2)}
