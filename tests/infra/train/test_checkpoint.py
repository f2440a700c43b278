"""Whatever is cut, flipped, lost or killed: what is found is whole, and what is left over goes."""

import multiprocessing
import os
import random
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from infra import storage
from infra.train import checkpoint
from infra.train.tensors import TYPES, TensorFile, pieces
from infra.train.writer import Writer
from tests.infra.train import saver
from tests.infra.train.group import Group
from tests.proxy import Proxy

META = {"updates": {"net": {"optimizer_step": 3.0}}, "of": {"10": [1, 2], "9": None}}


def state(step):
    torch.manual_seed(step)
    return {
        "net/w/a": torch.randn(3, 5), "net/exp_avg/a": torch.randn(3, 5), "net/b/count": torch.tensor(step),
        "net/b/none": torch.empty(0, 4), "net/b/mask": torch.tensor([True, False, True]),
        "net/w/half": torch.randn(7).bfloat16(),
    }  # fmt: skip


def save(folder, *steps, **options):
    with Writer(str(folder), **options) as writer:
        for step in steps:
            writer.save(step, state(step), META)


def found(folder):
    """What is found under a folder, which must be what its step saved; its step, or None."""
    url = checkpoint.newest(str(folder))
    if url is None:
        return None
    saved = checkpoint.Checkpoint(url)
    wanted = state(saved.step)
    assert saved.meta["updates"] == META["updates"]
    assert saved.meta["of"] == META["of"]
    assert sorted(saved.names) == sorted(wanted)
    for name, tensor in wanted.items():
        assert saved[name].dtype == tensor.dtype
        assert torch.equal(saved[name], tensor)
    assert saved.step == checkpoint.step_of(url)
    return saved.step


def files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def names(url):
    return {storage.name(file.url) for file in storage.listing(url)}


# The format


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(st.sampled_from(sorted(TYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_the_format_is_that_of_the_library(tmp_path_factory, kinds, rng):
    folder = tmp_path_factory.mktemp("format")
    tensors = {}
    for name, (kind, shape) in kinds.items():
        data = bytearray(rng.randbytes(TYPES[kind].itemsize * torch.Size(shape).numel()))
        if kind == "BOOL":
            data = bytearray(byte % 2 for byte in data)
        tensors[name] = torch.frombuffer(data, dtype=TYPES[kind]) if data else torch.empty(0, dtype=TYPES[kind])
        tensors[name] = tensors[name].reshape(shape)

    def same(found):
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            bits = [one.contiguous().reshape(-1).view(torch.uint8) for one in (found[name], tensor)]
            assert torch.equal(*bits)

    ours, theirs = str(folder / "ours"), str(folder / "theirs")
    storage.write_pieces(ours, pieces(tensors))
    with safe_open(ours, "pt") as opened:
        same({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    same(safetensors.torch.load(Path(ours).read_bytes()))
    safetensors.torch.save_file(tensors, theirs, {"a": "note"})
    for path in (ours, theirs):
        opened = TensorFile(path)
        same({name: opened[name] for name in opened.names})


def test_views_and_other_strides_are_saved_as_they_are_seen(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    odd = {"t": whole.T, "row": whole[1], "grad": torch.nn.Parameter(whole[:, ::2])}
    storage.write_pieces(str(tmp_path / "x"), pieces(odd))
    opened = TensorFile(str(tmp_path / "x"))
    assert all(torch.equal(opened[name], tensor) for name, tensor in odd.items())
    with pytest.raises(ValueError, match=r"'c' is of torch.complex64, which cannot be saved\. Use one of F64"):
        list(pieces({"c": torch.zeros(1, dtype=torch.complex64)}))


def test_a_large_tensor_comes_in_pieces_that_are_views():
    tensor = torch.zeros(10 * 2**20)
    _, *data = pieces({"a": tensor})
    assert [len(piece) for piece in data] == [16 * 2**20, 16 * 2**20, 8 * 2**20]
    tensor[0] = 1.0  # no second copy of what is saved
    assert bytes(data[0][:4]) == b"\0\0\x80?"


@pytest.mark.parametrize("text", [b"", b"\1\0", b"\xff" * 8, b"\5\0\0\0\0\0\0\0{", b"\2\0\0\0\0\0\0\0{x"])
def test_what_is_no_such_file_is_said(tmp_path, text):
    (tmp_path / "x").write_bytes(text)
    with pytest.raises(ValueError, match=r"x is (cut: it ends at byte|no safetensors file: its header)"):
        TensorFile(str(tmp_path / "x"))


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


# Other workers


def test_no_part_of_an_earlier_attempt_is_taken(place, tmp_path, monkeypatch):
    group = Group(monkeypatch, 2)
    group.run(lambda: save(place, 5))
    taken = {name: storage.read_bytes(storage.join(checkpoint.place(place, 5), name))
             for name in names(checkpoint.place(place, 5))}  # fmt: skip
    record = {part["name"]: part for part in checkpoint.read_commit(checkpoint.place(place, 5))["parts"]}
    storage.remove(checkpoint.place(place, 5))

    def work():
        writer = Writer(place, limit_seconds=0.5, background=False)
        if writer._rank == 0:
            for name, data in taken.items():  # a dead attempt's last words come late
                if name != checkpoint.COMMIT:
                    storage.write_bytes(storage.join(checkpoint.place(place, 5), name), data)
                    storage.write_json(storage.join(checkpoint.place(place, 5), name + ".json"), record[name])
            writer.save(5, {"a": torch.ones(1)}, META)

    error, _ = group.run(work)
    assert isinstance(error, TimeoutError)
    assert re.search(r"000000005 cannot be committed: 0\.5 s after .* had come of worker 1\.", str(error))
    assert checkpoint.newest(place) is None


def test_what_befell_another_worker_is_known_at_once(tmp_path, monkeypatch):
    group = Group(monkeypatch, 2)
    write = storage.write_pieces

    def fails(url, data):
        if "part-00001" in url:
            raise storage.UnavailableError("There is no room left.")
        write(url, data)

    monkeypatch.setattr(storage, "write_pieces", fails)
    begun = time.monotonic()
    told = group.run(lambda: save(tmp_path, 5))
    assert time.monotonic() - begun < 10
    assert "Worker 1 could not save its part of a checkpoint: There is no room left." in str(told[0])
    assert isinstance(told[1], storage.UnavailableError)
    assert checkpoint.newest(str(tmp_path)) is None


def test_all_learn_at_the_end_that_the_last_save_does_not_count(tmp_path, monkeypatch):
    group = Group(monkeypatch, 3)

    def fails(url, record):
        raise storage.UnavailableError("The server failed.")

    monkeypatch.setattr(checkpoint, "write_commit", fails)
    told = group.run(lambda: save(tmp_path, 5))
    assert [type(error) for error in told] == [storage.UnavailableError, RuntimeError, RuntimeError]
    assert all("The server failed." in str(error) for error in told)


# In the background


class Gate:
    """Lets writes through when it is opened."""

    def __init__(self, monkeypatch):
        self.open, self.waiting, self.most, write = threading.Event(), 0, 0, storage.write_pieces

        def gated(url, data):
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            assert self.open.wait(20)
            self.waiting -= 1
            write(url, data)

        monkeypatch.setattr(storage, "write_pieces", gated)


def test_training_goes_on_while_one_save_is_under_way(tmp_path, monkeypatch):
    gate, writer = Gate(monkeypatch), Writer(str(tmp_path))
    writer.save(1, state(1), META)  # comes back
    writer.check()
    assert checkpoint.newest(str(tmp_path)) is None
    second = threading.Thread(target=lambda: writer.save(2, state(2), META))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # it waits for the first
    gate.open.set()
    second.join(20)
    writer.close()
    assert gate.most == 1
    assert found(tmp_path) == 2


def test_a_state_that_changes_while_it_is_saved_is_refused(tmp_path, monkeypatch):
    gate, writer = Gate(monkeypatch), Writer(str(tmp_path))
    parameter = torch.nn.Parameter(torch.ones(3))
    writer.save(1, {"fixed": torch.ones(1), "w": parameter.detach()}, META)
    with torch.no_grad():
        torch._foreach_add_([parameter], 1.0)
    gate.open.set()
    with pytest.raises(RuntimeError, match=r"'w' changed while step 1 was saved\. Give the Writer copies"):
        writer.close()
    assert checkpoint.newest(str(tmp_path)) is None


def save_and_fail(writer):
    with writer:
        writer.save(1, state(1), META)
        raise KeyError


def test_an_error_of_the_training_does_not_wait_for_a_save(tmp_path, monkeypatch):
    Gate(monkeypatch)
    begun = time.monotonic()
    with pytest.raises(KeyError):
        save_and_fail(Writer(str(tmp_path)))
    assert time.monotonic() - begun < 5


def test_who_has_left_waits_for_nobody(tmp_path, monkeypatch):
    group, writers = Group(monkeypatch, 2), []

    def work():
        writers.append(Writer(str(tmp_path)))
        if writers[-1]._rank == 0:
            save_and_fail(writers[-1])

    assert {type(error) for error in group.run(work)} == {KeyError, type(None)}
    (thread,) = [writer._thread for writer in writers if writer._thread]
    thread.join(5)
    assert not thread.is_alive()
    assert checkpoint.newest(str(tmp_path)) is None


@pytest.mark.parametrize("ask", ["check", "wait", "save", "close"])
def test_what_goes_wrong_is_raised_once_and_training_may_go_on(tmp_path, monkeypatch, ask):
    writer = Writer(str(tmp_path))
    writer.save(1, state(1), META)
    writer.wait()
    with monkeypatch.context() as patched:

        def fails(*_):
            raise storage.UnavailableError("There is no room left for it.")

        patched.setattr(storage, "write_pieces", fails)
        writer.save(2, state(2), META)
        writer._thread.join()
        with pytest.raises(storage.UnavailableError, match="no room left"):
            writer.save(3, state(3), META) if ask == "save" else getattr(writer, ask)()
    writer.check()
    assert found(tmp_path) == 1
    writer.save(2, state(2), META)  # the very same step
    writer.close()
    assert found(tmp_path) == 2
    assert len(files(tmp_path)) == 4


def test_a_full_disk_is_named_and_the_one_before_stays(small_disk):
    writer = Writer(str(small_disk))
    writer.save(1, state(1), META)
    writer.save(2, {"a": torch.zeros(2**19)}, META)
    with pytest.raises(storage.UnavailableError, match=r"There is no room left for /\S+part\S+\. Free some space"):
        writer.close()
    assert found(small_disk) == 1
    save(small_disk, 2)
    assert found(small_disk) == 2
    assert not list(small_disk.rglob(".*"))


def test_pieces_that_end_in_an_error_leave_nothing(place, monkeypatch):
    monkeypatch.setattr(storage, "_UPLOAD", 5 * 2**20)
    url = storage.join(place, "x")
    storage.write_bytes(url, b"old")
    for size in (3, 8 * 2**20):  # in one upload, in parts

        def broken(size=size):
            yield bytes(size)
            raise KeyError

        with pytest.raises(KeyError):
            storage.write_pieces(url, broken())
        assert storage.read_bytes(url) == b"old"
        assert storage.list_names(place) == ["x"]
    storage.write_pieces(url, [bytes(8 * 2**20), memoryview(b"end")])
    assert storage.read_bytes(url) == bytes(8 * 2**20) + b"end"
    if not storage.is_local(place):
        files, path = storage._open(place)
        assert files.list_multipart_uploads(path) == []


# Faults


@pytest.mark.timeout(120)
def test_a_server_that_fails_now_and_then_changes_nothing(s3, s3_server, monkeypatch):
    faults = {"500": 0.1, "503": 0.08, "cut": 0.08, "lost": 0.08}
    with Proxy(s3_server, **faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        save(s3, 1, 2, 3)
        assert found(s3) == 3
        assert sum(proxy.met[kind] for kind in faults) > 3
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert checkpoint.steps(s3) == [3, 2]
    assert len(names(s3)) == 3


@pytest.mark.faults
@pytest.mark.timeout(120)
def test_a_server_that_is_away_for_ten_seconds_costs_a_save_at_most(s3, s3_server, monkeypatch):
    begun = []

    def script(method, path, count):
        if method == "PUT" and f"{2:09d}" in path:
            begun.append(time.monotonic())
        return "503" if begun and time.monotonic() < begun[0] + 10 else None

    with Proxy(s3_server, script=script) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        writer = Writer(s3)
        writer.save(1, state(1), META)
        writer.save(2, state(2), META)
        writer._thread.join()
        last = 1 if writer._error else 2
        if last == 1:
            with pytest.raises(storage.UnavailableError, match="failed again and again"):
                writer.wait()
        assert proxy.met["503"] > 1
        time.sleep(max(0, begun[0] + 10.5 - time.monotonic()))
        assert found(s3) == last
        writer.save(3, state(3), META)
        writer.close()
        assert found(s3) == 3


@pytest.mark.faults
@pytest.mark.timeout(120)
@pytest.mark.parametrize("background", [True, False])
def test_sigkill_in_a_save_leaves_a_whole_one_and_the_rest_is_swept(tmp_path, background):
    seed = int(os.environ.get("RESCRIBE_SEED") or random.randrange(10**6))
    print(f"seed {seed}")
    rng, folder, noted = random.Random(seed), str(tmp_path / "c"), tmp_path / "noted"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.infra.train.saver"])
    last = torn = 0
    for _ in range(30):
        ready = context.Event()
        process = context.Process(target=saver.run, args=(folder, str(noted), background, ready), daemon=True)
        process.start()
        assert ready.wait(30)
        before, deadline = _last(noted), time.monotonic() + 20
        while _last(noted) < before + 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        saved = checkpoint.Checkpoint(checkpoint.newest(folder))
        # What was said to count counts: it, or one after it, is found, and is what its step saved.
        assert saved.step >= max(_last(noted), last)
        last = saved.step
        assert saved.meta["of"] == last
        assert all(torch.equal(saved[name], tensor) for name, tensor in saver.state(last).items())
        kept = [step for step in checkpoint.steps(folder) if checkpoint.read_commit(checkpoint.place(folder, step))]
        whole = {part for step in kept for part in _named(folder, step)}
        torn += {str(path.relative_to(folder)) for path in files(folder)} != whole
    assert last >= 30
    assert torn  # else no kill met a save
    Writer(folder).close()
    kept = checkpoint.steps(folder)
    assert kept[0] == last
    assert {str(path.relative_to(folder)) for path in files(folder)} == {p for s in kept for p in _named(folder, s)}


def _last(noted):
    """The step of the last whole line."""
    lines = noted.read_text().split("\n")[:-1] if noted.exists() else []
    return int(lines[-1]) if lines else 0


def _named(folder, step):
    """The files of a committed checkpoint, by its record."""
    record = checkpoint.read_commit(checkpoint.place(folder, step))
    return {f"{step:09d}/{name}" for name in (checkpoint.COMMIT, *(part["name"] for part in record["parts"]))}
