"""No silent loss, no silent change: an ambiguous row is a broken row, and links are followed or told."""

import pytest

from tests.corpora.make import Corpus, lines, passed_over, photo


def told_broken(found, table):
    """Whether a row that was not accepted, or what was said, tells of a broken line of a table."""
    return table in found.said or any("broken row" in reason and table in key for key, reason in found.refused.items())


def test_a_comma_that_is_not_quoted_breaks_its_row(corpus):
    """docarray/docarray#1044: captions of Flickr8k hold commas; who splits lines at commas cuts them short."""
    corpus.put({f"{n}.jpg": photo(n) for n in range(2)})
    corpus.put(
        {"captions.csv": 'image,caption\n0.jpg,A child in a pink dress, climbing up stairs .\n1.jpg,"A dog, a cat"\n'}
    )
    found = corpus.read()
    assert found.captions == {"0": [], "1": ["A dog, a cat"]}
    assert told_broken(found, "captions.csv")


def test_quotes_that_are_not_doubled_break_their_row(corpus):
    """AllenInstitute/openscope_databook#486: quotes within a quoted field, and the rest spills into another column."""
    corpus.put({f"{n}.jpg": photo(n) for n in range(3)})
    rows = ['0.jpg,"a sign that says "stop, or I shoot" at night"', '1.jpg,"a sign that says ""stop"""', "2.jpg,a dog"]
    corpus.put({"metadata.csv": "\n".join(["file_name,text", *rows, ""])})
    found = corpus.read()
    assert found.captions == {"0": [], "1": ['a sign that says "stop"'], "2": ["a dog"]}
    assert told_broken(found, "metadata.csv")


def test_several_objects_on_one_line_are_a_broken_row(corpus):
    """clovaai/donut#69: a metadata.jsonl whose records stand on one line, so that no picture has metadata."""
    corpus.put({f"img{n}.jpeg": photo(n) for n in range(3)})
    one, two, three = (lines({"file_name": f"img{n}.jpeg", "text": f"text {n}"}).strip() for n in range(3))
    corpus.put({"metadata.jsonl": f"{one} {two}\n{three}\n"})
    found = corpus.read()
    assert found.captions == {"img0": [], "img1": [], "img2": ["text 2"]}
    assert told_broken(found, "metadata.jsonl")


def test_a_table_without_a_header_loses_no_line(corpus):
    """p1atdev/stable-diffusion-webui-blip2-captioner#2: one file for all captions, `img.jpg|caption`, and no header."""
    corpus.put({f"{n}.jpg": photo(n) for n in range(3)})
    corpus.put({"captions.csv": "".join(f"{n}.jpg|a thing, number {n}\n" for n in range(3))})
    try:
        found = corpus.read()
    except ValueError as error:  # "refused where it is not certain"
        said, captions = str(error), {}
    else:
        said, captions = found.said, found.captions
    assert captions == {str(n): [f"a thing, number {n}"] for n in range(3)} or "captions.csv" in said
    assert captions.get("0") == (captions.get("1") and ["a thing, number 0"])


def test_a_caption_of_two_lines_is_one_caption(corpus):
    """rom1504/img2dataset#283: captions of YFCC hold line breaks, in quotes."""
    corpus.put({f"{n}.jpg": photo(n) for n in range(2)})
    corpus.put({"yfcc.csv": 'file_name,caption\r\n0.jpg,"A day\nat the sea"\r\n1.jpg,"A day\r\nin town"\r\n'})
    found = corpus.read()
    assert {key: [text.replace("\r", "") for text in texts] for key, texts in found.captions.items()} == {
        "0": ["A day\nat the sea"],
        "1": ["A day\nin town"],
    }


def test_links_within_the_corpus_are_followed(corpus):
    """CAMMA-public/Endoscapes#1: but for train, val and test, all folders hold links to pictures of these."""
    corpus.put({"train/1.jpg": photo(1), "train/1.txt": "one", "val/2.jpg": photo(2), "val/2.txt": "two"})
    for name, at in (("12_5/1", "train/1"), ("all/1", "train/1"), ("all/2", "val/2")):
        for ending in ("jpg", "txt"):
            corpus.link(f"{name}.{ending}", f"../{at}.{ending}")
    found = corpus.read()
    assert found.captions == {
        "train/1": ["one"],
        "12_5/1": ["one"],
        "all/1": ["one"],
        "val/2": ["two"],
        "all/2": ["two"],
    }


def linked_out(tmp_path):
    """open-edge-platform/datumaro#1255: `images -> ../images`, so that a folder of a set has nothing but labels."""
    Corpus(tmp_path, "images").put({"train/1.jpg": photo(1), "train/1.txt": "one", "test/2.jpg": photo(2)})
    corpus = Corpus(tmp_path, "yolo")
    corpus.put({"own/3.jpg": photo(3), "own/3.txt": "three"})
    corpus.link("images", "../images")
    return corpus


def test_links_that_lead_out_are_counted_and_told_with_the_option(tmp_path):
    found = linked_out(tmp_path).read()
    assert found.captions == {"own/3": ["three"]}
    assert sum(passed_over(found.counts).values()) == 1
    assert "--follow-links" in found.said


def test_links_that_lead_out_are_followed_where_that_is_asked(tmp_path):
    found = linked_out(tmp_path).read("--follow-links")
    assert found.captions == {"own/3": ["three"], "images/train/1": ["one"], "images/test/2": []}


def test_where_all_is_linked_out_the_sentence_names_the_option(tmp_path):
    Corpus(tmp_path, "images").put({"1.jpg": photo(1)})
    corpus = Corpus(tmp_path, "yolo")
    corpus.link("images", "../images")
    with pytest.raises((ValueError, FileNotFoundError), match="--follow-links"):
        corpus.read()


def test_a_link_in_circles_ends(corpus):
    """open-edge-platform/datumaro#1255 again: who follows links must not follow one to its own folder for ever."""
    corpus.put({"a/1.jpg": photo(1), "a/1.txt": "one"})
    corpus.link("a/again", "..")
    assert corpus.read().captions == {"a/1": ["one"]}
    assert corpus.read("--follow-links").captions == {"a/1": ["one"]}
