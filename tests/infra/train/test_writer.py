"""A Writer in the background and among others: what counts is whole, and what goes wrong is told to all, once."""

import multiprocessing
import os
import random
import re
import threading
import time

import pytest
import torch

from infra import storage
from infra.train import checkpoint
from infra.train.writer import Writer, _tidy
from tests.infra.train import saver
from tests.infra.train.group import Group
from tests.infra.train.saved import META, files, found, names, save, state
from tests.proxy import Proxy


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


def test_records_are_read_and_removed_many_at_a_time(tmp_path, monkeypatch):
    together, target = threading.Barrier(storage.AT_ONCE, timeout=20), checkpoint.place(str(tmp_path), 5)
    parts = [{"name": f"part-{number}"} for number in range(storage.AT_ONCE)]
    writer = Writer(str(tmp_path))
    for part in parts:
        storage.write_json(storage.join(target, f"{part['name']}.json"), part)
    read_json, remove = storage.read_json, storage.remove
    with monkeypatch.context() as patched:
        patched.setattr(storage, "read_json", lambda url: (together.wait(), read_json(url))[1])
        assert writer._gather(target, [part["name"] for part in parts]) == parts
    checkpoint.write_commit(target, {"parts": parts})
    monkeypatch.setattr(storage, "remove", lambda url: (together.wait(), remove(url)))
    _tidy(target)
    assert storage.list_names(target) == [checkpoint.COMMIT]


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
