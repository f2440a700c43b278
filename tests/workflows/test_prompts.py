"""Prompts out of files of every kind: what they say, and what is wrong with them, by its line; none stay in memory."""

import io
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import storage
from infra.data.shards import ShardReader, shard_names
from workflows import prompt_rows, prompts
from workflows.prompts import Prompt, digest_of, read_prompts

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "cow", "count": 2}],
        "exclude": [{"class": "cow", "count": 3}],
        "prompt": "a photo of two cows",
    },
]
COCO = {
    "info": {"description": 'Captions, "annotations": [1]', "year": 2014},
    "images": [{"id": 9, "file_name": "{[,"}, {"id": 12, "file_name": "é.jpg"}],
    "annotations": [
        {"image_id": 9, "id": 48, "caption": "A bicycle replica.\n"},
        {"image_id": 12, "id": 67, "caption": 'A "room" with [blue] walls, {and} a 漢字 sink'},
    ],
    "licenses": [],
}


def read(path, data):
    Path(path).write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(read_prompts(str(path)))


def test_a_text(tmp_path):
    found = read(tmp_path / "p.txt", "\ufeffa red circle\n\n  \u00fcber {x}, [y] \r\na cross")
    assert [prompt.text for prompt in found] == ["a red circle", "über {x}, [y]", "a cross"]
    assert found[2].line == f"Line 4 of {tmp_path}/p.txt"
    assert found[0] == Prompt("a red circle", line=found[0].line)


def test_a_path_of_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [prompt.text for prompt in read("p.txt", "a\nb")] == ["a", "b"]
    assert digest_of("p.txt") == digest_of(f"{tmp_path}/p.txt")


def test_jsonl(tmp_path):
    lines = [
        {"prompt": "a cat", "id": 7, "seed": 2**64 - 1, "count": 3, "negative": ""},
        {"prompt": "", "told": {"class_label": "cat", "vector": [1, 2.5]}, "settings": {"guidance": 2}},
        {"prompt": "漢字 😀", "settings": [{}, {"steps": 3}], "metadata": {"tag": "x"}},
    ]
    first, second, third = read(tmp_path / "p.jsonl", "\n\n".join(map(json.dumps, lines)) + "\n")
    assert (first.id, first.seed, first.count, first.negative) == ("7", 2**64 - 1, 3, "")
    assert (second.text, second.told, second.settings) == ("", lines[1]["told"], ({"guidance": 2},))
    assert second.negative is None
    assert (third.text, third.settings, third.metadata) == ("漢字 😀", ({}, {"steps": 3}), {"tag": "x"})
    assert third.line.startswith("Line 5 of")


def test_geneval(tmp_path):
    found = read(tmp_path / "evaluation_metadata.jsonl", "\n".join(map(json.dumps, GENEVAL)))
    assert [(prompt.text, prompt.metadata) for prompt in found] == [(line["prompt"], line) for line in GENEVAL]


def test_dpg_bench(tmp_path):
    for name, text in {"2.txt": "two\nlines of it ", "10.txt": "ten", "read.md": "no"}.items():
        (tmp_path / name).write_text(text)
    found = list(read_prompts(str(tmp_path)))
    assert [(prompt.id, prompt.text) for prompt in found] == [("10", "ten"), ("2", "two lines of it")]
    (tmp_path / "3.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"3.txt is empty: a prompt is expected"):
        list(read_prompts(str(tmp_path)))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_coco(tmp_path, monkeypatch, indent, piece):
    monkeypatch.setattr(prompts, "PIECE", piece)
    found = read(tmp_path / "captions_val2014.json", json.dumps(COCO, indent=indent, ensure_ascii=piece == 7))
    assert [(prompt.text, prompt.id, prompt.metadata) for prompt in found] == [
        (each["caption"].strip(), str(each["id"]), each) for each in COCO["annotations"]
    ]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    members=st.dictionaries(st.sampled_from(["annotations", "info", "images", "x"]), VALUES, max_size=4),
    listed=st.lists(VALUES, max_size=5),
    piece=st.integers(1, 12),
    indent=st.none() | st.just(1),
)
def test_of_any_object_the_annotations_are_found_however_it_is_cut(members, listed, piece, indent):
    members["annotations"] = listed
    text = json.dumps(members, indent=indent, ensure_ascii=False).encode("utf-8", "replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "PIECE", piece)
        assert list(prompts._annotations(io.BytesIO(text), "x")) == json.loads(text)["annotations"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"a\n\xff\xfe", "Line 2 of .* is not UTF-8"),
        ('{"prompt": "a"}\n{"prompt": "b"', "Line 2 of .* is no JSON"),
        ('{"prompt": "a"}\n[]', "Line 2 of .*: expected an object, found \\[\\]|Line 2 of .* found"),
        ('{"prompt": "a"}\n\n{"promt": "b"}', "Line 3 of .*no field 'promt'. Did you mean 'prompt'"),
        ('{"prompt": 3}', "Line 1 of .*: prompt: expected a text, found 3"),
        ('{"prompt": "a", "count": 0}', "Line 1 of .*: count is of pictures, at least 1, but it is 0"),
        ('{"prompt": "a", "seed": -1}', "Line 1 of .*: A seed is a whole number from 0"),
        ('{"prompt": "a", "seed": "1"}', "Line 1 of .*: seed: expected a whole number"),
        ('{"prompt": "\\ud800"}', "Line 1 of .* half of a surrogate pair"),
        ('{"tag": "x", "include": [], "prompt": 1}', "Line 1 of .*: prompt: expected a text"),
        ('["a", "b"]', "is a list in JSON. Give JSONL"),
        ('{"annotations": [{"id": 1, "bbox": [0, 0, 1, 1]}]}', "Annotation 1 of .* has no text `caption`"),
        ('{"annotations": [{"caption": "a"}, {"capt', "is no JSON as COCO has it"),
        ('{"annotations": [{"caption": "a"} {"caption": "b"}]}', "is no JSON as COCO has it"),
        ('{"info": 1, "annotations": [{"caption": "a"}]', "is no JSON as COCO has it"),
    ],
)
def test_what_is_no_prompt_is_named_by_its_line(tmp_path, data, said):
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "p", data)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of prompts"):
        list(read_prompts(str(tmp_path / "none")))
    with pytest.raises(FileNotFoundError, match="no file of prompts"):
        digest_of(str(tmp_path / "none"))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no \.txt files"):
        list(read_prompts(str(tmp_path / "pictures")))


def test_a_hash_is_of_all_that_is_read(place):
    def digest(files):
        for name, text in files.items():
            storage.write_bytes(storage.join(place, "dpg", name), text.encode())
        return digest_of(storage.join(place, "dpg"))

    first = digest({"1.txt": "a", "2.txt": "b", "x.md": "c"})
    assert digest({"x.md": "d"}) == first, "it is not read"
    assert len({first, digest({"2.txt": "c"}), digest({"3.txt": "b"})}) == 3
    storage.write_bytes(storage.join(place, "p.txt"), b"a\n")
    one = digest_of(storage.join(place, "p.txt"))
    storage.write_bytes(storage.join(place, "p.txt"), b"a\nb")
    assert digest_of(storage.join(place, "p.txt")) != one
    assert [each.text for each in read_prompts(storage.join(place, "p.txt"))] == ["a", "b"]
    assert [each.id for each in read_prompts(storage.join(place, "dpg"))] == ["1", "2", "3"]


def test_a_million_prompts_are_not_in_memory(tmp_path, monkeypatch):
    """However many there are, no more than a shard of them is asked for ahead of what is written."""
    asked, ahead = 0, []

    def many():
        nonlocal asked
        for asked in range(10**6):
            yield Prompt(f"prompt {asked}", count=3)

    class EnoughError(Exception):
        pass

    def commit(out, name, table):
        ahead.append(asked + 1 - int(name) * len(table) // 3)
        if len(ahead) == 4:
            raise EnoughError
        return {}

    monkeypatch.setattr(prompt_rows, "commit", commit)
    with pytest.raises(EnoughError):
        prompt_rows.write_rows(many(), str(tmp_path), seed=0, batch=48)
    assert max(ahead) <= 1024 // 3 + 1


def test_rows_are_numbered_and_each_has_a_seed_of_its_own(tmp_path):
    several = [
        Prompt("a", count=2),
        Prompt("b", seed=2**64 - 1, count=2, id="x"),
        Prompt("c", settings=({"top_k": 1},)),
    ]
    prompt_rows.write_rows(iter(several), str(tmp_path), seed=3, batch=2000)
    (name,) = shard_names(str(tmp_path))
    rows = ShardReader([str(tmp_path)], name)
    columns = rows.stored(["sample_id", "prompt_id", "prompt_number", "picture", "seed", "settings"], range(5))
    assert columns["sample_id"] == [f"{number:09d}" for number in range(5)]
    assert columns["prompt_id"] == ["00000", "00000", "x", "x", "00002"]
    assert columns["prompt_number"] == [0, 0, 1, 1, 2]
    assert columns["picture"] == [0, 1, 0, 1, 0]
    assert columns["seed"] == [3 * 2**32, 3 * 2**32 + 1, 2**64 - 1, 0, 3 * 2**32 + 4]
    assert columns["settings"] == [None] * 4 + ['[{"top_k": 1}]']
    with pytest.raises(ValueError, match="There is no prompt"):
        prompt_rows.write_rows(iter(()), str(tmp_path / "none"), seed=0, batch=1)
    assert not (tmp_path / "none").exists()


def test_shards_are_whole_batches(tmp_path):
    prompt_rows.write_rows(
        (Prompt(str(n)) for n in itertools.islice(itertools.count(), 2001)), str(tmp_path), seed=0, batch=48
    )
    sizes = [len(ShardReader([str(tmp_path)], name)) for name in shard_names(str(tmp_path))]
    assert sizes == [1008, 993]
    assert sizes[0] % 48 == 0
