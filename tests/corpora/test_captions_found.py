"""Captions are found where people keep them; several of a picture are all kept, in order."""

import json

from tests.corpora.make import lines, photo


def test_prompts_of_a_metadata_table_are_captions(corpus):
    """huggingface/datasets#6442: an image folder whose metadata.jsonl has the column `prompt`."""
    corpus.put({f"{n}.png": photo(n, "PNG") for n in range(3)})
    corpus.put({"metadata.jsonl": lines(*({"file_name": f"{n}.png", "prompt": f"a 3d icon of {n}"} for n in range(3)))})
    assert corpus.read().captions == {str(n): [f"a 3d icon of {n}"] for n in range(3)}


def test_columns_of_a_table_are_named_by_options(corpus):
    """bghira/SimpleTuner#594: a CSV of two columns, paths and captions, called as its owner likes."""
    corpus.put({f"subtree/{n}.jpg": photo(n) for n in range(3)})
    corpus.put({"tagging.csv": "where,what\n" + "".join(f'subtree/{n}.jpg,"tag {n}, more"\n' for n in range(3))})
    found = corpus.read("--file-column", "where", "--caption-column", "what")
    assert found.captions == {f"subtree/{n}": [f"tag {n}, more"] for n in range(3)}
    assert found.refused == {}


def test_a_list_of_records_with_lists_of_captions_is_read(corpus):
    """ShuangLI59/Person-Search-with-Natural-Language-Description#5: caption_all.json, two sentences each, or ten."""
    corpus.put({f"test_query/p{n}.jpg": photo(n) for n in range(2)})
    every = [["He is in red.", "A man in red."], [f"Sentence {n}." for n in range(10)]]
    records = [{"id": n, "file_path": f"test_query/p{n}.jpg", "captions": texts} for n, texts in enumerate(every)]
    corpus.put({"caption_all.json": json.dumps(records)})
    found = corpus.read("--file-column", "file_path")
    assert found.captions == {f"test_query/p{n}": texts for n, texts in enumerate(every)}
    assert len(found.rows) == 2


def test_rows_of_one_picture_are_its_captions(corpus):
    """krasserm/fairseq-image-captioning#18: a picture stands in the list five times, each time with another caption."""
    corpus.put({f"train2014/{n}.jpg": photo(n) for n in range(2)})
    told = [{"file_name": f"train2014/{n}.jpg", "caption": f"{n} told {k}"} for k in range(5) for n in range(2)]
    corpus.put({"captions.jsonl": lines(*told)})
    found = corpus.read()
    assert len(found.rows) == 2
    assert found.captions == {f"train2014/{n}": [f"{n} told {k}" for k in range(5)] for n in range(2)}


def test_a_nested_field_is_named_by_an_option(corpus):
    """airsplay/lxmert#63: the sentences of COCO stand in `sentf.mscoco`, five or more."""
    for n in range(2):
        told = {"img_id": f"COCO_{n}", "sentf": {"mscoco": [f"{n} told {k}" for k in range(5 + n)], "vqa": ["what?"]}}
        corpus.tar(f"{n}.tar", {f"COCO_{n}.jpg": photo(n), f"COCO_{n}.json": json.dumps(told)})
    found = corpus.read("--caption-field", "sentf.mscoco")
    assert found.captions == {f"COCO_{n}": [f"{n} told {k}" for k in range(5 + n)] for n in range(2)}
