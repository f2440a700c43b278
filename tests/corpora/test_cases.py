"""The shared cases, whose generators lie in the folder that RESCRIBE_CASES names: each is read as is right."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from infra.data.images import decode
from infra.data.readers import find_corpus
from tests.corpora.make import Corpus, exported

GENERATORS = Path(os.environ.get("RESCRIBE_CASES", ""))
pytestmark = pytest.mark.skipif(not (GENERATORS / "common.py").exists(), reason="RESCRIBE_CASES names no such folder")
RUN = "import runpy, sys; [runpy.run_path(path) for path in sys.argv[1:]]"


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """The folder of all the corpora."""
    place = tmp_path_factory.mktemp("cases")
    paths = sorted(str(path) for path in GENERATORS.glob("*.py") if path.stem != "common")
    told = os.environ | {"CASES": str(place), "PYTHONPATH": str(GENERATORS)}
    subprocess.run([sys.executable, "-c", RUN, *paths], env=told, check=True, capture_output=True)
    return place


def pictures(*numbers, text="picture {}"):
    return [[text.format(number)] for number in numbers]


THREE, FOUR, SIX = pictures(0, 1, 2), pictures(0, 1, 2, 3), pictures("00", "01", "10", "11", "20", "21")
TOLD = pictures(0, 1, 2, text="picture {}, a")
IMG2DATASET = pictures("00", "01", "02", "10", "11", "12")
# By folder and options: the captions of the accepted rows, in their order.
READ = {
    "no-captions/folder": [[], [], [], []],
    "no-captions/tars": [[], [], [], []],
    "no-captions/empty": [["a real caption"], [], [], []],
    "no-captions/parquet": [["a real caption"], [], [], []],
    "no-captions/half": [*pictures(0, 1), [], []],
    "no-captions/encodings": [["plain"], [], ["ein Bild"], []],
    "no-captions/encodings --encoding latin-1": [["plain"], ["größer"], ["ein Bild"], []],
    "caption-in-json/tars": THREE,
    "caption-in-json/folder": THREE,
    "caption-in-json/nested": [["picture 0"], ["one", "two"], ["one", "two"], ["picture 3"]],
    "store-in-corpus/photos": FOUR,
    "store-in-corpus/tars": pictures(0, 1),
    "symlinks/cache": SIX,
    "symlinks/cache/snapshots/rev": SIX,
    "symlinks/curated": pictures(0, 1),
    "symlinks/curated --follow-links": pictures(0, 1, 2, 3, 4),
    "symlinks/parts": pictures("x"),
    "symlinks/parts --follow-links": pictures("x", 2, 3, 4),
    "symlinks/mixed": pictures(0, 1),
    "symlinks/mixed --follow-links": pictures(0, 1, "20", "21"),
    **dict.fromkeys(
        (f"parquet-odd-columns/{name}" for name in ("images-list", "binary-list", "base64", "karpathy", "sentences",
         "metadata-column", "dictionary", "large", "duplicate-ids", "two-image-columns")), FOUR
    ),
    "parquet-odd-columns/numbers": [[], [], [], []],
    "parquet-odd-columns/caption-list": [[f"picture {n}", f"another of picture {n}"] for n in range(4)],
    "parquet-odd-columns/caption-list-named-caption": [[f"picture {n}", f"another of picture {n}"] for n in range(4)],
    "parquet-odd-columns/path-only": [],
    "parquet-odd-columns/path-string": [],
    "dotted-keys/dots": pictures(0, 1, 2, 3, 4),
    "dotted-keys/all-dots": pictures(0, 1, 2, 3, 4),
    "dotted-keys/parts": THREE,
    "dotted-keys/several": pictures(0, 1, 2, text="pictures of {}"),
    "dotted-keys/jpg-and-png": THREE,
    "dotted-keys/names": THREE,
    "dotted-keys/folder": THREE,
    **dict.fromkeys(
        (f"openclip-table/{name}" for name in ("tsv", "tabs-in-csv", "comma", "absolute", "windows", "semicolon")), TOLD
    ),
    "openclip-table/avif": pictures(0, 1, 2, "q", "r"),
    "img2dataset-files/files": IMG2DATASET,
    "img2dataset-files/webdataset": IMG2DATASET,
    "img2dataset-files/parquet": IMG2DATASET,
    **dict.fromkeys((f"gzip-named-tar/{name}" for name in ("gz-inside", "tar.gz", "tgz", "one-of-two")), SIX[:4]),
    "dot-caption/folder": THREE,
    "dot-caption/both": [["tag_a, tag_b, p0"], *pictures(1, 2, text="a sentence of picture {}")],
    "dot-caption/tars": THREE,
    "hidden-junk/folder": FOUR,
    "hidden-junk/tars": THREE,
    "brackets/[D_DATA]": pictures(0, 1),
    "brackets/odd names": pictures(3, 8, 4, 12, 5, 10, 9, 2, 0, 11, 13, 7, 6, 1),
    "brackets/odd pictures": pictures(9, 2, 3, 5, 6, 4, 7, 1, 8, 0, 10),
    "llava-flickr/llava-jsonl": THREE,
    "llava-flickr/llava-json": THREE,
    "llava-flickr/flickr-comma": [[f"picture {n}, told {j}" for j in range(5)] for n in range(3)],
    "llava-flickr/flickr-bars": [[f"picture {n} , told {j} ." for j in range(5)] for n in range(3)],
    "llava-flickr/lists": [["one", "two"], [], [], ["picture 3"], ["picture 4"]],
    "llava-flickr/stray-table": THREE,
}  # fmt: skip
# What is not accepted, and why; of the others every row is.
REFUSED = {
    "img2dataset-files/parquet": ["no image: the field is empty"] * 2,
    "parquet-odd-columns/path-only": [
        f"no image: its bytes are null, and /data/p{n}.png is no file of the corpus" for n in range(4)
    ],
    "parquet-odd-columns/path-string": [f"no image: p{n}.png is no file of the corpus" for n in range(4)],
}


def corpus_of(cases, folder):
    path = cases / folder
    return Corpus(path.parent, path.name)


@pytest.mark.parametrize("line", READ)
def test_a_case_is_read_as_is_right(cases, line):
    folder, *options = re.split(r" (?=--)", line)
    words = [word for option in options for word in option.split()]
    found = corpus_of(cases, folder).read("--image-size", "48", "64", *words)
    accepted = [row for row in found.rows if row["state"] == "accepted"]
    assert [row.get("captions_alt") or [row["caption_alt"]] * bool(row["caption_alt"]) for row in accepted] == READ[
        line
    ]
    assert list(found.refused.values()) == REFUSED.get(line, [])
    draw = runpy.run_path(str(GENERATORS / "common.py"))["pic"]
    for row in accepted:  # the text belongs to the picture
        if number := re.fullmatch(r"pictures? (?:of )?(\d+).*", row["caption_alt"] or ""):
            wanted = draw(int(number[1]) if line != "dotted-keys/several" else 10 * int(number[1]) + 1)
            assert np.abs(decode(row["image"]).astype(int) - wanted).mean() < 8, row["key"]


@pytest.mark.parametrize("folder", ["img2dataset-files/laion", "parquet-odd-columns/url"])
def test_addresses_are_explained(cases, folder):
    with pytest.raises(ValueError, match=r"holds addresses of pictures, in the column (URL|url).*img2dataset"):
        corpus_of(cases, folder).read()


@pytest.mark.parametrize("column", ["images", "url", "image_path"])
def test_a_column_that_is_named_is_read_or_explained(cases, column):
    folder = {"images": "images-list", "url": "url", "image_path": "path-string"}[column]
    corpus = corpus_of(cases, f"parquet-odd-columns/{folder}")
    if column == "url":
        with pytest.raises(ValueError, match="img2dataset"):
            corpus.read("--image-column", column)
    else:
        assert len(corpus.read("--image-column", column).rows) == 4


def test_what_was_wrong_with_a_text_is_told(cases):
    faults = corpus_of(cases, "no-captions/encodings").read().column("alt_fault")
    assert faults == {
        "p0": None,
        "p1": "caption is not UTF-8",
        "p2": None,
        "p3": "caption too long: 10,999 characters, of at most 10,000",
    }
    assert set(corpus_of(cases, "no-captions/parquet").read().column("alt_fault").values()) == {
        None, "no caption", "empty caption"
    }  # fmt: skip


def test_splits_keep_their_names_or_are_mapped(cases):
    corpus = corpus_of(cases, "parquet-odd-columns/karpathy")
    assert list(corpus.read().column("split").values()) == ["train", "restval", "test", "test"]
    mapped = corpus.read("--splits", "restval=train").column("split")
    assert list(mapped.values()) == ["train", "train", "test", "test"]


def test_links_are_told_with_the_option_that_follows_them(cases):
    for folder, links in [("curated", 6), ("mixed", 1), ("parts", 1)]:
        found = corpus_of(cases, f"symlinks/{folder}").read()
        assert found.counts["ignored_files"] == {"links that leave the corpus": links}
        assert "--follow-links" in found.said


def test_the_second_line_finds_its_work_done(cases):
    for folder in ("photos", "tars"):
        corpus = corpus_of(cases, f"store-in-corpus/{folder}")
        first = corpus.stored(corpus.folder / "out")
        corpus.put({"README.md": "the captions lie in out"})
        assert corpus.stored(corpus.folder / "out").path == first.path
        assert len(list((corpus.folder / "out" / "ingest").iterdir())) == 1


def test_a_pattern_in_a_folder_with_brackets_reads_that_folder(cases):
    found = find_corpus(f"{cases}/brackets/[D_DATA]/test/*.tar")
    assert [source.url for source in found.sources.values()] == [
        f"{cases}/brackets/[D_DATA]/test/{n}.tar" for n in range(2)
    ]
    with pytest.raises(FileNotFoundError, match="Brackets"):
        find_corpus(f"{cases}/brackets/[ABC] set/*.tar")
    assert len(find_corpus(f"{cases}/brackets/odd parquet #2").sources) == 3


def test_names_with_dots_are_exported(cases, monkeypatch):
    corpus = corpus_of(cases, "dotted-keys/folder")
    rows, _ = exported(monkeypatch, corpus, "parquet")
    assert [row["key"] for row in rows] == [f"shot.2024.0{n}" for n in range(3)]


def test_metadata_is_strict_json(cases):
    found = corpus_of(cases, "nan-json").read()
    assert len(found.captions) == 6
    for text in found.column("meta").values():
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
