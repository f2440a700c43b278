"""A side fact never vetoes a picture: its state says whether the picture can be used, and nothing else."""

import pytest

from tests.corpora.make import lines, photo


def test_pictures_whose_tar_holds_no_text_are_captioned(corpus):
    """rom1504/clip-retrieval#153: tars of jpg and cls, from which not one picture was read, without a word."""
    for shard in range(2):
        rows = range(2 * shard, 2 * shard + 2)
        corpus.tar(
            f"train-{shard:04d}.tar",
            {f"{n:03d}.{e}": photo(n) if e == "jpg" else "3" for n in rows for e in ("jpg", "cls")},
        )
    found = corpus.read()
    assert found.captions == {f"{n:03d}": [] for n in range(4)}
    assert found.refused == {}


@pytest.mark.parametrize("kind", ["tar", "parquet", "folder", "table"])
def test_a_picture_that_nobody_annotated_is_captioned_with_the_others(corpus, kind):
    """iflytek/VLE#4: of 82,783 pictures of COCO 82,774 have captions."""
    names = [f"COCO_train2014_{n:012d}" for n in range(3)]
    texts = ["a man on a horse", None, "two cats"]
    told = {name: text for name, text in zip(names, texts, strict=True) if text}
    pictures = {f"{name}.jpg": photo(n) for n, name in enumerate(names)}
    if kind == "parquet":
        corpus.parquet("0.parquet", key=names, image=list(pictures.values()), caption=texts)
    elif kind == "tar":
        corpus.tar("0.tar", pictures | {f"{name}.txt": text for name, text in told.items()})
    else:
        table = lines(*({"file_name": f"{name}.jpg", "text": text} for name, text in told.items()))
        beside = {f"{name}.txt": text for name, text in told.items()}
        corpus.put(pictures | (beside if kind == "folder" else {"metadata.jsonl": table}))
    found = corpus.read()
    assert found.captions == {name: [told[name]] if name in told else [] for name in names}
    assert found.refused == {}


def windows_captions(corpus):
    """ostris/ai-toolkit#113: captions with the apostrophe of cp1252, byte 0x92."""
    texts = {"old": "it’s a cat".encode("cp1252"), "new": "a café’s door".encode(), "plain": b"a dog"}
    for number, (name, text) in enumerate(texts.items()):
        corpus.put({f"{name}.jpg": photo(number), f"{name}.txt": text})


def test_a_text_of_another_encoding_is_null_with_its_reason(corpus):
    windows_captions(corpus)
    found = corpus.read()
    assert found.captions == {"old": [], "new": ["a café’s door"], "plain": ["a dog"]}
    assert "UTF-8" in found.column("alt_fault")["old"]
    assert found.column("alt_fault")["plain"] is None


def test_an_encoding_that_is_named_reads_what_is_not_utf_8(corpus):
    windows_captions(corpus)
    found = corpus.read("--encoding", "cp1252")
    assert found.captions == {"old": ["it’s a cat"], "new": ["a café’s door"], "plain": ["a dog"]}


def detection_splits(corpus):
    """princeton-vl/CornerNet-Lite#45: pictures of trainval, minival and testdev; others write Train or " val "."""
    for number, split in enumerate(["trainval", "minival", "testdev", "Train", " val ", "", None]):
        corpus.put({f"{number}.jpg": photo(number), f"{number}.txt": "a thing"})
        corpus.put({f"{number}.json": lines({"split": split})})


def test_splits_that_are_not_known_keep_their_names(corpus):
    detection_splits(corpus)
    found = corpus.read()
    splits = found.column("split")
    assert len(found.captions) == 7
    assert [splits[str(n)] for n in range(5)] == ["trainval", "minival", "testdev", "train", "test"]
    assert {splits["5"], splits["6"]} <= {"train", "test"}
    faults = found.column("split_fault")
    assert [bool(faults[str(n)]) for n in range(7)] == [True] * 3 + [False] * 4


def test_splits_are_mapped_by_an_option(corpus):
    detection_splits(corpus)
    found = corpus.read("--splits", "trainval=train", "minival=test")
    splits = found.column("split")
    assert [splits[str(n)] for n in range(5)] == ["train", "test", "testdev", "train", "test"]


def test_metadata_that_lost_their_last_brace_cost_no_picture(corpus):
    """klarna/product-page-dataset#13: 51,661 of 53,477 json files lack their last brace."""
    whole = lines({"url": "x", "split": "train"}).strip()
    corpus.tar(
        "0.tar",
        {
            "a.jpg": photo(0),
            "a.txt": "a page",
            "a.json": whole[:-1],
            "b.jpg": photo(1),
            "b.txt": "two",
            "b.json": whole,
        },
    )
    found = corpus.read()
    assert found.captions == {"a": ["a page"], "b": ["two"]}
    faults = found.column("meta_fault")
    assert "JSON" in faults["a"]
    assert faults["b"] is None


def test_a_caption_that_is_too_long_costs_no_picture(corpus):
    """meme-search/meme-search#166: what a captioner said is longer than a limit, and its picture fails for ever."""
    corpus.parquet("0.parquet", id=["a", "b"], image=[photo(0), photo(1)], text=["long " * 2400, "short"])
    found = corpus.read()
    assert found.captions == {"a": [], "b": ["short"]}
    assert "11999" in found.column("alt_fault")["a"].replace(",", "")
