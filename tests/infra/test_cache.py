"""A node's cache: filled once by any number of processes, whole or not at all, and never too large."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, namedtuple
from pathlib import Path

import psutil
import pytest

from infra import cache, storage
from tests.proxy import Proxy

READ = "from infra.cache import cached; import sys\nwith cached(sys.argv[1]) as at: print(open(at + '/b.bin').read())"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("RESCRIBE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(s3):
    for name in ("a.bin", "b.bin", "sub/c.bin"):
        storage.write_bytes(f"{s3}/model/{name}", name.encode())
    return f"{s3}/model"


@pytest.fixture
def fetches(monkeypatch):
    """Addresses in the order in which they are fetched."""
    seen, download = [], storage.download

    def spy(url, target):
        seen.append(url)
        download(url, target)

    monkeypatch.setattr(storage, "download", spy)
    return seen


def read(url):
    with cache.cached(url) as folder:
        return {str(path.relative_to(folder)): path.read_text() for path in Path(folder).rglob("*") if path.is_file()}


def entries(root):
    return sorted(path.name for path in root.iterdir() if path.suffix != ".lock")


def child(url, **environment):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", READ, url], stdout=subprocess.PIPE, text=True,
        env={**os.environ, **environment}, cwd=Path(__file__).parents[2],
    )  # fmt: skip


def test_what_is_local_is_used_where_it_lies(root, tmp_path):
    (tmp_path / "model").mkdir()
    with cache.cached(f"{tmp_path}/model") as folder:
        assert folder == f"{tmp_path}/model"
    assert not root.exists()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(f"{tmp_path}/nowhere")


def test_a_folder_is_fetched_once_and_what_changed_is_another_entry(root, model, fetches):
    was = {name: name for name in ("a.bin", "b.bin", "sub/c.bin")}
    assert read(model) == read(f"{model}/") == was
    assert fetches == [model]
    storage.write_bytes(f"{model}/a.bin", b"other")
    with cache.cached(model) as folder:
        assert folder.endswith("/model")
        assert read(model) == was | {"a.bin": "other"}
    storage.remove(f"{model}/sub/c.bin")
    assert "sub/c.bin" not in read(model)
    assert len(fetches) == len(entries(root)) == 3
    with cache.cached(f"{model}/b.bin") as file:
        assert Path(file).read_text() == "b.bin"
    assert root.stat().st_mode & 0o077 == 0


def test_nothing_there_leaves_nothing(root, model):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(f"{model}/nowhere")
    assert not root.exists()


def test_what_changes_while_it_is_fetched_is_no_entry(root, model, monkeypatch):
    download = storage.download

    def torn(url, target):
        download(url, target)
        storage.write_bytes(f"{url}/a.bin", b"later")

    monkeypatch.setattr(storage, "download", torn)
    with pytest.raises(RuntimeError, match="changed while it was fetched"):
        read(model)
    assert entries(root) == []
    monkeypatch.undo()


@pytest.mark.timeout(120)
def test_of_two_processes_one_fetches_and_one_that_is_killed_leaves_nothing_wrong(root, model, s3_server):
    """The first is killed with one file fetched and another under way, while two others wait for it."""
    go, asked = threading.Event(), []

    class Slow(Proxy):
        def _answer(self, handler):
            if handler.command == "GET" and handler.path.endswith(".bin"):
                asked.append(handler.path.rpartition("/")[2])
                if asked[-1] == "b.bin":
                    go.wait(60)
            super()._answer(handler)

    with Slow(s3_server) as proxy:
        first = child(model, AWS_ENDPOINT_URL=proxy.url)
        while "b.bin" not in asked:
            assert first.poll() is None
            time.sleep(0.02)
        (left,) = entries(root)
        others = [child(model, AWS_ENDPOINT_URL=proxy.url) for _ in range(2)]
        lock = str(root / left.replace(".part", ".lock"))
        while any(lock not in {file.path for file in psutil.Process(other.pid).open_files()} for other in others):
            time.sleep(0.02)
        first.kill()
        first.wait()
        asked.clear()
        go.set()
        assert [other.communicate(timeout=60)[0] for other in others] == ["b.bin\n"] * 2
        assert Counter(asked) == {"a.bin": 1, "b.bin": 1, "c.bin": 1}
    assert entries(root) == [left.removesuffix(".part")]


Usage = namedtuple("Usage", "total used free")


def test_room_is_made_of_what_is_longest_unused_and_not_open(root, s3, fetches, monkeypatch):
    for name in "abcd":
        storage.write_bytes(f"{s3}/{name}/x", bytes(100))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1200, 0, 1200))  # a fourth of it is three entries
    for name in "abc":
        read(f"{s3}/{name}")
    with cache.cached(f"{s3}/a"):  # used again, so that b is the oldest; and c is open
        pass
    with cache.cached(f"{s3}/c"):
        read(f"{s3}/d")
        assert len(entries(root)) == 3
        fetches.clear()
        read(f"{s3}/a")
        assert fetches == []
        read(f"{s3}/b")  # for which a or d goes, not c
        assert fetches == [f"{s3}/b"]
        (root / f"{'0' * 32}.part").mkdir()  # of a process that was killed
        (root / f"{'0' * 32}.lock").touch()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(4, 0, 4))
        storage.write_bytes(f"{s3}/d/y", bytes(100))
        read(f"{s3}/d")
        assert len(entries(root)) == 2, "c, which is open, and d, which is too large in any case"
    fetches.clear()
    read(f"{s3}/c")
    assert fetches == []


def test_a_place_that_cannot_be_written_is_named(model, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RESCRIBE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="Set RESCRIBE_CACHE to a folder that can be written"):
        read(model)
    monkeypatch.delenv("RESCRIBE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    read(model)
    assert len(entries(tmp_path / "mine" / "rescribe")) == 1
