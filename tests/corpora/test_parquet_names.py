"""Parquet keeps its names: without an `id` a row is called as its image's path."""

import pyarrow as pa

from tests.corpora.make import photo

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def images(*pairs):
    return pa.array([None if pair is None else {"bytes": pair[0], "path": pair[1]} for pair in pairs], IMAGE)


def test_a_row_is_called_as_its_image(corpus):
    """activeloopai/deeplake#1519: the names of the files, cat.jpg and dog.jpg, are nowhere in the set."""
    corpus.parquet(
        "train.parquet", image=images((photo(0), "cat.jpg"), (photo(1), "dog.v2.jpg")), text=["a cat", "a dog"]
    )
    assert corpus.read().captions == {"cat": ["a cat"], "dog.v2": ["a dog"]}


def test_an_id_goes_before_the_path(corpus):
    """LLaVA-VL/LLaVA-NeXT#222: ReCap has an `id` and an image; files and records are named by the id."""
    corpus.parquet(
        "0.parquet", id=["GCC_1", "GCC_2"], image=images((photo(0), "a.jpg"), (photo(1), "b.jpg")), text=["one", "two"]
    )
    assert corpus.read().captions == {"GCC_1": ["one"], "GCC_2": ["two"]}


def test_bytes_that_are_null_are_told_with_their_path(corpus):
    """huggingface/datasets#6348: pictures of a gated repository were not embedded; the rows have paths and no bytes."""
    address = "hf://datasets/org/set@c0ffee/images/dog.jpg"
    column = images((photo(0), "cat.jpg"), (None, address), None)
    corpus.parquet("0.parquet", image=column, text=["a cat", "a dog", "nothing"])
    found = corpus.read()
    assert found.captions == {"cat": ["a cat"]}
    reasons = list(found.refused.values())
    assert len(reasons) == 2
    told = next(reason for reason in reasons if "dog.jpg" in reason)
    assert "the field is empty" not in told
    assert any("dog.jpg" not in reason for reason in reasons)


def test_pictures_of_one_name_in_several_folders_stay_apart(corpus):
    """gradio-app/gradio#5135: paths are relative to the root of the set, and each folder has an image.png."""
    column = images((photo(0, "PNG"), "chat/0/image.png"), (photo(1, "PNG"), "chat/1/image.png"))
    corpus.parquet("0.parquet", image=column, text=["one", "two"])
    found = corpus.read()
    assert sorted(found.captions.values()) == [["one"], ["two"]]
    assert all("image" in key for key in found.captions)


def test_rows_without_any_name_are_numbered(corpus):
    """huggingface/dataset-viewer#3234: the path is null, too."""
    corpus.parquet("0.parquet", image=images((photo(0), None), (photo(1), "")), text=["one", "two"])
    assert sorted(corpus.read().captions.values()) == [["one"], ["two"]]
