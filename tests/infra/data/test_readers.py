import base64
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import storage
from infra.data.readers import find_corpus, list_corpus, read_source
from infra.data.samples import Reading
from tests.infra.data.zoo import encode, picture, samples, tar, write_folder, write_parquet, write_tars

PNG = encode(picture(0))
WRITERS = {
    "tar": write_tars,
    "parquet": write_parquet,
    "hugging face": lambda folder: write_parquet(folder, hugging_face=True),
    "files": write_folder,
    "jsonl": lambda folder: write_folder(folder, table="jsonl"),
    "csv": lambda folder: write_folder(folder, table="csv"),
}


def read(pattern, shard_rows=1000, **options):
    corpus = find_corpus(pattern, shard_rows, Reading(**options))
    return [s for name, source in corpus.sources.items() for s in read_source(source, corpus.entries.get(name))]


def put(folder, **files):
    for name, content in files.items():
        storage.write_bytes(storage.join(folder, name), content)


def text(value):
    return value.decode() if isinstance(value, bytes) else value


def fields(value):
    return value if isinstance(value, dict) else json.loads(value)


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_samples(kind, place):
    WRITERS[kind](storage.join(place, "corpus"))
    found = read(storage.join(place, "corpus"), shard_rows=5)
    expected = samples(12)
    assert [sample.image for sample in found] == [image for _, image, _, _ in expected]
    assert [text(sample.caption) for sample in found] == [caption for _, _, caption, _ in expected]
    assert [fields(sample.meta)["split"] for sample in found] == [meta["split"] for _, _, _, meta in expected]
    if kind != "csv":
        assert [fields(sample.meta)["scene"] for sample in found] == [meta["scene"] for _, _, _, meta in expected]
    assert len({(sample.key, sample.occurrence, sample.source) for sample in found}) == 12


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("c", ["a/0.tar", "a/1.tar", "b/0.tar"]),
        ("c/a", ["0.tar", "1.tar"]),
        ("c/{a,b}/0.tar", ["a/0.tar", "b/0.tar"]),
        ("c/a/{0..1}.tar", ["0.tar", "1.tar"]),
        ("c/*/*.tar", ["a/0.tar", "a/1.tar", "b/0.tar"]),
        ("c/b/0.tar", ["0.tar"]),
    ],
)
def test_names_within_the_corpus_do_not_depend_on_where_it_is(place, pattern, names):
    put(place, **{f"c/{name}": tar([("k.png", PNG)]) for name in ("a/0.tar", "a/1.tar", "b/0.tar")})
    corpus = find_corpus(storage.join(place, pattern))
    assert [source.name for source in corpus.sources.values()] == names
    assert list(corpus.sources) == [f"{number:06d}" for number in range(len(names))]
    assert [name for name, _, _ in list_corpus(storage.join(place, pattern))] == names


def test_relative_paths_are_found_from_anywhere(tmp_path, monkeypatch):
    write_tars(str(tmp_path / "c"))
    monkeypatch.chdir(tmp_path)
    for pattern, names in [("c/*.tar", ["00000.tar", "00001.tar"]), ("c", ["00000.tar", "00001.tar"]),
                           ("c/00000.tar", ["00000.tar"])]:  # fmt: skip
        corpus = find_corpus(pattern)
        assert [source.name for source in corpus.sources.values()] == names
        assert corpus.sources["000000"].url == str(tmp_path / "c/00000.tar")


def test_a_folder_that_is_called_like_a_pattern_is_taken_by_its_word(tmp_path):
    names = ["[D] set/a/0.tar", "D set/a/0.tar", "{x,y}/a/0.tar", "x/a/0.tar"]
    put(str(tmp_path), **{name: tar([("k.png", PNG)]) for name in names})
    for name in names:
        for pattern in (name, name.replace("0.tar", "*.tar"), name.replace("a/0.tar", "{a,a}/[0-9].tar")):
            assert [source.url for source in find_corpus(f"{tmp_path}/{pattern}").sources.values()] == [
                f"{tmp_path}/{name}"
            ]
    with pytest.raises(FileNotFoundError, match="Brackets stand for one of the letters in them"):
        find_corpus(f"{tmp_path}/[A] set/*.tar")


def test_a_table_that_is_given_as_the_corpus_is_told_where_it_belongs(tmp_path):
    put(str(tmp_path), **{"a.png": PNG, "train.tsv": b"filepath\ttitle\na.png\ta cat\n"})
    with pytest.raises(ValueError, match=r"found 1 \.tsv\. .* give the folder\."):
        find_corpus(f"{tmp_path}/train.tsv")
    assert [sample.caption for sample in read(str(tmp_path))] == ["a cat"]


def test_what_lies_beside_tars_is_passed_over_and_counted(tmp_path):
    """img2dataset leaves a Parquet file of metadata and a JSON of statistics by each tar."""
    write_tars(str(tmp_path))
    put(str(tmp_path), **{"00000.parquet": b"", "00000_stats.json": b"{}"})
    corpus = find_corpus(str(tmp_path))
    assert len(corpus.sources) == 2
    assert corpus.passed == {"files of another format": ["00000.parquet"], "other files": ["00000_stats.json"]}
    write_tars(str(tmp_path / "alone"))
    assert corpus.identity == [[each.name, each.size, each.tag] for each in corpus.sources.values()]
    assert corpus.ignored == 2


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, "does not exist"),
        ({"a.gz": b"", "b.md": b""}, {}, r"no \.tar, no \.parquet and no images: found 1 \.gz, 1 \.md"),
        ({".a.png": PNG, "b.md": b""}, {}, r"found 1 \.md and 1 hidden files"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_a_sentence(place, files, options, message):
    put(place, **{f"c/{name}": content for name, content in files.items()})
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        find_corpus(storage.join(place, "c"), 1000, Reading(**options))
    assert str(caught.value).endswith(".")


def parquet(table, **options):
    sink = io.BytesIO()
    pq.write_table(pa.table(table), sink, **options)
    return sink.getvalue()


def test_parquet_without_images_is_a_sentence(tmp_path):
    put(str(tmp_path), **{"a.parquet": parquet({"number": [1], "label": ["x"]})})
    with pytest.raises(ValueError, match="no column of encoded images: there are number, label"):
        find_corpus(str(tmp_path))
    with pytest.raises(ValueError, match="no column 'picture': there are number, label"):
        find_corpus(str(tmp_path), 1000, Reading(image_column="picture"))
    with pytest.raises(ValueError, match=r"'number' of .* holds int64, and no pictures"):
        find_corpus(str(tmp_path), 1000, Reading(image_column="number"))


def test_parquet_columns_can_be_named(tmp_path):
    put(str(tmp_path), **{"a.parquet": parquet({"blob": [PNG], "image": [b"x"], "text": ["no"], "title": ["yes"]})})
    (sample,) = read(str(tmp_path), image_column="blob", caption_column="title")
    assert (sample.image, sample.caption, sample.key) == (PNG, "yes", "000000000")


def test_base64_of_the_smallest_pictures_is_no_path(tmp_path):
    """Of a picture of 48 bytes it has 64 letters, and may be shorter yet."""
    small = base64.b64decode("UklGRigAAABXRUJQVlA4IBwAAABwAQCdASoJAAYAAUAmJZQCdAG+gACOPCIwzrAA")
    text = base64.b64encode(small).decode()
    assert len(text) == 64
    pq.write_table(pa.table({"image": [text, "folder/picture.png"]}), tmp_path / "a.parquet")
    first, second = read(str(tmp_path))
    assert first.image == small
    assert second.image != b"folder/picture.png"


def test_odd_parquet_rows_are_told(tmp_path):
    table = {"jpg": [PNG, None, PNG, b""], "caption": [None, "b", "c", "d"], "id": [7, 8, 7, None]}
    put(str(tmp_path), **{"a.parquet": parquet(table)})
    found = read(str(tmp_path))
    assert [(s.key, s.occurrence, s.state) for s in found] == [
        ("7", 0, None),
        ("8", 0, "rejected"),
        ("7", 1, None),
        ("000000003", 0, "rejected"),
    ]
    assert [s.offset for s in found] == [0, 1, 2, 3]


def test_broken_parquet_files_are_told(tmp_path):
    rows = 3000
    whole = parquet({"jpg": [PNG] * rows, "caption": [f"{n}" * 50 for n in range(rows)]}, row_group_size=1000)
    put(str(tmp_path), **{"0.parquet": whole, "1.parquet": whole[:-20], "2.parquet": b"", "3.parquet": b"PAR1garbage"})
    put(str(tmp_path), **{"4.parquet": parquet({"jpg": pa.array([], pa.binary()), "text": pa.array([], pa.string())})})
    corpus = find_corpus(str(tmp_path))
    counts = {}
    for source in corpus.sources.values():
        found = list(read_source(source))
        counts[source.name] = (len(found), found[-1].key, found[-1].state)
    assert counts == {
        "0.parquet": (rows, f"{rows - 1:09d}", None),
        "1.parquet": (1, "1.parquet#damaged", "failed"),
        "2.parquet": (1, "2.parquet#damaged", "failed"),
        "3.parquet": (1, "3.parquet#damaged", "failed"),
        "4.parquet": (1, "4.parquet#empty", "rejected"),
    }


def test_a_parquet_file_damaged_in_the_middle_keeps_what_came_before(tmp_path):
    rows = 300
    data = bytearray(parquet({"jpg": [PNG] * rows, "n": list(range(rows))}, row_group_size=100, use_dictionary=False))
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    put(str(tmp_path), **{"0.parquet": bytes(data)})
    found = read(str(tmp_path))
    assert 0 < len(found) <= rows + 1
    if found[-1].state == "failed":  # else the damage fell on the pixels of images, for the decoder to find
        assert f"{rows - (len(found) - 1)} rows of {rows} are lost" in found[-1].reason


def test_a_source_that_vanishes_is_told(place):
    write_tars(place)
    corpus = find_corpus(place)
    storage.remove(storage.join(place, "00001.tar"))
    found = [sample for source in corpus.sources.values() for sample in read_source(source)]
    assert found[-1].key == "00001.tar#unreadable"
    assert found[-1].state == "failed"
    assert len(found) == 7


def test_odd_folders_are_told(place):
    table = [{"file_name": "b.png", "text": "from the table"}, {"file_name": "gone.png", "text": "x"}, {"text": "y"}]
    lines = [json.dumps(row).encode() for row in table] + [b"not json", b"", b"[1]", b"\xff", b'{"file_name": "../up"}']
    put(
        place,
        **{
            "c/a.png": PNG,
            "c/a.txt": b"A",
            "c/b.png": PNG,
            "c/b.txt": b"from the file",
            "c/t.jsonl": b"\n".join(lines),
            "c/lonely.txt": b"no image",
            "c/silent.JPEG": PNG,
            "c/same.png": PNG,
            "c/same.jpg": PNG,
            "c/same.txt": b"both",
        },
    )
    found = read(storage.join(place, "c"))
    assert [(s.key, s.occurrence, text(s.caption), (s.reason or "").split(":")[0]) for s in found] == [
        ("../up", 0, None, "no image"),
        ("a", 0, "A", ""),
        ("b", 0, "from the table", ""),
        ("gone.png", 0, None, "no image"),
        ("same", 0, "both", ""),
        ("same", 1, "both", ""),
        ("silent", 0, None, ""),
        ("t.jsonl:3", 0, None, "broken row"),
        ("t.jsonl:4", 0, None, "broken row"),
        ("t.jsonl:5", 0, None, "broken row"),
        ("t.jsonl:6", 0, None, "broken row"),
        ("t.jsonl:7", 0, None, "broken row"),
    ]


def test_folders_are_cut_into_groups(tmp_path):
    write_folder(str(tmp_path))
    corpus = find_corpus(str(tmp_path), shard_rows=5)
    assert [len(group) for group in corpus.entries.values()] == [5, 5, 2]
    assert list(corpus.sources) == ["000000", "000001", "000002"]
