"""Whatever is cut, flipped or lost: what is found is whole, and what is left over goes."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import storage
from infra.train import checkpoint
from infra.train.writer import Writer
from tests.infra.train.group import Group
from tests.infra.train.saved import META, files, found, names, save, state
from tests.proxy import Proxy

# Save and restore


@pytest.mark.parametrize("background", [True, False])
def test_what_is_saved_is_found(place, background):
    assert checkpoint.newest(place) is None
    assert checkpoint.best(place) is None
    assert checkpoint.restore(place) is None
    save(place, 5, 10, background=background)
    assert found(place) == 10
    saved = checkpoint.restore(place)
    assert saved is not None
    assert saved.step == 10
    assert "net/w/a" in saved
    with pytest.raises(ValueError, match=r"step 10 has no 'x'; it was written by another model"):
        saved["x"]
    with pytest.raises(ValueError, match=r"000000007 is no checkpoint: it has no commit\.json"):
        checkpoint.Checkpoint(checkpoint.place(place, 7))
    assert len(names(place)) == 3  # a part of each, and the name that all records have: nothing is left over


def test_a_torn_checkpoint_hides_no_progress(place):
    """What training came to is told by what it can go on from: else saves before a torn one would not count."""
    assert checkpoint.reached(place) == 0
    save(place, 5, 10)
    assert checkpoint.reached(place) == 10
    newest = checkpoint.place(place, 10)
    (part,) = [name for name in names(newest) if name.endswith(".safetensors")]
    storage.write_bytes(storage.join(newest, part), storage.read_bytes(storage.join(newest, part))[:-1])
    assert checkpoint.reached(place) == 5
    save(place, 7)
    assert checkpoint.reached(place) == 7


def test_shares_of_workers_are_one_checkpoint(place, monkeypatch):
    group = Group(monkeypatch, 3)

    def work():
        with Writer(place) as writer:
            for step in (5, 10):
                rank = writer._rank
                share = {name: tensor for at, (name, tensor) in enumerate(state(step).items()) if at % 3 == rank}
                writer.save(step, share, META if rank == 0 else {"of": "no one"})
        saved = checkpoint.restore(place)
        return saved.step, sorted(saved.names)

    assert group.run(work) == [(10, sorted(state(10)))] * 3
    assert found(place) == 10
    assert len(names(checkpoint.place(place, 10))) == 4
    # A broken part of the newest is found by whichever worker reads it, and none takes it.
    for at in range(3):
        (part,) = [name for name in names(checkpoint.place(place, 10)) if name.startswith(f"part-{at:05d}")]
        url = storage.join(checkpoint.place(place, 10), part)
        data = storage.read_bytes(url)
        storage.write_bytes(url, data[:-1] + bytes([data[-1] ^ 1]))
        assert group.run(lambda: checkpoint.restore(place).step) == [5] * 3
        storage.write_bytes(url, data)
    assert group.run(lambda: checkpoint.restore(place).step) == [10] * 3


def test_each_worker_reads_its_share_of_the_bytes(tmp_path, monkeypatch):
    group, read = Group(monkeypatch, 4), []
    group.run(lambda: save(tmp_path, 5))
    digest = storage.digest
    monkeypatch.setattr(storage, "digest", lambda url: (read.append(url), digest(url))[1])
    assert [saved.step for saved in group.run(lambda: checkpoint.restore(str(tmp_path)))] == [5] * 4
    assert len(read) == len(set(read)) == 4


def test_only_what_is_asked_for_is_read_from_afar(s3, monkeypatch):
    with Writer(s3) as writer:
        writer.save(1, {"a": torch.ones(100_000), "b": torch.ones(10)}, {})
    read, read_bytes = [], storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda *a: (d := read_bytes(*a), read.append(len(d)))[0])
    saved = checkpoint.Checkpoint(checkpoint.place(s3, 1))
    assert torch.equal(saved["b"], torch.ones(10))
    assert sum(read) < 2000
    assert torch.equal(saved["a"], torch.ones(100_000))


def test_a_reader_keeps_what_is_removed_under_it(tmp_path):
    save(tmp_path, 1)
    saved = checkpoint.Checkpoint(checkpoint.newest(str(tmp_path)))
    save(tmp_path, 2, 3, 4)
    assert not os.path.exists(saved.url)
    assert all(torch.equal(saved[name], tensor) for name, tensor in state(1).items())


# Damage


def test_a_checkpoint_cut_at_any_byte_is_passed_over_for_the_one_before(tmp_path):
    save(tmp_path, 5, 10)
    victims = files(tmp_path / f"{10:09d}")
    assert len(victims) == 2
    for victim in victims:
        data = victim.read_bytes()
        for length in range(len(data)):
            victim.write_bytes(data[:length])
            # Of the record the newline at its end says nothing.
            kept = victim.name == checkpoint.COMMIT and length == len(data) - 1
            assert found(tmp_path) == (10 if kept else 5), (victim, length)
        victim.write_bytes(data + b"\0")
        assert found(tmp_path) == 5
        victim.write_bytes(data)
    assert found(tmp_path) == 10


def test_any_changed_byte_is_seen(tmp_path):
    save(tmp_path, 5, 10)
    for victim in files(tmp_path / f"{10:09d}"):
        data = bytearray(victim.read_bytes())
        for at in range(len(data)):
            was = data[at]
            data[at] = was ^ (1 << at % 8)
            victim.write_bytes(data)
            step = found(tmp_path)  # asserts that what it finds is what was saved, whatever of a record changed
            assert step == 5 or (victim.name == checkpoint.COMMIT and chr(was).isspace()), (victim, at)
            data[at] = was
        victim.write_bytes(data)


def test_any_missing_file_is_seen_and_the_first_has_none_before_it(place):
    save(place, 5, 10)
    for step, then in ((10, 5), (5, None)):
        url = checkpoint.place(place, step)
        for name in names(url):
            data = storage.read_bytes(storage.join(url, name))
            storage.remove(storage.join(url, name))
            assert found(place) == then
            storage.write_bytes(storage.join(url, name), data)
            assert found(place) == step
        storage.remove(url)


@pytest.mark.timeout(120)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damage_of_several_at_once(tmp_path_factory, data):
    """The newest undamaged one is found, whatever happens to the others."""
    folder = tmp_path_factory.mktemp("damage")
    save(folder, 1, 2, 3, 4, keep=4)
    well = {1, 2, 3, 4}
    for step in data.draw(st.sets(st.integers(1, 4))):
        victim = data.draw(st.sampled_from(files(folder / f"{step:09d}")))
        content = victim.read_bytes()
        kind = data.draw(st.sampled_from(["cut", "gone", "zeros", "other", "folder"]))
        if kind == "gone":
            victim.unlink()
        elif kind == "folder":
            shutil.rmtree(victim.parent)
        else:
            at = data.draw(st.integers(0, len(content) - 2))
            middle = {"cut": b"", "zeros": bytes(len(content) - at), "other": b"{}" + content[at:]}[kind]
            if content[:at] + middle == content:
                continue
            victim.write_bytes(content[:at] + middle)
        well -= {step}
    assert found(folder) == max(well, default=None)
    save(folder, 9, keep=4)  # the same line again repairs what there is
    assert found(folder) == 9


# What is kept, and what goes


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(-3, 3), st.just(float("nan"))), min_size=1, max_size=7),
       st.integers(1, 3), st.booleans())  # fmt: skip
def test_the_newest_and_the_best_are_kept(tmp_path_factory, scores, keep, cut):
    folder = str(tmp_path_factory.mktemp("keep"))
    writer = Writer(folder, keep=keep)
    for step, score in enumerate(scores):
        if cut and step == 3:
            writer.close()
            writer = Writer(folder, keep=keep)
        writer.save(step, {"a": torch.tensor(float(step))}, {}, score)
    writer.close()
    scored = [(score, -step) for step, score in enumerate(scores) if score is not None and score == score]
    best = -min(scored)[1] if scored else None
    kept = {*range(len(scores))[-keep:]} | ({best} if scored else set())
    assert set(checkpoint.steps(folder)) == kept
    assert checkpoint.best(folder) == (checkpoint.place(folder, best) if scored else None)
    assert checkpoint.newest(folder) == checkpoint.place(folder, len(scores) - 1)


def test_the_best_is_whole_or_another_is(tmp_path):
    with Writer(str(tmp_path), keep=3) as writer:
        for step, score in ((1, 0.2), (2, 0.1), (3, 0.3)):
            writer.save(step, state(step), {}, score)
    (part,) = (tmp_path / f"{2:09d}").glob("part*")
    data = part.read_bytes()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert checkpoint.step_of(checkpoint.best(str(tmp_path))) == 1


@pytest.mark.parametrize("keep", [0, -1])
def test_nothing_to_keep_is_refused(tmp_path, keep):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Writer(str(tmp_path), keep=keep)


def test_what_was_never_committed_is_swept_when_a_training_begins(place):
    save(place, 5, 10)
    whole = names(place)
    old = storage.join(checkpoint.place(place, 10), "part-00001-of-00002-0123.safetensors")
    for url in (
        old, old + ".json", storage.join(checkpoint.place(place, 7), "part-00000-of-00002-0123.safetensors"),
        storage.join(checkpoint.place(place, 99), "part-00000-of-00002-0123.safetensors.json"),
        storage.join(checkpoint.place(place, 98), checkpoint.COMMIT), storage.join(place, "note.txt"),
    ):  # fmt: skip
        storage.write_bytes(url, b"the rest of a dead attempt")
    assert found(place) == 10
    if storage.is_local(place):
        rest = Path(checkpoint.place(place, 10), ".part-00000-of-00001.safetensors.0123.tmp")
        rest.write_bytes(b"half")
    Writer(place).close()
    assert names(place) == whole | {"note.txt"}
    assert found(place) == 10
    assert checkpoint.steps(place) == [10, 5]
    assert not storage.is_local(place) or not rest.exists()


def test_uploads_that_never_ended_are_swept_and_those_of_others_are_not(s3):
    files, path = storage._open(s3)
    inside, outside = f"{path}/c/{5:09d}/part", f"{path}/c-other/part"
    left = []  # held: s3fs would complete a file that it forgets
    for one in (inside, outside):
        left.append(files.open(one, "wb", block_size=5 * 2**20))
        left[-1].write(bytes(6 * 2**20))
    assert {one["Key"] for one in files.list_multipart_uploads(path)} == {f"c/{5:09d}/part", "c-other/part"}
    save(f"{s3}/c", 5)
    assert {one["Key"] for one in files.list_multipart_uploads(path)} == {"c-other/part"}
    assert found(f"{s3}/c") == 5
    for one in left:
        one.closed = True


def test_a_role_that_may_not_list_uploads_still_trains(s3, s3_server, monkeypatch):
    with Proxy(s3_server, script=lambda method, path, count: "403" if "uploads" in path else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        save(s3, 5)
        assert proxy.met["403"]
        assert found(s3) == 5


def test_a_torn_checkpoint_that_was_passed_over_is_replaced_when_training_comes_there(tmp_path):
    save(tmp_path, 5, 10)
    (part,) = (tmp_path / f"{10:09d}").glob("part*")
    part.write_bytes(b"?" * len(part.read_bytes()))
    with Writer(str(tmp_path)) as writer:
        writer.save(6, state(6), META)
        writer.wait()
        assert found(tmp_path) == 6
        assert 5 in checkpoint.steps(str(tmp_path))  # one that is torn is not one of those that are kept
        writer.save(10, state(10), META)
    assert found(tmp_path) == 10
    assert checkpoint.steps(str(tmp_path)) == [10, 6]
    assert len(files(tmp_path / f"{10:09d}")) == 2


def test_a_step_is_saved_once(tmp_path):
    with Writer(str(tmp_path)) as writer:
        writer.save(5, state(5), META)
        writer.save(5, {"other": torch.ones(1)}, META)
    assert found(tmp_path) == 5
