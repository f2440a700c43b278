"""Read and write files by plain strings: a local path or an s3:// address, with the same promises for both."""

import errno
import glob
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

import fsspec
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from infra import strict
from infra.remote import Remote
from infra.trouble import UnavailableError as UnavailableError
from infra.trouble import explained

_TEMPORARY = ".tmp"  # a file of this ending that begins with a dot is a write in progress, or the rest of a killed one
_READ_AHEAD = 8 * 2**20
_UPLOAD = 50 * 2**20  # bytes of one part of an upload in parts; S3 takes at most 10,000 parts
_REMOVALS = 50
AT_ONCE = 32  # requests of one process to S3 that may be under way


@dataclass(frozen=True)
class File:
    """One listed file; `tag` changes when its content does (ETag on S3, modification time in ns locally)."""

    url: str
    size: int
    tag: str


def join(url: str, *parts: str) -> str:
    """Append path parts to an address."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def name(url: str) -> str:
    """The last part of an address."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def is_local(url: str) -> bool:
    """Whether an address is a path on this machine (or a file system mounted on it)."""
    return "://" not in url or url.startswith("file://")


def absolute(url: str) -> str:
    """The address as every process of the cluster understands it, whatever its working directory."""
    return os.path.abspath(_local(url)) if is_local(url) else url.rstrip("/")


def anchored(named: str) -> str:
    """A local file or folder that is there, by its absolute path; any other name, as of a model on a hub, as it is."""
    return absolute(named) if named and is_local(named) and os.path.exists(_local(named)) else named


def exists(url: str) -> bool:
    """Whether a file or a folder is there."""
    with _explained(url):
        files, path = _open(url)
        return files.exists(path)


def listing(pattern: str, follows: Callable[[str], bool] | None = None) -> list[File]:
    """List the files that a path, a folder, a glob or a brace pattern names, sorted by address.

    A folder stands for every file below it. One may really be called `photos [old]`: what is there by a path, or
    locally by the first parts of it, is taken by its word. Braces expand as in a shell (`{00000..00099}.tar`); an
    expansion without a wildcard names one file that has to exist. FileNotFoundError if nothing matches. Of local
    symbolic links those are followed that `follows` says, by their path; none without it.
    """
    with _explained(pattern):
        files, path = _open(pattern)
        entries = {path: files.info(path)} if files.exists(path) else _expand(files, path, pattern)
        found: dict[str, dict[str, Any]] = {}
        for one, info in entries.items():
            if follows is not None:
                found |= _walk(one, follows)
            else:
                found |= files.find(one, detail=True) if info["type"] == "directory" else {one: info}
    listed = [(one, info) for one, info in sorted(found.items()) if info["type"] == "file"]
    listed = [(one, info) for one, info in listed if not _is_temporary(name(one))]
    if not listed:
        brackets = " Brackets stand for one of the letters in them; write [[] for a bracket itself." * ("[" in pattern)
        if path in entries:
            raise FileNotFoundError(f"The folder {pattern} holds no file.")
        raise FileNotFoundError(f"{pattern} matches no file. Check the path, and quote it for the shell.{brackets}")
    return [_file(one if is_local(pattern) else f"s3://{one}", info) for one, info in listed]


def folder_of(path: str) -> str:
    """The local folder that a path or pattern begins with: as much of it as is there by its word; "" if nothing is."""
    while path and not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def list_names(folder: str) -> list[str]:
    """Names of what lies directly in a folder, sorted; empty when there is no such folder."""
    with _explained(folder):
        files, path = _open(folder)
        try:
            names = [name(one) for one in files.ls(path, detail=False) if one.rstrip("/") != path.rstrip("/")]
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(one for one in names if not _is_temporary(one))


def read_bytes(url: str, offset: int = 0, length: int | None = None) -> bytes:
    """Read a file, or `length` bytes of it from `offset` on: what there is of them."""
    if length == 0:
        return b""
    with _explained(url):
        files, path = _open(url)
        try:
            return files.cat_file(path, start=offset, end=None if length is None else offset + length)
        except OSError as error:
            if is_local(url) or error.errno != errno.EINVAL or not offset:
                raise
            return b""  # S3 calls a range that begins behind the end invalid


def open_read(url: str) -> IO[bytes]:
    """Open a file for reading; it can seek."""
    with _explained(url):
        files, path = _open(url)
        if is_local(url):
            return open(path, "rb")
        return io.BufferedReader(Remote(url, files.open(path, "rb", block_size=_READ_AHEAD)))


def write_bytes(url: str, data: bytes, overwrite: bool = True) -> None:
    """Write a file at once: readers see all of it or nothing, also after a crash or a power cut.

    With overwrite=False the file is put only if it is absent, else FileExistsError: of several writers one wins.
    """
    with _explained(url):
        files, path = _open(url)
        if not is_local(url):
            # One PUT; S3 shows an object when it is whole. "create" sends If-None-Match.
            try:
                files.pipe_file(path, data, mode="overwrite" if overwrite else "create")
            except FileExistsError:
                # A server may have lost its answer, not our data: then it was the client's second attempt that failed.
                if read_bytes(url) != data:
                    raise
            return
        with _committed(path, overwrite) as temporary, open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def write_pieces(url: str, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file at once, as `write_bytes` does, of pieces that need never be in memory together."""
    with _explained(url):
        files, path = _open(url)
        if is_local(url):
            with _committed(path, overwrite=True) as temporary, open(temporary, "wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            return
        file = files.open(path, "wb", block_size=_UPLOAD)
        try:
            for piece in pieces:
                file.write(piece)
            file.close()
        except BaseException:
            file.closed = True  # else s3fs would complete, when it forgets the file, what is not complete
            with suppress(Exception):  # what went wrong before is what is said
                file.discard()
            raise


def sweep(folder: str) -> None:
    """Remove what killed writes left anywhere below a folder: temporary files, and on S3 uploads that never ended.

    Only for who knows that nobody is writing there. What cannot be listed stays: a role may be forbidden to list
    uploads, and a bucket's rule ends them.
    """
    with suppress(UnavailableError), _explained(folder):
        files, path = _open(folder)
        if is_local(folder):
            for one in files.find(path):
                if _is_temporary(name(one)):
                    files.rm_file(one)
            return
        bucket, key, _ = files.split_path(path)
        # S3 names a thousand at a time: what is left then is swept the next time.
        for one in files.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/").get("Uploads", []):
            with suppress(FileNotFoundError):  # aborted, and its answer lost
                files.abort_mpu(bucket, one["Key"], one["UploadId"])


def read_json(url: str) -> Any:
    """Read one JSON value; ValueError if the file holds anything else."""
    try:
        return json.loads(read_bytes(url))
    except ValueError as error:
        raise ValueError(f"{url} is not valid JSON: {error}.") from None


def write_json(url: str, value: Any, overwrite: bool = True) -> None:
    """Write one JSON value, as `write_bytes` does."""
    write_bytes(url, (strict.dumps(value, indent=2) + "\n").encode(), overwrite)


def upload(local: str, url: str) -> None:
    """Copy a local file or folder to `url`, each file at once."""
    if os.path.isdir(local):
        for entry in sorted(os.scandir(local), key=lambda entry: entry.name):
            upload(entry.path, join(url, entry.name))
        return
    with _explained(url):
        files, path = _open(url)
        if not is_local(url):
            files.put_file(local, path)
            return
        with _committed(path, overwrite=True) as temporary:
            shutil.copyfile(local, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())


def copy(source: str, target: str) -> None:
    """Copy one file to another place of the same kind: locally its bytes are shared, on S3 the server copies."""
    if is_local(source) != is_local(target):
        raise ValueError(f"{source} and {target} do not lie on the same file system.")
    with _explained(target):
        files, path = _open(target)
        if not is_local(target):
            files.cp_file(_open(source)[1], path)
            return
        with _committed(path, overwrite=True) as temporary:
            try:
                os.link(_local(source), temporary)  # nothing here changes a file in place: all are replaced whole
            except OSError:  # another disk, or a file system without links
                shutil.copyfile(_local(source), temporary)


def digest(url: str) -> dict[str, Any]:
    """The `size` in bytes and the `sha256` of a file, read in pieces."""
    hashed, size = hashlib.sha256(), 0
    with open_read(url) as file:
        while piece := file.read(_READ_AHEAD):
            hashed.update(piece)
            size += len(piece)
    return {"size": size, "sha256": hashed.hexdigest()}


@contextmanager
def fetched(url: str) -> Iterator[str]:
    """A local path of a file or folder: itself when local, else a copy that is deleted afterwards.

    Not at the end of the process: Ray kills its workers, and their copies would stay on the disks of its nodes.
    """
    if is_local(url):
        if not os.path.exists(path := _local(url)):
            raise FileNotFoundError(f"{url} does not exist.")
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="rescribe-") as folder:
        target = os.path.join(folder, name(url))
        download(url, target)
        yield target


def download(url: str, target: str) -> None:
    """Copy a remote file, or a folder with all below it, to a local path that is not there yet."""
    for below in _below(url):
        os.makedirs(os.path.dirname(target + below), exist_ok=True)
        with open(target + below, "wb") as file:
            _download(url.rstrip("/") + below, file, target)


@contextmanager
def local_copy(url: str) -> Iterator[IO[bytes]]:
    """A local file to read and seek in: the file itself, or a copy that is deleted afterwards."""
    if is_local(url):
        with open_read(url) as file:
            yield file
        return
    with tempfile.TemporaryFile(prefix="rescribe-") as file:
        _download(url, file, tempfile.gettempdir())
        file.seek(0)
        yield file


def remove(url: str) -> None:
    """Delete a file or a folder with all it holds; nothing happens if it is not there."""
    with _explained(url):
        files, path = _open(url)
        for attempt in range(_REMOVALS):
            if not files.exists(path):
                return
            try:
                files.rm(path, recursive=files.isdir(path))
            except FileNotFoundError:
                pass  # somebody else was quicker
            except OSError as error:  # somebody wrote into the folder meanwhile: a process that outlived its driver
                if error.errno != errno.ENOTEMPTY or attempt == _REMOVALS - 1:
                    raise


def _download(url: str, file: IO[bytes], place: str) -> None:
    """Write all of a remote file into a local one, which lies at `place`."""
    with open_read(url) as remote, _explained(place):
        shutil.copyfileobj(remote, file, _READ_AHEAD)
        file.flush()


def _below(url: str) -> list[str]:
    """What to add to an address for each of the files of the folder that it is; nothing to add for a file's own."""
    with _explained(url):
        files, path = _open(url)
        found = files.find(path)
    if not found:
        raise FileNotFoundError(f"{url} does not exist.")
    if leaving := [one for one in found if ".." in one.split("/")]:  # an object may be called anything
        raise ValueError(f"{url} holds {leaving[0]!r}, a name that leads out of its folder. Remove that object.")
    return [one.removeprefix(path) for one in found]


def _local(url: str) -> str:
    return os.path.expanduser(url.removeprefix("file://"))


def _open(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path on it."""
    if is_local(url):
        return LocalFileSystem(), _local(url).rstrip("/") or "/"
    scheme, _, path = url.partition("://")
    if scheme != "s3":
        raise ValueError(f"{scheme}:// is not supported ({url}). Use a local path or s3://.")
    import s3fs.core  # slow, and a local run does without

    # Listings are not cached: other processes write while we look. The endpoint is an argument because fsspec keeps
    # one instance for each set of arguments, and the environment may change.
    s3fs.core.set_custom_error_handler(_is_passing)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    config = {"max_pool_connections": AT_ONCE}  # its own limit is 10
    files = fsspec.filesystem("s3", endpoint_url=endpoint, use_listings_cache=False, config_kwargs=config)
    return files, path.rstrip("/")


def _is_passing(error: Exception) -> bool:
    """What S3 says when two put one file at the same time, and asks to be asked again; s3fs retries the rest itself."""
    return "ConditionalRequestConflict" in str(error)


def _expand(files: Any, path: str, pattern: str) -> dict[str, dict[str, Any]]:
    """What braces and wildcards stand for: files and folders by path."""
    there = folder_of(path) if is_local(pattern) else ""
    try:
        alternatives = [there + one for one in braceexpand(path.removeprefix(there))]
    except ValueError:
        raise ValueError(f"The braces in {pattern} do not match. Write them as in {{00000..00099}}.") from None
    found: dict[str, dict[str, Any]] = {}
    folders: dict[str, dict[str, dict[str, Any]]] = {}
    for one in alternatives:
        if any(letter in one.removeprefix(there) for letter in "*?["):
            found |= files.glob(glob.escape(there) + one.removeprefix(there), detail=True)
            continue
        # {00000..99999}.tar asks for its folder once, not for each of a hundred thousand files.
        folder = os.path.dirname(one)
        if folder not in folders:
            entries = files.ls(folder, detail=True) if files.isdir(folder) else []
            folders[folder] = {entry["name"].rstrip("/"): entry for entry in entries}
        if one not in folders[folder]:
            missing = "It" if one == path else f"{name(one)}, which it names,"
            raise FileNotFoundError(f"{pattern} cannot be read. {missing} does not exist.")
        found[one] = folders[folder][one]
    return found


def _walk(path: str, follows: Callable[[str], bool], seen: frozenset[str] = frozenset()) -> dict[str, dict[str, Any]]:
    """Local files at a path and below it; a link that leads back to a folder on its way is not followed."""
    if os.path.islink(path) and not follows(path):
        return {}
    if os.path.isdir(path):
        real = os.path.realpath(path)
        if real in seen:
            return {}
        found: dict[str, dict[str, Any]] = {}
        for entry in os.scandir(path):
            found |= _walk(entry.path, follows, seen | {real})
        return found
    return {path: {"type": "file", "size": os.path.getsize(path)}} if os.path.isfile(path) else {}


def _file(url: str, info: dict[str, Any]) -> File:
    tag = info["ETag"].strip('"') if "ETag" in info else str(os.stat(url).st_mtime_ns)
    return File(url, info["size"], tag)


def _is_temporary(filename: str) -> bool:
    return filename.startswith(".") and filename.endswith(_TEMPORARY)


@contextmanager
def _committed(path: str, overwrite: bool) -> Iterator[str]:
    """Yield a temporary name in the same folder, and give its file the real name at the end."""
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:
        if os.path.lexists(folder):  # a file of that name
            raise NotADirectoryError(errno.ENOTDIR, "It is a file", folder) from None
        raise FileNotFoundError(errno.ENOENT, "The folder was removed meanwhile", folder) from None
    temporary = os.path.join(folder, f".{name(path)}.{uuid.uuid4().hex}{_TEMPORARY}")
    try:
        yield temporary
        if overwrite:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)  # unlike a rename, a link refuses to replace
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # the name itself has to survive a power cut
    finally:
        os.close(handle)


def _explained(url: str) -> AbstractContextManager[None]:
    return explained(url, is_local(url))
