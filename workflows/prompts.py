"""Prompts out of a file, one after another: a text, JSONL, or what GenEval, DPG-Bench and COCO come with."""

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from json import JSONDecodeError, JSONDecoder
from typing import IO, Any

from infra import storage, strict
from infra.config import FieldError, from_dict

COCO = re.compile(r'\ufeff?\s*\{\s*"(?:annotations|categories|images|info|licenses|type)"')
GENEVAL = {"tag", "include", "prompt"}  # fields of every line of evaluation_metadata.jsonl
LOOK = 4096  # bytes by which kinds of files are told apart
PIECE = 2**20  # letters of a JSON text that are read at a time


@dataclass(frozen=True)
class Prompt:
    """A text, how a picture of it is to be drawn, and what ought to be seen there, as far as these are known."""

    text: str
    scene: str | None = None
    sample_id: str | None = None  # of the row that it is the caption of
    place: tuple[str, int] | None = None  # its shard, and its row there
    id: str | None = None  # none: its number
    seed: int | None = None  # of the first picture; those after it have the numbers after
    count: int | None = None  # pictures
    negative: str | None = None
    told: Mapping[str, Any] = field(default_factory=dict)  # columns that a prior hears beside the caption
    settings: tuple[Mapping[str, Any], ...] = ()  # what the sampling of each link has otherwise
    metadata: Mapping[str, Any] | None = None  # a benchmark's own, to go along
    line: str = ""  # where it stands, for messages


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a line of JSONL may say; `settings` is a table, or a list of them, one a link of a chain."""

    prompt: str
    id: str | int | None = None
    seed: int | None = None
    count: int | None = None
    negative: str | None = None
    told: dict[str, object] = field(default_factory=dict)
    settings: dict[str, object] | list[dict[str, object]] = field(default_factory=dict)
    metadata: dict[str, object] | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"count is of pictures, at least 1, but it is {self.count}.")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"A seed is a whole number from 0 to 2^64 - 1, but it is {self.seed}.")


def read_prompts(url: str) -> Iterator[Prompt]:
    """The prompts of a file, or of the `.txt` files of a folder; none of them stay in memory.

    ValueError names the file, and the line, of what is no prompt; FileNotFoundError where nothing is there.
    """
    if not storage.exists(url):
        raise FileNotFoundError(f"There is no file of prompts at {url}.")
    if texts := _texts(url):
        for name in texts:
            place = storage.join(url, name)
            yield Prompt(_words(storage.read_bytes(place), place), id=name.removesuffix(".txt"), line=place)
        return
    with storage.open_read(url) as file:
        begins = file.read(LOOK).decode("utf-8", "replace")
        file.seek(0)
        if COCO.match(begins):
            yield from _captions(file, url)
        elif begins.lstrip("\ufeff \t\r\n").startswith("{"):
            yield from _lines(file, url)
        elif begins.lstrip("\ufeff \t\r\n").startswith("["):
            raise ValueError(f"{url} is a list in JSON. Give JSONL: a line for each prompt, with its own braces.")
        else:
            yield from (Prompt(text, line=place) for text, place in _decoded(file, url))


def digest_of(url: str) -> str:
    """A hash of all that `read_prompts` reads of it."""
    if not storage.exists(url):
        raise FileNotFoundError(f"There is no file of prompts at {url}.")
    if not (texts := _texts(url)):
        return storage.digest(url)["sha256"]
    hashed = hashlib.sha256()
    for name in texts:
        hashed.update(strict.dumps([name, storage.digest(storage.join(url, name))["sha256"]]).encode())
    return hashed.hexdigest()


def _texts(url: str) -> list[str]:
    """The texts in a folder; none of what is a file."""
    names = storage.list_names(storage.absolute(url))  # of a file there are none
    texts = [name for name in names if name.endswith(".txt")]
    if names and not texts:
        raise ValueError(f"The folder {url} holds no .txt files, one a prompt, as DPG-Bench has them.")
    return texts


def _words(data: bytes, place: str) -> str:
    """One prompt's text; ValueError where there is none."""
    try:
        text = " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError:
        raise ValueError(f"{place} is not UTF-8.") from None
    if not text:
        raise ValueError(f"{place} is empty: a prompt is expected there.")
    return text


def _decoded(file: IO[bytes], url: str) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, and where they stand."""
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise ValueError(f"Line {number} of {url} is not UTF-8.") from None
        if text:
            yield text, f"Line {number} of {url}"


def _lines(file: IO[bytes], url: str) -> Iterator[Prompt]:
    for text, place in _decoded(file, url):
        try:
            told = json.loads(text)
        except (JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{place} is no JSON: {error}.") from None
        try:
            yield _of_geneval(told, place) if _is_geneval(told) else _of_line(from_dict(Line, told), place)
        except UnicodeEncodeError:
            raise ValueError(f"{place} has half of a surrogate pair, which is no letter.") from None
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None


def _is_geneval(told: Any) -> bool:
    return isinstance(told, dict) and told.keys() >= GENEVAL


def _of_geneval(told: dict[str, Any], place: str) -> Prompt:
    if not isinstance(told["prompt"], str):
        raise FieldError("expected a text", "prompt")
    _checked(told)
    return Prompt(told["prompt"], metadata=told, line=place)


def _of_line(line: Line, place: str) -> Prompt:
    settings = line.settings if isinstance(line.settings, list) else [line.settings] if line.settings else []
    _checked(vars(line))
    return Prompt(
        line.prompt,
        id=None if line.id is None else str(line.id),
        seed=line.seed,
        count=line.count,
        negative=line.negative,
        told=line.told,
        settings=tuple(settings),
        metadata=line.metadata,
        line=place,
    )


def _checked(told: Any) -> None:
    """UnicodeEncodeError where a text of it cannot be written."""
    strict.dumps(told, ensure_ascii=False).encode()


def _captions(file: IO[bytes], url: str) -> Iterator[Prompt]:
    """COCO's: each of the `annotations` has a `caption`, an `id`, and the `image_id` of the picture it is of."""
    for number, told in enumerate(_annotations(file, url), 1):
        place = f"Annotation {number} of {url}"
        if not isinstance(told, dict) or not isinstance(told.get("caption"), str):
            raise ValueError(f"{place} has no text `caption`: give COCO's captions, not its instances or keypoints.")
        try:
            _checked(told)
        except UnicodeEncodeError:
            raise ValueError(f"{place} has half of a surrogate pair, which is no letter.") from None
        text, own = told["caption"].strip(), told.get("id")
        yield Prompt(text, id=None if own is None else str(own), metadata=told, line=place)


def _annotations(file: IO[bytes], url: str) -> Iterator[Any]:
    """What the list `annotations` of an object in JSON holds, however long the file is."""
    text = _Text(file)
    try:
        text.skip("{")
        while text.skip('"}') == '"':
            text.at -= 1
            name = text.value()
            text.skip(":")
            if not isinstance(name, str) or text.peek() != "[":
                text.value()
            else:
                yield from (each for each in text.items() if name == "annotations")
            if text.skip(",}") == "}":
                return
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{url} is no JSON as COCO has it: {error}.") from None


class _Text:
    """A JSON text that is read in pieces; no more than one value of it is in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._text, self.at = io.TextIOWrapper(file, "utf-8-sig"), "", 0

    def peek(self) -> str:
        """The next mark, after white space; "" at the end."""
        while True:
            while self.at < len(self._text) and self._text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self._text) or not self._more():
                return self._text[self.at : self.at + 1]

    def skip(self, marks: str) -> str:
        """Pass over one of some marks, which it returns; JSONDecodeError for another."""
        if not (found := self.peek()) or found not in marks:
            raise JSONDecodeError(f"expected {' or '.join(marks)}", self._text[self.at : self.at + 40], 0)
        self.at += 1
        return found

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = JSONDecoder().raw_decode(self._text, self.at)
            except JSONDecodeError:
                if not self._more():
                    raise
                continue
            length = end - self.at
            if self._text[end : end + 1] in tuple(" \t\r\n,]}:") or not self._more():  # a number may go on
                self.at += length
                return value

    def items(self) -> Iterator[Any]:
        """The values of the list that comes next, one after another."""
        self.skip("[")
        while self.peek() != "]":
            yield self.value()
            if self.skip(",]") == "]":
                return
        self.skip("]")

    def _more(self) -> bool:
        """Read another piece, and forget what was passed over; False at the end."""
        piece = self._file.read(PIECE)
        self._text, self.at = self._text[self.at :] + piece, 0
        return bool(piece)
