"""What is no part of the corpus neither counts nor matters, and the same line finds its work done."""

from tests.corpora.make import Corpus, photo


def pairs(corpus, count=3):
    for n in range(count):
        corpus.put({f"p{n}.jpg": photo(n), f"p{n}.txt": f"picture {n}"})
    return {f"p{n}": [f"picture {n}"] for n in range(count)}


def test_what_was_made_of_a_folder_may_lie_in_it(corpus):
    """bilayer-containers/bilayers#58: output goes into the input folder, and the second run takes it for input."""
    pairs(corpus)
    store = corpus.folder / "out"
    first = corpus.stored(store)
    assert first.summary["accepted"] == 3
    again = corpus.stored(store)
    assert again.path == first.path
    assert corpus.read().counts["rows_in"] == 3


def test_another_result_beside_it_is_no_source(corpus):
    """bilayer-containers/bilayers#58 once more: a store with resized copies of the pictures, which are pictures too."""
    wanted = pairs(corpus)
    before = corpus.identity()
    corpus.stored(corpus.folder / "training" / "runs", "--image-size", "8", "8")
    assert corpus.identity() == before
    assert corpus.read().captions == wanted


def test_what_a_download_notes_beside_the_files_changes_nothing(corpus):
    """huggingface/optimum-habana#1446: `snapshot_download` leaves `.cache` in the folder, and each run touches it."""
    wanted = pairs(corpus)
    before = corpus.identity()
    for n in range(3):
        at = f".cache/huggingface/download/p{n}.jpg"
        corpus.put({f"{at}.metadata": "c0ffee\n0\n1.5\n", f"{at}.lock": "", f"{at}.jpg": photo(n)})
    corpus.put({".gitattributes": "*.jpg filter=lfs\n", ".cache/huggingface/.gitignore": "*"})
    assert corpus.identity() == before
    found = corpus.read()
    assert found.captions == wanted
    assert found.refused == {}


def test_thumbnails_that_a_nas_hides_are_no_pictures(corpus):
    """immich-app/immich#30690: a Synology keeps thumbnails of each picture below `@eaDir`, hidden from its users."""
    wanted = pairs(corpus)
    before = corpus.identity()
    for n in range(3):
        corpus.put({f"@eaDir/p{n}.jpg/SYNOPHOTO_THUMB_M.jpg": photo(n), f"@eaDir/p{n}.jpg/SYNOINDEX_MEDIA_INFO": "x"})
    assert corpus.identity() == before
    found = corpus.read()
    assert found.captions == wanted
    assert found.refused == {}


def test_logs_and_readmes_are_no_captions(corpus):
    """breadbread1984/R3DCNN#5: a recording's folder has `sk_color_log.txt` and the like beside its pictures."""
    wanted = pairs(corpus)
    before = corpus.identity()
    corpus.put({"sk_color_log.txt": "p0.jpg 1440202584613042158\n", "train.log": "step 1", "README.txt": "see there"})
    corpus.put({"README.md": "# Gestures", "nested/readme.TXT": "x", "LICENSE.txt": "CC0"})
    assert corpus.identity() == before
    found = corpus.read()
    assert found.captions == wanted
    assert found.refused == {}


def test_a_picture_that_comes_changes_the_corpus(corpus):
    """What is chosen does matter."""
    pairs(corpus)
    before = corpus.identity()
    corpus.put({"p3.jpg": photo(3)})
    grown = corpus.identity()
    assert grown != before
    corpus.put({"p3.txt": "picture 3"})
    assert corpus.identity() != grown


def test_tars_have_the_same_identity_whatever_lies_beside_them(tmp_path):
    """rom1504/img2dataset#358: statistics of finished shards lie beside the tars, and are kept when tars move."""
    corpus = Corpus(tmp_path)
    corpus.tar("00000.tar", {"a.jpg": photo(0), "a.txt": "a"})
    before = corpus.identity()
    corpus.put({"00000_stats.json": "{}", "notes.txt": "x", "old/cover.jpg": photo(1)})
    assert corpus.identity() == before
    assert corpus.read().captions == {"a": ["a"]}
