"""An export never loses the link to its source."""

import json

import pytest

from tests.corpora.make import exported, photo


def fill(corpus, names, ending="jpg"):
    for n, name in enumerate(names):
        corpus.put({f"{name}.{ending}": photo(n), f"{name}.txt": f"text of {name}"})


def said_of(files, text):
    """What captions.json says beside the caption `text`, and the key there."""
    name = next(name for name, data in files.items() if name.endswith(".short.txt") and data.decode() == text)
    key = name.removesuffix(".short.txt")
    return key, json.loads(files[f"{key}.captions.json"])


NAMES = {
    # activeloopai/deeplake#1519: "I need to get the name of the original file (cat.jpg, dog.jpg etc.)"
    "plain": ["cat", "dog"],
    # Tps-F/sd-webui-blip2#22: the folders of the input are flattened, and what is called alike is mixed up
    "folders": ["cats/1", "dogs/1"],
    # webdataset/webdataset#428: a key of more than 128 characters is cut without a word
    "long": ["x" * 140 + "_0", "x" * 140 + "_1"],
    # huggingface/datasets#5160: the names by which people know their pictures, blanks, dots and other letters included
    "human": ["my cat.v2 (final)", "ein Bär im Wald", "猫", "a#b"],
}


@pytest.mark.parametrize("which", NAMES)
def test_a_table_names_the_file_of_each_row(corpus, monkeypatch, which):
    fill(corpus, NAMES[which])
    rows, _ = exported(monkeypatch, corpus, "parquet")
    for name in NAMES[which]:
        row = next(row for row in rows if row["caption_alt"] == f"text of {name}")
        assert row["key"] == name
        assert any(isinstance(cell, str) and cell.endswith(f"{name}.jpg") for cell in row.values()), row


@pytest.mark.parametrize("which", NAMES)
def test_a_tar_names_the_file_of_each_sample(corpus, monkeypatch, which):
    fill(corpus, NAMES[which])
    files, _ = exported(monkeypatch, corpus, "webdataset")
    for name in NAMES[which]:
        key, told = said_of(files, f"this is {name}")
        assert name in (key, told.get("key")), told
        assert files[f"{key}.jpg"] == photo(NAMES[which].index(name))


def test_rows_of_tars_name_their_tar(corpus, monkeypatch):
    """webdataset/webdataset#264: who trains wants the file's name and that of the tar in each row."""
    for n in range(2):
        corpus.tar(f"part-{n}.tar", {"000.jpg": photo(n), "000.txt": f"text {n}"})
    rows, _ = exported(monkeypatch, corpus, "parquet")
    for n in range(2):
        row = next(row for row in rows if row["caption_alt"] == f"text {n}")
        assert any(isinstance(cell, str) and f"part-{n}.tar" in cell for cell in row.values()), row


def test_the_card_names_the_source(corpus, monkeypatch):
    """huggingface/datasets#5160: a page on a hub, without a word on where its rows are from."""
    fill(corpus, ["cat", "dog"])
    for form in ("parquet", "webdataset"):
        _, card = exported(monkeypatch, corpus, form)
        assert corpus.name in card


def test_what_is_written_is_strict_json(corpus, monkeypatch):
    """OpenNeuroOrg/openneuro#1658: files of a set hold Infinity, and no other parser reads them."""
    corpus.put({"a.jpg": photo(0), "a.txt": "a", "a.json": '{"score": NaN, "most": Infinity, "least": -Infinity}'})
    rows, _ = exported(monkeypatch, corpus, "parquet")

    def strict(text):
        return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    assert strict(rows[0]["meta"]).keys() == {"score", "most", "least"}
    files, _ = exported(monkeypatch, corpus, "webdataset")
    strict(files["a.captions.json"])
    assert files["a.json"] == b'{"score": NaN, "most": Infinity, "least": -Infinity}', "theirs stays as it is"
