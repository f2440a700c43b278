"""Read WebDataset tars without trusting them: what is whole is kept, what is torn off is told."""

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import IO

from infra import storage
from infra.data.samples import IMAGE_ENDINGS, MAX_IMAGE_BYTES, MAX_TEXT_BYTES, Sample
from infra.data.stage import FAILED, REJECTED

BLOCK = 512
CAPTION_ENDINGS = ("txt", "caption", "text")

# The convention of webdataset: the key is the path up to the first dot of the file's name.
_KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)

SampleName = tuple[str, int]  # key and occurrence
Members = dict[str, tarfile.TarInfo]


def read_tar(name: str, url: str) -> Iterator[Sample]:
    """Yield the samples of a tar in the order of their first files, one image in memory at a time.

    The files of a sample need not be neighbours. An archive whose end is missing or damaged yields one more sample,
    failed, that says so; and samples that may have lost files with it are failed as well: the last one, and those with
    fewer files than others.
    """
    with storage.local_copy(url) as file:
        samples, torn, last = _index(file)
        fullest = max(map(len, samples.values()), default=0)
        for (key, occurrence), members in samples.items():
            if torn and ((key, occurrence) == last or len(members) < fullest):
                yield Sample(key=key, occurrence=occurrence, state=FAILED, reason="cut off with its archive")
            else:
                yield _read_sample(file, url, key, occurrence, members)
    if torn:
        yield Sample(key=f"{name}#truncated", state=FAILED, reason=torn)
    elif not samples:
        yield Sample(key=f"{name}#empty", state=REJECTED, reason="the archive holds no samples")


def read_files(url: str) -> Iterator[tuple[str, int, dict[str, bytes]]]:
    """Yield key, occurrence and files of each sample of a tar, byte for byte, by their endings as they are written.

    What is no plain file, or larger than an image may be, is left out. One sample is in memory at a time.
    """
    with storage.local_copy(url) as file:
        for (key, occurrence), members in _index(file)[0].items():
            plain = [m for m in members.values() if m.isreg() and m.sparse is None and m.size <= MAX_IMAGE_BYTES]
            yield key, occurrence, {member.name[len(key) + 1 :]: _read(file, member) for member in plain}


def _index(file: IO[bytes]) -> tuple[dict[SampleName, Members], str | None, SampleName | None]:
    """The members of each sample; what is wrong with the archive's end; the sample of the last member."""
    samples: dict[SampleName, Members] = {}
    seen: Counter[tuple[str, str]] = Counter()
    last, offset, problem = None, 0, None
    size = file.seek(0, 2)
    file.seek(0)
    try:
        archive = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="replace")
        while (member := archive.next()) is not None:
            member.pax_headers = {}  # a copy of all global ones, which may be many
            if match := _KEY.fullmatch(member.name):
                key, ending = match[1], match[2].lower()
                last = (key, seen[key, ending])
                seen[key, ending] += 1
                samples.setdefault(last, {})[ending] = member
            if archive.offset <= offset:
                # A forged negative size leads tarfile in circles (CVE-2025-8194).
                problem = "a header points backwards"
                break
            offset = archive.offset
    except storage.UnavailableError:
        raise
    except Exception as error:  # whatever else a parser raises on arbitrary bytes: they are not a whole tar
        problem = " ".join(str(error).split())[:100]
    return samples, _torn(file, size, offset, problem), last


def _torn(file: IO[bytes], size: int, end: int, problem: str | None) -> str | None:
    """Why the archive is not whole, or None: tarfile takes a missing or damaged header for the end, without a word."""
    mark = bytes(2 * BLOCK)
    file.seek(min(end, size))  # a header may claim sizes that no file can have
    if problem is None and file.read(len(mark)) == mark:
        while rest := file.read(2**20):
            if rest.strip(b"\0"):
                return f"data after the end of the archive: what follows byte {end} of {size} was not read"
        return None
    file.seek(max(0, size - len(mark)))
    if end < size and file.read() == mark:
        return f"damaged archive: what follows byte {end} of {size} is lost"
    return f"truncated archive: it ends at byte {size} without an end mark"


def _read_sample(file: IO[bytes], url: str, key: str, occurrence: int, members: Members) -> Sample:
    sample = Sample(key=key, occurrence=occurrence)
    endings = [ending for ending in members if ending in IMAGE_ENDINGS]
    if key.startswith("/") or ".." in key.split("/"):
        sample.reason = "unsafe name"
    elif occurrence:
        sample.reason = "duplicate key"
    elif not endings:
        sample.reason = f"no image: there is only {', '.join(members)}"
    elif not members[endings[0]].isreg() or members[endings[0]].sparse is not None:
        sample.reason = "image is not a plain file"
    elif members[endings[0]].size > MAX_IMAGE_BYTES:
        sample.reason = f"image file too large: {members[endings[0]].size} bytes"
    if sample.reason:
        sample.state = REJECTED
        return sample
    image = members[endings[0]]
    sample.source, sample.offset, sample.length = url, image.offset_data, image.size
    sample.image = _read(file, image)
    for ending in CAPTION_ENDINGS:
        if ending in members:
            sample.caption = _read(file, members[ending], MAX_TEXT_BYTES)
            break
    if "json" in members:
        sample.meta = _read(file, members["json"], MAX_TEXT_BYTES)
    return sample


def _read(file: IO[bytes], member: tarfile.TarInfo, limit: int | None = None) -> bytes:
    """A member's bytes; one byte more than `limit` where it is longer."""
    file.seek(member.offset_data)
    return file.read(member.size if limit is None else min(member.size, limit + 1)) if member.isreg() else b""
