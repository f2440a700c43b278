"""A file of an object store as a Python file."""

import io
from typing import Any

from infra.trouble import UnavailableError, explained


class Remote(io.RawIOBase):
    """A file on S3 to read and seek in, whose errors are sentences; each piece is of the file that was opened."""

    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def readinto(self, buffer: Any) -> int:
        with explained(self._url, local=False):
            place = self._file.tell()
            data = self._file.read(len(buffer))
        if len(data) < min(len(buffer), self._file.size - place):
            raise UnavailableError(f"{self._url} broke off at byte {place + len(data)} of {self._file.size}.")
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
