"""No stray file decides for all: one that does not fit is told once, and overrides nothing."""

from tests.corpora.make import lines, photo
from tests.infra.data.zoo import tar


def test_captions_of_other_models_beside_a_picture_are_no_rows(corpus):
    """NVlabs/Sana#44: AAA.png, AAA.txt, and AAA_InternVL2-26B.json and scores of it beside them."""
    for n, name in enumerate(["AAA", "BCC", "CCC"]):
        corpus.put({f"{name}.png": photo(n, "PNG"), f"{name}.txt": f"text of {name}"})
        if name != "CCC":
            corpus.put({f"{name}_InternVL2-26B.json": '{"InternVL2-26B": "other"}'})
            corpus.put({f"{name}_InternVL2-26B_clip_score.json": '{"InternVL2-26B": 27.1}'})
    found = corpus.read()
    assert found.captions == {name: [f"text of {name}"] for name in ("AAA", "BCC", "CCC")}
    assert found.refused == {}


def test_two_tables_of_one_set_and_pictures_of_another(corpus):
    """huggingface/datasets#6777: metadata1000.csv and .jsonl say the same of `images`; other pictures have no texts."""
    rows = [
        {"caption": f"a drawing, {n}", "image": f"images/{n}.png", "gaussian": f"padded/p_{n}.png"} for n in range(2)
    ]
    corpus.put({"metadata1000.jsonl": lines(*rows)})
    table = "".join(f'"{row["caption"]}",{row["image"]},{row["gaussian"]}\n' for row in rows)
    corpus.put({"metadata1000.csv": "caption,image,gaussian\n" + table})
    for n in range(2):
        corpus.put({f"images/{n}.png": photo(n, "PNG"), f"padded/p_{n}.png": photo(10 + n, "PNG")})
    found = corpus.read()
    assert len(found.rows) == 4
    assert {key: sorted(set(texts)) for key, texts in found.captions.items()} == {
        "images/0": ["a drawing, 0"],
        "images/1": ["a drawing, 1"],
        "padded/p_0": [],
        "padded/p_1": [],
    }


def test_an_archive_that_stayed_after_it_was_unpacked_does_not_take_over(corpus):
    """pytorch/vision#5048: the archive stays beside the pictures that came out of it, which have got texts since."""
    pictures = {f"images/{n}.jpg": photo(n) for n in range(3)}
    corpus.put(pictures | {f"images/{n}.txt": f"text {n}" for n in range(3)})
    corpus.put({"images.tar": tar(pictures.items())})
    found = corpus.read()
    assert found.captions == {f"images/{n}": [f"text {n}"] for n in range(3)}
    assert found.said.count("images.tar") == 1


def test_words_in_file_names_decide_no_split(corpus):
    """huggingface/datasets#5021: pictures of a train and of test tubes are taken for splits, the others are lost."""
    names = ["photo of a cat", "photo of a dog", "photo of a train", "photo of test tubes"]
    corpus.put({f"{name}.jpg": photo(n) for n, name in enumerate(names)})
    corpus.put({"metadata.jsonl": lines(*({"file_name": f"{name}.jpg", "text": f"a {name}"} for name in names))})
    found = corpus.read("--test-fraction", "0")
    assert found.captions == {name: [f"a {name}"] for name in names}
    assert set(found.column("split").values()) == {"train"}
