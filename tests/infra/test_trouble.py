"""Storage on a server that fails, refuses and breaks off, and on a full disk."""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from infra import storage
from infra.data.encoded import Place, fetch_images
from infra.data.readers import read_source
from infra.data.samples import Source
from infra.lease import Lease
from infra.trouble import is_device_error, is_out_of_memory
from tests.proxy import Proxy

MIXED = {"500": 0.12, "503": 0.08, "cut": 0.08, "lost": 0.08, "slow": 0.04}


@pytest.fixture
def through(s3, s3_server, monkeypatch):
    """A function that starts a proxy with faults and points the clients to it; addresses are of the bucket `s3`."""
    proxies = []
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")

    def start(**arguments):
        proxies.append(Proxy(s3_server, **arguments))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxies[-1].url)
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.__exit__()


@pytest.mark.timeout(120)
def test_a_server_that_fails_now_and_then_changes_nothing(s3, through, monkeypatch):
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    proxy = through(seed=0, **MIXED)
    data = {f"{number}.bin": os.urandom(5000 * number) for number in range(1, 7)}
    for name, value in data.items():
        storage.write_bytes(f"{s3}/a/{name}", value, overwrite=name < "4")
    assert storage.list_names(f"{s3}/a") == sorted(data)
    assert {storage.name(file.url): file.size for file in storage.listing(f"{s3}/a/*.bin")} == {
        name: len(value) for name, value in data.items()
    }
    with storage.fetched(f"{s3}/a") as fetched:
        assert {path.name: path.read_bytes() for path in Path(fetched).iterdir()} == data
    for name, value in data.items():
        url = f"{s3}/a/{name}"
        assert storage.read_bytes(url) == value
        assert storage.read_bytes(url, 1000, 2000) == value[1000:3000]
        with storage.local_copy(url) as file, storage.open_read(url) as other:
            assert file.read() == other.read() == value
    storage.copy(f"{s3}/a/1.bin", f"{s3}/b/1.bin")
    storage.remove(f"{s3}/a")
    assert storage.list_names(s3) == ["b"]
    with pytest.raises(FileExistsError):
        storage.write_bytes(f"{s3}/b/1.bin", b"other", overwrite=False)
    assert sum(proxy.met[kind] for kind in MIXED) > 5


def test_an_answer_that_was_lost_is_no_other_writer(s3, through):
    through(script=lambda method, path, count: "lost" if method == "PUT" and count == 1 else None)
    storage.write_bytes(f"{s3}/claim", b"mine", overwrite=False)
    through(script=lambda method, path, count: "lost" if method == "PUT" and count == 1 else None)
    with Lease(f"{s3}/held"):
        assert storage.exists(f"{s3}/held/lease.json")
    assert storage.list_names(f"{s3}/held") == []


def test_two_that_put_at_the_same_time_ask_again(s3, through):
    through(script=lambda method, path, count: "409" if method == "PUT" and count == 1 else None)
    storage.write_bytes(f"{s3}/claim", b"mine", overwrite=False)
    assert storage.read_bytes(f"{s3}/claim") == b"mine"


READS = [
    storage.read_bytes,
    lambda url: storage.open_read(url).read(),
    lambda url: storage.fetched(url).__enter__(),
    storage.digest,
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["500", "cut"])
@pytest.mark.parametrize("read", READS)
def test_a_server_that_never_recovers_is_named_and_nothing_torn_is_read(s3, through, read, fault):
    storage.write_bytes(f"{s3}/x.bin", bytes(10_000))
    through(script=lambda method, path, count: fault if method == "GET" and "x.bin" in path else None)
    with pytest.raises(storage.UnavailableError, match=r"server of s3://\S+ failed again and again"):
        read(f"{s3}/x.bin")


@pytest.mark.parametrize("fault", ["403", "key", "signature"])
def test_a_refusal_is_named_by_all_that_asks(s3, through, fault):
    url = f"{s3}/x.bin"
    storage.write_bytes(url, b"x")
    through(script=lambda method, path, count: fault)
    for ask in [*READS, storage.exists, storage.listing, storage.list_names, storage.remove]:
        with pytest.raises(storage.UnavailableError, match=r"Access to s3://\S+ was denied.* credentials\."):
            ask(url)
    with pytest.raises(storage.UnavailableError, match="denied"):
        storage.write_bytes(url, b"y")


def test_a_file_that_changes_while_it_is_read_is_never_a_mixture(s3, s3_server, through, monkeypatch):
    url, first, second = f"{s3}/x.bin", b"1" * 200_000, b"2" * 200_000
    storage.write_bytes(url, first)

    def change(method, path, count):
        if method != "GET" or "x.bin" not in path or changed:
            return None
        changed.append(True)
        return "cut"

    def replace():
        here = os.environ["AWS_ENDPOINT_URL"]
        os.environ["AWS_ENDPOINT_URL"] = s3_server
        storage.write_bytes(url, second)
        os.environ["AWS_ENDPOINT_URL"] = here

    for read in READS[1:3]:
        storage.write_bytes(url, first)
        changed = []
        through(script=change)
        thread = threading.Thread(target=lambda seen=changed: (_until(seen), replace()))
        thread.start()
        try:
            found = read(url)
            found = found if isinstance(found, bytes) else Path(found).read_bytes()
            assert found in (first, second)
        except OSError:
            pass
        thread.join()


def _until(seen):
    while not seen:
        threading.Event().wait(0.001)


@pytest.mark.parametrize("fault", ["403", "500"])
def test_a_place_that_is_away_is_no_fault_of_its_rows(s3, through, fault):
    url = f"{s3}/x.tar"
    storage.write_bytes(url, bytes(10_240))
    through(script=lambda method, path, count: fault)
    for kind in ("tar", "parquet"):
        with pytest.raises(storage.UnavailableError):
            list(read_source(Source(kind=kind, name="x.tar", url=url, size=1, tag="")))
    entry = {"key": "x", "occurrence": 0, "image": url, "length": 100}
    with pytest.raises(storage.UnavailableError):
        list(read_source(Source(kind="folder", name="", url=s3, size=1, tag=""), [entry]))
    for source in (url, f"{s3}/x.parquet#image"):
        with pytest.raises(storage.UnavailableError):
            list(fetch_images([Place(source, 0, 10, "0" * 64)]))


def test_a_full_disk_is_named_and_keeps_what_was_there(small_disk, s3, tmp_path, monkeypatch):
    url = str(small_disk / "x.bin")
    storage.write_bytes(url, b"old")
    for overwrite, name in ((True, "x.bin"), (False, "y.bin")):
        with pytest.raises(storage.UnavailableError, match=r"There is no room left for /\S+\. Free some space"):
            storage.write_bytes(str(small_disk / name), bytes(2**21), overwrite)
    assert storage.read_bytes(url) == b"old"
    assert os.listdir(small_disk) == ["x.bin"]
    (tmp_path / "large").write_bytes(bytes(2**21))
    with pytest.raises(storage.UnavailableError, match="no room"):
        storage.upload(str(tmp_path / "large"), url)
    storage.write_bytes(f"{s3}/large.tar", bytes(2**21))
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with pytest.raises(storage.UnavailableError, match="no room"):  # of the copy: the archive is well
        list(read_source(Source(kind="tar", name="large.tar", url=f"{s3}/large.tar", size=2**21, tag="")))
    assert os.listdir(small_disk) == ["x.bin"]
    storage.write_bytes(url, bytes(2**19))


@pytest.mark.parametrize("round", range(5))
def test_a_folder_is_removed_while_others_write_into_it(tmp_path, round):
    folder, stop = str(tmp_path / "attempts"), threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            number += 1
            with suppress(FileNotFoundError):  # its folder went away under it
                storage.write_bytes(f"{folder}/{threading.get_ident()}-{number}", b"1")
            time.sleep(0.002)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            storage.remove(folder)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    storage.remove(folder)
    assert not storage.exists(folder)


@pytest.mark.parametrize(
    ("error", "device", "memory"),
    [
        (type("AcceleratorError", (RuntimeError,), {})("device-side assert triggered"), True, False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True, False),
        (RuntimeError("CUDA error: out of memory"), False, True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False, True),
        (type("OutOfMemoryError", (RuntimeError,), {})("Tried to allocate"), False, True),
        (MemoryError(), False, True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), False, True),
        (
            RuntimeError("NCCL error: remote process exited"),
            True,
            False,
        ),  # or another worker fell: see `restarts.ECHOES`
        (ValueError("CUDA error: is what a text says"), False, False),
    ],
)
def test_what_a_device_and_want_of_memory_raise(error, device, memory):
    assert (is_device_error(error), is_out_of_memory(error)) == (device, memory)
