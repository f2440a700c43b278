import os
import tempfile
import threading
from pathlib import Path

import pytest

from infra import storage


def put(folder, *names):
    for name in names:
        storage.write_bytes(storage.join(folder, name), name.encode())


def _fetch(url):
    with storage.fetched(url):
        pass


def names(files, folder):
    return [file.url.removeprefix(folder + "/") for file in files]


def test_what_is_written_is_read(place):
    url = storage.join(place, "a/b", "file.bin")
    storage.write_bytes(url, b"0123456789")
    assert storage.read_bytes(url) == b"0123456789"
    assert storage.read_bytes(url, 3, 4) == b"3456"
    assert storage.read_bytes(url, 8) == b"89"
    assert storage.read_bytes(url, 8, 100) == b"89"
    assert storage.read_bytes(url, 8, 0) == b""
    assert storage.read_bytes(url, 11, 5) == storage.read_bytes(url, 10, 5) == b""  # behind the end there is nothing
    with storage.open_read(url) as file:
        file.seek(5)
        assert file.read(2) == b"56"
    with storage.local_copy(url) as file:
        assert file.read() == b"0123456789"
    storage.write_json(url, {"a": [1, None]})
    assert storage.read_json(url) == {"a": [1, None]}
    storage.write_bytes(url, b"{")
    with pytest.raises(ValueError, match="not valid JSON"):
        storage.read_json(url)


def test_put_if_absent_lets_one_writer_win(place):
    url = storage.join(place, "claim")
    won, told = [], []

    def claim(number):
        try:
            storage.write_bytes(url, str(number).encode(), overwrite=False)
            won.append(number)
        except FileExistsError as error:
            told.append(str(error))

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert told == [f"{url} already exists."] * 7
    assert storage.read_bytes(url) == str(won[0]).encode()
    assert storage.list_names(place) == ["claim"]


def test_listing_of_files_folders_globs_and_braces(place):
    put(place, "c/00000.tar", "c/00001.tar", "c/00002.tar", "c/sub/00003.tar", "c/note.txt", "d/00000.tar")

    def listed(pattern):
        return names(storage.listing(storage.join(place, pattern)), place)

    assert listed("c/00001.tar") == ["c/00001.tar"]
    assert listed("c/*.tar") == ["c/00000.tar", "c/00001.tar", "c/00002.tar"]
    assert listed("c/{00000..00002}.tar") == ["c/00000.tar", "c/00001.tar", "c/00002.tar"]
    assert listed("{c,d}/00000.tar") == ["c/00000.tar", "d/00000.tar"]
    assert listed("{c,d}/*0.{tar,txt}") == ["c/00000.tar", "d/00000.tar"]
    assert listed("c/**/*.tar") == ["c/00000.tar", "c/00001.tar", "c/00002.tar", "c/sub/00003.tar"]
    assert len(listed("c")) == 5
    assert len(listed("c/")) == 5
    assert len(listed("*")) == 6
    assert storage.list_names(storage.join(place, "c")) == ["00000.tar", "00001.tar", "00002.tar", "note.txt", "sub"]
    assert storage.list_names(storage.join(place, "nothing")) == []


@pytest.mark.parametrize("pattern", ["c/*.png", "c/{0..3}.tar", "nothing", "c/0.tar/x", "{c,e}/0.tar", "no/*/x"])
def test_a_pattern_that_matches_nothing_is_an_error_in_words(place, pattern):
    put(place, "c/0.tar", "c/1.tar", "c/2.tar")
    with pytest.raises(FileNotFoundError, match=r"(matches no file|cannot be read)\. .*\.$") as caught:
        storage.listing(storage.join(place, pattern))
    assert place in str(caught.value)
    assert caught.value.errno is None


def test_unbalanced_braces_and_unknown_schemes(tmp_path):
    with pytest.raises(ValueError, match="braces"):
        storage.listing(str(tmp_path / "{a,b"))
    with pytest.raises(ValueError, match="gs:// is not supported"):
        storage.exists("gs://bucket/x")


def test_a_folder_whose_name_looks_like_a_pattern(place):
    put(place, "photos [old] {1}/a.jpg")
    assert len(storage.listing(storage.join(place, "photos [old] {1}"))) == 1


def test_the_tag_tells_a_changed_file(place):
    url = storage.join(place, "x.tar")
    storage.write_bytes(url, b"one")
    before = storage.listing(url)
    assert storage.listing(url) == before
    storage.write_bytes(url, b"two")
    assert storage.listing(url)[0].tag != before[0].tag
    assert storage.listing(url)[0].size == 3


def test_upload_fetch_remove(place, tmp_path):
    local = tmp_path / "here"
    (local / "sub").mkdir(parents=True)
    (local / "a.txt").write_text("a")
    (local / "sub/b.txt").write_text("b")
    there = storage.join(place, "there")
    storage.upload(str(local), there)
    with storage.fetched(there) as folder, storage.fetched(storage.join(there, "a.txt")) as file:
        assert Path(folder, "sub/b.txt").read_text() == "b"
        assert Path(file).read_text() == "a"
    assert Path(folder).exists() == Path(file).exists() == storage.is_local(place)  # nothing of S3 stays on a disk
    assert storage.exists(there)
    storage.remove(storage.join(there, "a.txt"))
    assert storage.list_names(there) == ["sub"]
    storage.remove(there)
    storage.remove(there)
    assert not storage.exists(there)


def test_what_is_there_is_called_by_its_whole_path_and_a_hubs_name_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert storage.anchored("org/here") == storage.anchored("./org/here") == f"{tmp_path}/org/here"
    for name in ("org/there", "", "s3://org/here", f"{tmp_path}/org/here"):
        assert storage.anchored(name) == name


def test_no_object_is_fetched_out_of_its_folder(s3, tmp_path, monkeypatch):
    """An object may be called anything, also what leads out of the folder that a copy is made in."""
    import boto3

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for key in ("model/a.txt", "model/x..y/..b", "model//c.txt"):
        client.put_object(Bucket=s3.removeprefix("s3://"), Key=key, Body=b"a")
    with storage.fetched(f"{s3}/model") as folder:
        assert Path(folder, "x..y", "..b").read_text() == "a"
    client.put_object(Bucket=s3.removeprefix("s3://"), Key="model/../../up.txt", Body=b"up")
    with pytest.raises(ValueError, match="a name that leads out of its folder"):
        _fetch(f"{s3}/model")
    assert not [path for path in tmp_path.rglob("*") if path.name == "up.txt"]


def test_links_within_a_folder_are_passed_over(tmp_path):
    """A stranger's archive may bring them: they would make a corpus of this machine's own files."""
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.png").write_bytes(b"a")
    for name, target in [("dog.txt", "../secret.txt"), ("up", ".."), ("loop", "."), ("dead.png", "nowhere")]:
        (tmp_path / "corpus" / name).symlink_to(target)
    for pattern in ("corpus", "corpus/*.png"):
        assert [storage.name(file.url) for file in storage.listing(str(tmp_path / pattern))] == ["a.png"]


@pytest.mark.parametrize("read", [storage.read_bytes, storage.open_read, _fetch, storage.read_json])
def test_a_missing_file_is_named(place, read):
    url = storage.join(place, "missing.json")
    with pytest.raises(FileNotFoundError, match=r"missing\.json does not exist\."):
        read(url)


def test_a_missing_bucket_and_missing_credentials_are_named(s3, monkeypatch):
    with pytest.raises(FileNotFoundError, match="bucket of s3://no-such-bucket/x does not exist"):
        storage.write_bytes("s3://no-such-bucket/x", b"")
    # fsspec keeps clients by their arguments: another spelling of the address makes a new one.
    monkeypatch.setenv("AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"].replace("127.0.0.1", "localhost"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(PermissionError, match="No credentials were found for s3://"):
        storage.read_bytes(s3 + "/x")


def test_no_server_is_named(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(ConnectionError, match="AWS_ENDPOINT_URL"):
        storage.read_bytes(s3 + "/x")


def test_a_write_that_is_cut_leaves_the_old_file_and_is_not_listed(tmp_path, monkeypatch):
    url = str(tmp_path / "x.bin")
    storage.write_bytes(url, b"old")

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        storage.write_bytes(url, b"new")
    assert storage.read_bytes(url) == b"old"
    (tmp_path / ".y.bin.0123.tmp").write_bytes(b"the rest of a killed write")
    assert storage.list_names(str(tmp_path)) == ["x.bin"]
    assert len(storage.listing(str(tmp_path))) == 1
