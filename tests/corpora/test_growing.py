"""Corpora grow: what an older artifact holds of shards that are the same is taken over, and asked for never again."""

import pytest

from tests.corpora.make import captions_by_key, command, photo, recaption_by
from tests.infra.data.here import work_here
from workflows import asked
from workflows.ingest import ingest

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """What is asked for is the driver's choice; who asks is not: `tests/corpora/test_parts.py` has actors ask."""
    work_here(monkeypatch, ingest, asked)


def pack(corpus, name, *numbers):
    corpus.tar(name, {f"{n:03d}.png": photo(n, "PNG") for n in numbers} | {f"{n:03d}.txt": "a" for n in numbers})


def whole(capsys, results):
    return command(capsys, "verify", results["captions"])[0] == 0


def test_of_a_tar_that_is_added_alone_captions_are_asked_for(corpus, served, capsys):
    """rom1504/img2dataset#6: metaC comes to metaA and metaB, and all three are fetched again."""
    pack(corpus, "metaA.tar", 0, 1)
    pack(corpus, "metaB.tar", 2, 3)
    code, before, _ = recaption_by(capsys, served, corpus)
    assert (code, sorted(served.asked)) == (0, [0, 1, 2, 3])
    pack(corpus, "metaC.tar", 4, 5)
    code, after, _ = recaption_by(capsys, served, corpus)
    assert (code, sorted(served.asked)) == (0, [0, 1, 2, 3, 4, 5])
    assert captions_by_key(after["captions"]) == {f"{n:03d}": f"this is {n}" for n in range(6)}
    assert len(captions_by_key(before["captions"])) == 4, "the older artifact stays"
    assert whole(capsys, after)


def test_a_tar_that_changed_is_new_and_one_that_went_is_gone(corpus, served, capsys):
    """treeverse/dvc#7459: pictures are added and deleted without another pass over the whole set."""
    for number, name in enumerate(("a.tar", "b.tar", "c.tar")):
        pack(corpus, name, 2 * number, 2 * number + 1)
    assert recaption_by(capsys, served, corpus)[0] == 0
    (corpus.folder / "a.tar").unlink()
    pack(corpus, "b.tar", 8, 9)  # of the same size, perhaps, and the same name
    served.asked.clear()
    code, after, _ = recaption_by(capsys, served, corpus)
    assert (code, sorted(served.asked)) == (0, [8, 9])
    assert captions_by_key(after["captions"]) == {f"{n:03d}": f"this is {n}" for n in (8, 9, 4, 5)}
    assert whole(capsys, after)


def test_of_a_folder_that_is_added_alone_captions_are_asked_for(corpus, served, capsys):
    """cbenning/fussel#137: ten folders of pictures are done, five come, and all fifteen are done again."""
    for n in range(4):
        corpus.put({f"2024-0{n // 2}/p{n}.png": photo(n, "PNG"), f"2024-0{n // 2}/p{n}.txt": "a"})
    assert recaption_by(capsys, served, corpus, "--shard-rows", "2")[0] == 0
    for n in (4, 5):
        corpus.put({f"2025-01/p{n}.png": photo(n, "PNG"), f"2025-01/p{n}.txt": "a"})
    served.asked.clear()
    code, after, _ = recaption_by(capsys, served, corpus, "--shard-rows", "2")
    assert (code, sorted(served.asked)) == (0, [4, 5])
    assert len(captions_by_key(after["captions"])) == 6
    assert whole(capsys, after)
