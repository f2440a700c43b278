"""Remote folders that are read again and again, fetched once a node: a cache that its processes share.

The folder RESCRIBE_CACHE, or `rescribe` in the user's own cache folder, holds an entry for each content that an address
had, and a lock for each, which stays. One process fills an entry while others wait; it gets its name when all of it is
there, so a kill leaves nothing that counts. Entries that nobody has open may be removed at any time, by hand or to make
room for another: those longest unused go first while all of them take more than a quarter of the disk.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from infra import storage, strict

SHARE = 0.25  # of the disk, that entries may take


@contextmanager
def cached(url: str) -> Iterator[str]:
    """A local path of a file or folder, to be read only: itself when local, else an entry that stays for the next.

    What changes at the address, by names, sizes or ETags, is another entry. An entry is kept for as long as the context
    lasts. FileNotFoundError where nothing is there.
    """
    if storage.is_local(url):
        with storage.fetched(url) as path:
            yield path
        return
    files = storage.listing(url)
    told = [url.rstrip("/"), *([file.url, file.size, file.tag] for file in files)]
    entry = _root() / hashlib.sha256(strict.dumps(told).encode()).hexdigest()[:32]
    with _lock(entry) as lock:
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if entry.is_dir():  # whoever makes room may have come between the two locks
                break
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not entry.is_dir():
                _make_room(entry.parent, sum(file.size for file in files))
                _fill(entry, url, files)
        os.utime(lock.fileno())  # its last use
        yield str(entry / storage.name(url))


def _root() -> Path:
    """Where entries lie; only their owner may write there, since what is read from them is trusted."""
    told = os.environ.get("RESCRIBE_CACHE")
    root = Path(told) if told else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rescribe"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"What is fetched cannot be kept in {root}: {error.strerror}. Set RESCRIBE_CACHE to a folder that can be "
            "written, on a disk of this machine."
        ) from error
    return root


def _lock(entry: Path) -> IO[bytes]:
    return open(entry.with_suffix(".lock"), "ab")


def _fill(entry: Path, url: str, files: list[storage.File]) -> None:
    """Fetch an entry; the caller holds its lock."""
    part = entry.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)  # of one that was killed
    part.mkdir()
    try:
        storage.download(url, str(part / storage.name(url)))
        if storage.listing(url) != files:
            raise RuntimeError(f"{url} changed while it was fetched. Give the same command again.")
        for path in part.rglob("*"):
            _sync(path)
        os.rename(part, entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _make_room(root: Path, size: int) -> None:
    """Remove what was left half done and, the longest unused first, what is too much beside `size` bytes more."""
    locks = sorted(root.glob("*.lock"), key=lambda path: path.stat().st_mtime)
    sizes = {lock: _size(lock.with_suffix("")) for lock in locks}
    much = sum(sizes.values()) + size - SHARE * shutil.disk_usage(root).total
    for path in locks:
        with _lock(path) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # somebody reads it, or fills it
            shutil.rmtree(path.with_suffix(".part"), ignore_errors=True)
            if much > 0 and sizes[path]:
                _remove(path.with_suffix(""))
                much -= sizes[path]


def _remove(entry: Path) -> None:
    """Nobody finds half an entry, also where this is cut."""
    part = entry.with_suffix(".part")
    os.rename(entry, part)
    shutil.rmtree(part, ignore_errors=True)


def _sync(path: Path) -> None:
    """What has its name survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
