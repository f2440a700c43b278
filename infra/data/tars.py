"""Read WebDataset tars without trusting them: what is whole is kept, what is torn off is told."""

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import IO

from infra import storage
from infra.data.fields import captions_of_json
from infra.data.formats import kind_of
from infra.data.listing import is_hidden
from infra.data.packed import plain_copy
from infra.data.pictures import base_of, is_image, is_part, main_picture
from infra.data.samples import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, Reading, Sample
from infra.data.stage import FAILED, REJECTED

BLOCK = 512
CAPTION_ENDINGS = ("txt", "caption", "text", "caption.txt", "text.txt", "prompt.txt")  # in this order

# The convention of webdataset: the key is the path up to the first dot of the file's name.
_KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)

SampleName = tuple[str, int]  # key and occurrence
Members = dict[str, tarfile.TarInfo]


def read_tar(name: str, url: str, reading: Reading = Reading()) -> Iterator[Sample]:  # noqa: B008 - frozen
    """Yield the samples of a tar in the order of their first files, one image in memory at a time.

    The files of a sample have one key, up to the first dot of their names. Where two pictures with different names have
    one key, and no file is called by the key alone, the names are the keys: `v1.0.jpg` and `v1.1.jpg` are two samples.

    The files of a sample need not be neighbours. An archive whose end is missing or damaged yields one more sample,
    failed, that says so; and samples that may have lost files with it are failed as well: the last one, and those with
    fewer files than others.
    """
    with plain_copy(url) as (file, source):
        samples, torn, last = _index(file)
        fullest = max(map(len, samples.values()), default=0)
        for (key, occurrence), members in samples.items():
            if torn and ((key, occurrence) == last or len(members) < fullest):
                yield Sample(key=key, occurrence=occurrence, state=FAILED, reason="cut off with its archive")
            else:
                yield _read_sample(file, source, key, occurrence, members, reading)
    if torn:
        yield Sample(key=f"{name}#truncated", state=FAILED, reason=torn)
    elif not samples:
        yield Sample(key=f"{name}#empty", state=REJECTED, reason="the archive holds no samples")


def read_files(url: str) -> Iterator[tuple[str, int, dict[str, bytes]]]:
    """Yield key, occurrence and files of each sample of a tar, byte for byte, by their endings as they are written.

    What is no plain file, or larger than an image may be, is left out. One sample is in memory at a time.
    """
    with plain_copy(url) as (file, _):
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
            if (match := _KEY.fullmatch(member.name)) and not is_hidden(member.name):
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
    if not offset and (kind := _named(file)):
        return {}, f"not a tar: it is {kind}", None
    samples, last = _apart(samples, last)
    return samples, _torn(file, size, offset, problem), last


def _named(file: IO[bytes]) -> str | None:
    file.seek(0)
    return kind_of(file.read(512))


def _apart(
    samples: dict[SampleName, Members], last: SampleName | None
) -> tuple[dict[SampleName, Members], SampleName | None]:
    """Samples whose keys have dots, taken from the heap that the first dot makes of them."""
    found: dict[SampleName, Members] = {}
    for (key, occurrence), members in samples.items():
        stems = {ending: ending.rpartition(".")[0] for ending in members}
        pictures = {stem for ending, stem in stems.items() if is_image(f".{ending}") and not is_part(ending)}
        if "" in stems.values() or not pictures or (len(pictures) == 1 and {*stems.values()} != pictures):
            found[key, occurrence] = members
            continue
        for ending, member in members.items():
            stem, _, kind = ending.rpartition(".")
            of = max((each for each in pictures if f"{stem}.".startswith(f"{each}.")), key=len, default=stem)
            name = (f"{key}.{of}", occurrence)
            found.setdefault(name, {})[ending[len(of) + 1 :] if of != stem else kind] = member
            last = name if last == (key, occurrence) else last
    keys = {key for key, _ in found}
    for key, occurrence in list(found):
        members = found[key, occurrence]
        base = base_of(key, keys - {key}) if all(is_image(f".{ending}") for ending in members) else None
        if base and (base, occurrence) in found:  # `dog_mask.png` beside `dog.jpg`
            del found[key, occurrence]
            found[base, occurrence] |= {f"{key[len(base) + 1 :]}.{ending}": each for ending, each in members.items()}
            last = (base, occurrence) if last == (key, occurrence) else last
    return found, last


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


def _read_sample(file: IO[bytes], url: str, key: str, occurrence: int, members: Members, reading: Reading) -> Sample:
    sample = Sample(key=key, occurrence=occurrence)
    picture = main_picture(members, reading.image_part)
    if key.startswith("/") or ".." in key.split("/"):
        sample.reason = "unsafe name"
    elif occurrence:
        sample.reason = "duplicate key"
    elif picture is None:
        sample.reason = f"no image: there is only {', '.join(members)}"
    elif not members[picture].isreg() or members[picture].sparse is not None:
        sample.reason = "image is not a plain file"
    elif members[picture].size > MAX_IMAGE_BYTES:
        sample.reason = f"image file too large: {members[picture].size} bytes"
    if sample.reason or picture is None:
        sample.state = REJECTED
        return sample
    image = members[picture]
    wanted = {part: members[part] for part in reading.parts if part in members}
    sample.parts = {part: _read(file, member) for part, member in wanted.items() if member.size <= MAX_IMAGE_BYTES}
    unread = members.keys() - {picture, *sample.parts}
    sample.others = [ending for ending in members if ending in unread and is_image(f".{ending}")]
    sample.source, sample.offset, sample.length = url, image.offset_data, image.size
    sample.image = _read(file, image)
    if "json" in members:
        sample.meta = _read(file, members["json"], MAX_TEXT_BYTES)
    if reading.caption_field:
        sample.captions = captions_of_json(sample.meta or b"", reading.caption_field, reading.encoding)
    text = next((ending for ending in CAPTION_ENDINGS if ending in members), None)
    if text and not sample.captions:
        sample.captions = [_read(file, members[text], MAX_TEXT_BYTES)]
    if not sample.captions and sample.meta is not None:
        sample.captions = captions_of_json(sample.meta, None, reading.encoding)
    return sample


def _read(file: IO[bytes], member: tarfile.TarInfo, limit: int | None = None) -> bytes:
    """A member's bytes; one byte more than `limit` where it is longer."""
    file.seek(member.offset_data)
    return file.read(member.size if limit is None else min(member.size, limit + 1)) if member.isreg() else b""
