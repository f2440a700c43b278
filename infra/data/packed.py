"""Tars that are compressed as a whole: what is in them is read from a copy that is not."""

import bz2
import gzip
import lzma
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from infra import storage

PACKED = "#unpacked"  # after the address of a packed file: places in it are those of its content
_KINDS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
_MOST_BYTES = 2**38  # of one unpacked file: a small file can claim to hold anything


@contextmanager
def plain_copy(url: str) -> Iterator[tuple[IO[bytes], str]]:
    """The content of a file, unpacked where it is packed, open for reading; and the source that places in it refer to.

    What is broken is unpacked as far as it goes, as a torn tar is read.
    """
    url = url.removesuffix(PACKED)
    with storage.local_copy(url) as file:
        opened = next(
            (opened for mark, opened in _KINDS.items() if file.read(8).startswith(mark) or file.seek(0)), None
        )
        file.seek(0)
        if opened is None:
            yield file, url
            return
        with tempfile.TemporaryFile() as copy:
            try:
                unpacked = opened(file)
                while piece := unpacked.read(2**20):
                    copy.write(piece)
                    if copy.tell() > _MOST_BYTES:
                        raise OSError(f"it unpacks to more than {_MOST_BYTES} bytes")
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile):
                pass
            copy.seek(0)
            yield copy, url + PACKED
