"""A message asserts only what was checked, and an option that it advises works."""

import importlib.util
import re

import pytest

from tests.corpora.make import photo
from workflows.ingest import ingest
from workflows.options import direct_options, recipe_options, step_options

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:2d6c72fe33411b6b66cf5fc671d56ac1\nsize 104857600\n"
WITHOUT_HEIC = pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is not None, reason="HEIC is read here")
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)  # how each of them begins


def test_a_pointer_of_git_lfs_is_no_truncated_archive(corpus):
    """jinnovation/rainy-image-dataset#2: cloned without Git LFS, each file is a pointer of three lines."""
    corpus.put({"00000.tar": POINTER})
    corpus.tar("00001.tar", {"a.jpg": photo(0), "a.txt": "a"})
    found = corpus.read()
    assert found.captions == {"a": ["a"]}
    (reason,) = found.refused.values()
    assert "truncated" not in reason
    assert "damaged" not in reason


@WITHOUT_HEIC
@pytest.mark.parametrize("name", ["IMG_1.HEIC", "IMG_1.jpg"])
def test_a_heic_is_called_one(corpus, name):
    """replicate/dreambooth#23: "cannot identify image file", of a photo that every phone shows."""
    corpus.put({name: HEIC, "IMG_1.txt": "a cat", "b.jpg": photo(0), "b.txt": "b"})
    found = corpus.read()
    assert found.captions == {"b": ["b"]}
    (reason,) = found.refused.values()
    assert "HEIC" in reason.upper()
    assert "not an image" not in reason
    assert "no image" not in reason


@WITHOUT_HEIC
def test_a_heic_in_a_tar_is_not_no_image(corpus):
    """replicate/dreambooth#23 once more, in a tar."""
    corpus.tar("0.tar", {"a.heic": HEIC, "a.txt": "a cat", "b.jpg": photo(0), "b.txt": "b"})
    found = corpus.read()
    assert found.captions == {"b": ["b"]}
    assert "HEIC" in found.refused["a"].upper()
    assert "no image" not in found.refused["a"]


def prompts_beside_pictures(corpus):
    """bghira/SimpleTuner#494: final_prompts.parquet with `file_name` and `long_prompt` beside the pictures' folder."""
    corpus.put({f"civitai_images/{n}.png": photo(n, "PNG") for n in range(3)})
    names = [f"civitai_images/{n}.png" for n in range(3)]
    texts = [f"a long prompt, {n}" for n in range(3)]
    corpus.parquet("final_prompts.parquet", file_name=names, long_prompt=texts, width=[16] * 3, height=[16] * 3)


def test_paths_in_a_column_are_read_from_where_the_table_lies(corpus):
    prompts_beside_pictures(corpus)
    found = corpus.read("--image-column", "file_name", "--caption-column", "long_prompt")
    assert sorted(found.captions.values()) == [[f"a long prompt, {n}"] for n in range(3)]
    assert found.refused == {}


def test_an_option_that_a_message_advises_works_when_it_is_followed(corpus):
    """Without options this folder is either read, or the sentence names options that read it."""
    prompts_beside_pictures(corpus)
    try:
        found = corpus.read()
    except ValueError as error:
        flag = re.search(r"(image|file)[-_]column", str(error))
        found = corpus.read(f"--{flag[1]}-column", "file_name")
    assert len(found.captions) == 3


def test_a_column_of_numbers_is_explained_in_a_sentence(corpus):
    """The same table, and the wrong column: the sentence names it and what it holds."""
    prompts_beside_pictures(corpus)
    with pytest.raises(ValueError, match=r"width.*int64"):
        corpus.read("--image-column", "width")


def test_lists_of_addresses_are_explained_with_a_downloader(corpus):
    """pixeltable/pixeltable#1186: a Parquet file of addresses of pictures."""
    urls = [f"https://example.org/{n}.jpg" for n in range(3)]
    corpus.parquet("0.parquet", url=urls, caption=["a", "b", "c"])
    for options in ((), ("--image-column", "url")):
        with pytest.raises(ValueError, match="img2dataset"):
            corpus.read(*options)


@pytest.mark.parametrize("prefix", ["--", "--corpus."])
@pytest.mark.parametrize("command", ["ingest", "run", "recaption"])
def test_options_that_messages_advise_are_taken_by_every_command_that_reads_a_corpus(prefix, command):
    words = [
        f"{prefix}follow-links",
        f"{prefix}image-column",
        "a",
        f"{prefix}file_column=b",
        f"{prefix}encoding",
        "cp1252",
    ]
    if command == "recaption":
        read = direct_options(["--corpus", "x", "--captioner", "y", "--out", "z", *words])
    else:
        words += [f"{prefix}splits", "restval=train", f"{prefix}image-size", "8", "8"]
        if command == "run":
            read = recipe_options(["debug", "--corpus.corpus", "x", *words], "run").recipe.corpus
        else:
            read = step_options(ingest, ["--corpus", "x", *words]).config
        assert (read.splits, read.image_size) == (("restval=train",), (8, 8))
    assert (read.corpus, read.follow_links, read.image_column, read.file_column) == ("x", True, "a", "b")
    assert read.encoding == "cp1252"
