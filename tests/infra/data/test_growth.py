"""Corpora grow: what is made of the same is taken over from older artifacts, proved, and never made again."""

import itertools
import os
import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import storage
from infra.cluster import Cluster
from infra.data.ledger import Ledger, commit, pending, tally
from infra.data.readers import find_corpus, write_sources
from infra.data.revision import Redo
from infra.data.shards import joined_names, shard_names, shard_url
from infra.data.verify import verify_files, verify_shards
from infra.data.work import StageWork
from infra.metrics import Progress
from infra.store import Artifact, Plan, Store, by_shard, step
from tests.infra.data.zoo import as_members, samples, tar
from workflows.ingest import IngestConfig, IngestWork, corpus_key, corpus_shards

CALLS: list[str] = []  # what was asked of the stages
BROKEN: set[str] = set()  # texts on which they fail
AFTER: dict[str, object] = {}  # what happens after so many shards


@dataclass(frozen=True, kw_only=True)
class Config:
    loud: int = 1


@dataclass
class Shout:
    loud: int
    reads: tuple[str, ...] = ("caption_alt",)
    writes: tuple[str, ...] = ("said",)
    types: dict[str, str] = field(default_factory=lambda: {"said": "string"})
    cpus: float = 1
    gpus: float = 0

    def setup(self):
        pass

    def __call__(self, batch):
        CALLS.extend(batch["caption_alt"])
        for text in batch["caption_alt"]:
            if text in BROKEN:
                raise MemoryError(text)
        return {"said": [text + "!" * self.loud for text in batch["caption_alt"]]}


def make(work, names, out):
    for name in pending(out, names):
        commit(out, name, work(name))
        if name in AFTER:
            AFTER[name]()
    Ledger(out).close()
    return tally(out)


@step(version=1, key=corpus_key, shards=corpus_shards, listed="corpus")
def index(config: IngestConfig, *, out, cluster, report):
    """As `ingest`, without Ray."""
    corpus = find_corpus(config.corpus, config.shard_rows)
    write_sources(corpus, out)
    return make(IngestWork(config, corpus.sources, out), list(corpus.sources), out)


@step(version=1, shards=by_shard)
def shout(config: Config, images: Artifact, *others: Artifact, out, cluster, report):
    inputs = tuple(each.path for each in (images, *others) if each.step != "model")
    work = StageWork((Shout(config.loud),), inputs, 4, Redo.of_folder(out))
    work.setup()
    return make(work, joined_names(inputs), out)


@step(version=1)
def model(config: Config, images: Artifact, *, out, cluster, report):
    """Of published weights the same model is made, whatever the corpus."""
    storage.write_bytes(storage.join(out, "weights"), b"0" * config.loud)
    return {}


@step(version=1)
def all_together(config: Config, images: Artifact, *, out, cluster, report):
    work = StageWork((Shout(config.loud),), (images.path,), 4)
    work.setup()
    return make(work, joined_names([images.path]), out)


@pytest.fixture(autouse=True, scope="module")
def no_power_cut():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def fresh():
    CALLS.clear()
    BROKEN.clear()
    AFTER.clear()


def write(corpus, name, *numbers):
    rows = [row for number in numbers for row in samples(1, number)]
    storage.write_bytes(storage.join(str(corpus), name), tar(as_members(rows)))


def said(*numbers):
    return sorted(f"picture number {n}, größer" for n in numbers)


def asked():
    """What was asked since the last time."""
    found = sorted(CALLS)
    CALLS.clear()
    return found


def store_of(place):
    return Store(storage.join(place, "store"), Cluster(name="test"))


def run(place, config=Config(), pattern="corpus"):
    store = store_of(place)
    images = store.step(index, IngestConfig(corpus=storage.join(place, pattern)))
    return images, store.step(shout, config, images)


def faults(artifact):
    found = list(verify_files(artifact.path, artifact.manifest["files"]))
    return found + list(verify_shards(artifact.path, [each.path for each in artifact.inputs], artifact.summary))


def rows(artifact):
    names = shard_names(artifact.path)
    return {name: pq.read_table(storage.open_read(shard_url(artifact.path, name))).to_pylist() for name in names}


def check(*artifacts):
    for artifact in artifacts:
        assert faults(artifact) == []
        assert not {"begun.json", "journal", "parts"} & {*storage.list_names(artifact.path)}


def texts(captions):
    return [row["said"] for shard in rows(captions).values() for row in shard]


@pytest.fixture
def grown(place):
    """A corpus of two tars, captioned."""
    corpus = storage.join(place, "corpus")
    write(corpus, "a.tar", 0, 1)
    write(corpus, "c.tar", 4, 5)
    first = run(place)
    assert asked() == said(0, 1, 4, 5)
    return place, corpus, first


def test_a_tar_in_the_middle_is_all_that_is_asked_for(grown, monkeypatch):
    told = []
    monkeypatch.setattr(Progress, "note", lambda self, text: told.append(text))
    place, corpus, first = grown
    write(corpus, "b.tar", 2, 3)
    images, captions = run(place)
    assert asked() == said(2, 3)
    assert told == [f"2 of 3 shards are taken over from {each.path}" for each in first]
    assert images.manifest["taken"] == {f"index/{first[0].id}": 2}
    assert captions.manifest["taken"] == {f"shout/{first[1].id}": 2}
    assert [text[15] for text in texts(captions)] == list("012345")
    assert rows(captions)["000002"] == rows(first[1])["000001"]
    assert captions.summary["rows_in"] == captions.summary["accepted"] == 6
    check(images, captions, *first)
    storage.remove(first[1].path)
    storage.remove(first[0].path)
    check(images, captions)


def test_a_tar_that_changed_is_new_and_one_that_went_is_gone(grown):
    place, corpus, first = grown
    storage.remove(storage.join(corpus, "a.tar"))
    write(corpus, "c.tar", 6, 7)
    write(corpus, "d.tar", 8)
    _, second = run(place)
    assert asked() == said(6, 7, 8)
    write(corpus, "a.tar", 0, 1)  # the tar is back: locally it is read again, and its captions are found by hash
    write(corpus, "e.tar", 9)
    images, third = run(place)
    assert asked() == said(9)
    assert [text[15] for text in texts(third)] == list("016789")
    assert third.manifest["taken"] == {f"shout/{second.id}": 2, f"shout/{first[1].id}": 1}
    check(images, third)


def test_a_copy_is_read_again_and_its_captions_are_found_by_hash(tmp_path):
    write(tmp_path / "corpus", "a.tar", 0, 1)
    run(str(tmp_path))
    asked()
    os.utime(tmp_path / "corpus" / "a.tar", ns=(1, 1))
    images, captions = run(str(tmp_path))
    assert images.manifest["taken"] == {}
    assert asked() == []
    check(images, captions)


def test_a_plan_says_how_many_shards_are_new(tmp_path):
    for number, name in enumerate("abcd"):
        write(tmp_path / "corpus", f"{name}.tar", number)
    run(str(tmp_path))
    asked()
    os.remove(tmp_path / "corpus" / "b.tar")
    write(tmp_path / "corpus", "ab.tar", 7)
    write(tmp_path / "corpus", "e.tar", 8)

    def planned(*configs):
        plan = Plan(str(tmp_path / "store"))
        images = plan.step(index, IngestConfig(corpus=str(tmp_path / "corpus")))
        for config in (Config(), *configs):
            plan.step(shout, config, images)
        return [reason for _, _, reason in plan.lines]

    assert planned() == ["what it reads has changed; 2 of 5 shards are new", "new input: index; 2 of 5 shards are new"]
    assert asked() == []
    run(str(tmp_path))
    assert asked() == said(7, 8)
    assert planned() == ["done", "done"]
    assert planned(Config(loud=2))[2].startswith("loud 1 -> 2")


def test_what_was_cut_is_of_use_to_others(tmp_path):
    for number, name in enumerate("abc"):
        write(tmp_path / "corpus", f"{name}.tar", number)

    def stop():
        raise KeyboardInterrupt

    AFTER["000001"] = stop
    with pytest.raises(KeyboardInterrupt):
        run(str(tmp_path))  # in the index
    write(tmp_path / "corpus", "d.tar", 3)
    with pytest.raises(KeyboardInterrupt):
        run(str(tmp_path))
    AFTER.clear()
    images, captions = run(str(tmp_path))
    assert sum(images.manifest["taken"].values()) == 2
    AFTER["000002"] = stop
    write(tmp_path / "corpus", "e.tar", 4)
    with pytest.raises(KeyboardInterrupt):
        run(str(tmp_path), Config(loud=2))
    AFTER.clear()
    asked()
    write(tmp_path / "corpus", "0.tar", 5)
    images, captions = run(str(tmp_path), Config(loud=2))
    assert list(captions.manifest["taken"].values()) == [3]
    assert asked() == said(3, 4, 5)
    check(images, captions)


def test_other_choices_and_other_models_take_nothing(tmp_path):
    place = str(tmp_path)
    write(tmp_path / "corpus", "a.tar", 0)
    store = store_of(place)
    images = store.step(index, IngestConfig(corpus=str(tmp_path / "corpus")))
    store.step(shout, Config(), images, store.step(model, Config(), images))
    store.step(all_together, Config(), images)
    assert asked() == said(0, 0)
    write(tmp_path / "corpus", "b.tar", 1)
    images = store.step(index, IngestConfig(corpus=str(tmp_path / "corpus")))
    store.step(shout, Config(loud=2), images, store.step(model, Config(), images))
    assert asked() == said(0, 1)
    store.step(shout, Config(), images, store.step(model, Config(loud=3), images))
    assert asked() == said(0, 1)
    store.step(shout, Config(), images)
    assert asked() == said(0, 1)
    store.step(all_together, Config(), images)
    assert asked() == said(0, 1)
    same = store.step(shout, Config(), images, store.step(model, Config(), images))
    assert asked() == said(1), "its files are the same, though it has another id"
    other = store.step(index, IngestConfig(corpus=str(tmp_path / "corpus"), image_size=(8, 8)))
    assert other.manifest["taken"] == {}
    check(same, other)


def test_a_longer_pattern_is_the_same_corpus(tmp_path):
    for number in range(3):
        write(tmp_path / "corpus", f"{number:05d}.tar", number)
    run(str(tmp_path), pattern="corpus/{00000..00001}.tar")
    images, captions = run(str(tmp_path), pattern="corpus/{00000..00002}.tar")
    assert asked() == said(0, 1, 2)
    assert list(images.manifest["taken"].values()) == [2]
    check(images, captions)


def test_what_is_made_of_several_is_taken_where_all_are_the_same(tmp_path):
    place = str(tmp_path)
    write(tmp_path / "corpus", "a.tar", 0)
    write(tmp_path / "corpus", "c.tar", 2)
    images, captions = run(place)
    store_of(place).step(shout, Config(loud=5), images, captions)
    write(tmp_path / "corpus", "b.tar", 1)
    images, captions = run(place)
    asked()
    third = store_of(place).step(shout, Config(loud=5), images, captions)
    assert asked() == said(1)
    BROKEN.update(said(0))
    _, other = run(place, Config(loud=2))
    BROKEN.clear()
    asked()
    fourth = store_of(place).step(shout, Config(loud=5), images, other)
    assert asked() == said(1, 2), "of a row that failed nothing is asked"
    check(third, fourth)


def test_rows_that_failed_go_along_and_are_tried_again(tmp_path):
    place = str(tmp_path)
    write(tmp_path / "corpus", "a.tar", 0, 1)
    BROKEN.update(said(0))
    _, first = run(place)
    assert first.summary["failed"] == 1
    write(tmp_path / "corpus", "b.tar", 2)
    asked()
    _, second = run(place)
    assert asked() == said(2)
    assert second.summary["failed"] == 1
    BROKEN.clear()
    renewed = store_of(place).retry(second, shout, Config())
    assert asked() == said(0), "and not taken back from what failed"
    assert renewed.summary["failed"] == 0
    write(tmp_path / "corpus", "c.tar", 3)
    _, third = run(place)
    assert asked() == said(3)
    assert third.summary["failed"] == 0, "of two the newer is taken"
    check(second, renewed, third)


def test_a_corpus_that_changes_while_it_is_read_is_given_up(tmp_path, monkeypatch):
    place = str(tmp_path)
    write(tmp_path / "corpus", "a.tar", 0)
    run(place)
    write(tmp_path / "corpus", "b.tar", 1)
    sources = find_corpus

    def late(*arguments, **options):
        write(tmp_path / "corpus", "0.tar", 2)
        return sources(*arguments, **options)

    monkeypatch.setitem(globals(), "find_corpus", late)
    with pytest.raises(RuntimeError, match=r"The corpus changed while it was read\. Give the same command again."):
        run(place)
    monkeypatch.setitem(globals(), "find_corpus", sources)
    images, captions = run(place)
    assert [text[15] for text in texts(captions)] == ["2", "0", "1"]
    check(images, captions)


def test_what_was_damaged_is_found_where_it_was_taken(tmp_path):
    place = str(tmp_path)
    write(tmp_path / "corpus", "a.tar", 0)
    _, first = run(place)
    url = Path(shard_url(first.path, "000000"))
    data = bytearray(url.read_bytes())
    data[len(data) // 2] ^= 1
    url.write_bytes(data)
    write(tmp_path / "corpus", "b.tar", 1)
    _, second = run(place)
    assert "shard 000000" in " ".join(faults(second))


def test_killed_while_taking_over(tmp_path, monkeypatch):
    place = str(tmp_path)
    for number, name in enumerate("abc"):
        write(tmp_path / "corpus", f"{name}.tar", number)
    run(place)
    write(tmp_path / "corpus", "d.tar", 3)
    asked()
    copy = storage.copy

    def cut(source, target, numbers):
        if next(numbers) >= 2:
            raise KeyboardInterrupt
        copy(source, target)

    for _ in range(2):
        monkeypatch.setattr(storage, "copy", partial(cut, numbers=itertools.count()))
        with pytest.raises(KeyboardInterrupt):
            run(place)
        monkeypatch.setattr(storage, "copy", copy)
    images, captions = run(place)
    assert asked() == said(3)
    assert (list(images.manifest["taken"].values()), list(captions.manifest["taken"].values())) == ([3], [3])
    check(images, captions)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_whatever_comes_and_goes_it_is_as_if_made_anew(tmp_path_factory, seed):
    draw, place = random.Random(seed), tmp_path_factory.mktemp("growing")
    ever: set[int] = set()
    for _ in range(4):
        for name in "abcde":
            path = place / "corpus" / f"{name}.tar"
            what = draw.choice(["keep", "keep", "put", "put", "remove", "touch"])
            if what == "put":
                write(place / "corpus", path.name, *draw.sample(range(9), draw.randint(1, 2)))
            elif what == "remove":
                path.unlink(missing_ok=True)
            elif what == "touch" and path.exists():
                os.utime(path, ns=(draw.randint(1, 10**6), draw.randint(1, 10**6)))
        if not list((place / "corpus").glob("*.tar")):
            write(place / "corpus", "a.tar", 0)
        CALLS.clear()
        images, captions = run(str(place))
        new = {content for path in (place / "corpus").iterdir() if (content := hash((path.name, path.read_bytes())))}
        if new <= ever:
            assert CALLS == []
        ever |= new
        check(images, captions)
        alone = Store(str(place / f"alone{draw.random()}"), Cluster(name="test"))
        other = alone.step(index, IngestConfig(corpus=str(place / "corpus")))
        assert rows(images) == rows(other)
        assert rows(captions) == rows(alone.step(shout, Config(), other))
