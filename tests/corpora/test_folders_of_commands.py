"""One way to a folder: the one that a command was given as its output is one that every other verb takes."""

import pytest

from tests.corpora.make import captioned, command, export_here, photo


@pytest.fixture
def store(corpus):
    """A store with an index and its captions."""
    corpus.put({f"p{n}.png": photo(n, "PNG") for n in range(3)} | {f"p{n}.txt": f"picture {n}" for n in range(3)})
    store = corpus.place / "captions"
    captioned(corpus, store)
    return store


@pytest.mark.parametrize("below", ["", "recaption"])
def test_verify_takes_the_folder_of_a_store_or_of_a_step(store, capsys, below):
    """PrimeIntellect-ai/prime-rl#3338: `-o` is to take an output folder or that of one run in it."""
    code, _, err = command(capsys, "verify", store / below)
    assert code == 0
    assert f"{store}/recaption/" in err
    assert "whole" in err


def test_gallery_takes_the_folder_of_a_store(store, capsys):
    """Positronic-Robotics/positronic#680: a path of another level reads as broken, and costs a wrong diagnosis."""
    page = store.parent / "gallery.html"
    code, _, err = command(capsys, "gallery", store, "--out", page)
    assert code == 0, err
    assert "this is p0" in page.read_text()


def test_export_takes_the_folder_of_a_store(store, capsys, monkeypatch):
    """Positronic-Robotics/positronic#680 once more."""
    export_here(monkeypatch)
    out = store.parent / "set"
    code, _, err = command(capsys, "export", store, "--out", out, "--format", "parquet")
    assert code == 0, err
    assert [path.name for path in (out / "data").iterdir()] == ["000000.parquet"]
    code, _, err = command(capsys, "verify", out)
    assert code == 0, err


def test_of_several_each_is_named_and_those_that_were_cut_are_not(store, corpus, capsys):
    """TheMorpheus407/RepoLens#373: several folders, some near empty, look alike, and the user is to find the one."""
    _, first = captioned(corpus, store)
    _, second = captioned(corpus, store, seed=1)
    cut = store / "recaption" / ("0" * 16)
    cut.mkdir()
    (cut / "lease.json").write_text("{}")
    code, _, err = command(capsys, "gallery", store, "--out", store.parent / "gallery.html")
    assert code == 1
    assert first.id in err
    assert second.id in err
    assert cut.name not in err
