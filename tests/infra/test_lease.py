"""One driver a folder, whatever happens to the drivers and to the store."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from infra import lease, notice, storage
from infra.lease import Lease


def test_a_zombie_holds_nothing(tmp_path):
    """A killed driver whose parent has not asked for its end, as in a container without an init."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    born = psutil.Process(process.pid).create_time()
    record = {"token": "x", "host": socket.gethostname(), "pid": process.pid, "born": born, "beat": time.time()}
    (tmp_path / "lease.json").write_text(json.dumps(record))
    with pytest.raises(RuntimeError, match="Another driver"), Lease(str(tmp_path)):
        pass
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with Lease(str(tmp_path)):
        pass
    process.wait()
    assert not list(tmp_path.iterdir())


def test_a_heart_that_misses_a_beat_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    with Lease(str(tmp_path)):
        write = storage.write_bytes

        def away(*_):
            raise storage.UnavailableError("There is no room left.")

        monkeypatch.setattr(storage, "write_bytes", away)
        time.sleep(0.2)
        monkeypatch.setattr(storage, "write_bytes", write)
        before = json.loads((tmp_path / "lease.json").read_text())["beat"]
        time.sleep(0.3)
        assert json.loads((tmp_path / "lease.json").read_text())["beat"] > before


def test_a_lease_that_was_taken_over_is_not_taken_back(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    other = json.dumps({"token": "y", "host": "elsewhere", "pid": 1, "born": 0.0, "beat": time.time()})
    with Lease(str(tmp_path)):
        storage.write_bytes(str(tmp_path / "lease.json"), other.encode())
        time.sleep(0.3)
    assert (tmp_path / "lease.json").read_text() == other


def _take(folder, all_are_here, answers):
    all_are_here.wait()
    try:
        with Lease(folder):
            answers.put("taken")
            all_are_here.wait()  # held until each has its answer, however slow its disk
    except RuntimeError:
        answers.put("refused")
        all_are_here.wait()


@pytest.mark.parametrize("round", range(5))
def test_of_many_that_find_a_dead_holder_one_takes_over(tmp_path, round):
    record = {"token": "x", "host": "elsewhere", "pid": 1, "born": 0.0, "beat": 0.0}
    (tmp_path / "lease.json").write_text(json.dumps(record))
    context = multiprocessing.get_context("fork")
    all_are_here, answers = context.Barrier(6, timeout=30), context.Queue()
    drivers = [context.Process(target=_take, args=(str(tmp_path), all_are_here, answers)) for _ in range(6)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert [driver.exitcode for driver in drivers] == [0] * 6
    assert sorted(answers.get() for _ in drivers) == ["refused"] * 5 + ["taken"]
    assert not list(tmp_path.iterdir())


def test_a_slow_remover_leaves_the_new_holder_alone(tmp_path, monkeypatch):
    """It read the dead holder's record; before it comes to remove it, another has taken over."""
    record = {"token": "x", "host": "elsewhere", "pid": 1, "born": 0.0, "beat": 0.0}
    (tmp_path / "lease.json").write_text(json.dumps(record))
    is_alive, quick = lease._is_alive, Lease(str(tmp_path))

    def slow(holder):
        monkeypatch.setattr(lease, "_is_alive", is_alive)
        thread = threading.Thread(target=quick.__enter__)
        thread.start()
        thread.join()
        return is_alive(holder)

    monkeypatch.setattr(lease, "_is_alive", slow)
    with pytest.raises(RuntimeError, match="Another driver"), Lease(str(tmp_path)):
        pass
    quick.__exit__()
    assert not list(tmp_path.iterdir())


def test_a_torn_lease_is_nobodys(tmp_path):
    (tmp_path / "lease.json").write_text("{")
    with Lease(str(tmp_path)):
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("call", ["write_bytes", "remove"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_while_it_is_taken_or_given_back_leaves_nothing(tmp_path, monkeypatch, call, when):
    """The store answers slowly, and just then the signal comes."""
    real, went_on = getattr(storage, call), []

    def slow(*arguments, **named):
        monkeypatch.setattr(storage, call, real)
        if when == "before":
            signal.raise_signal(signal.SIGINT)
        real(*arguments, **named)
        if when == "after":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(storage, call, slow)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Lease(str(tmp_path)):
        went_on.append(True)
    assert went_on == ([] if call == "write_bytes" else [True])
    assert signal.getsignal(signal.SIGINT) is before
    assert not list(tmp_path.iterdir())


def test_a_second_ctrl_c_does_not_wait_for_a_store_that_does_not_answer(tmp_path, monkeypatch):
    def silent(*_, **__):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(notice, "ECHO_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt), Lease(str(tmp_path)):
        monkeypatch.setattr(storage, "remove", silent)
