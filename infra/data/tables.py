"""Tables that speak of pictures: CSV of any dialect, JSONL, and JSON lists; what a row does not say clearly is told."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.data.plain import is_plain
from infra.data.text import decode_text, guess_encoding

TABLE_ENDINGS = ("jsonl", "ndjson", "csv", "tsv", "psv", "parquet", "txt", "json")
FILE_NAMES = (
    *("file_name", "filename", "file", "filepath", "file_path", "image_path", "img_path", "path"),
    *("image", "img", "image_name", "image_file", "picture", "photo"),
)
_DELIMITERS = ",\t;|"
_LOOK = 200  # rows by which a dialect is judged
_MOST_BYTES = 2**30  # a table is held in memory


class NotATableError(ValueError):
    """The file does not speak of pictures, or not clearly; the text says why."""


@dataclass(frozen=True)
class Row:
    """One row: the file that it names, its fields, and what is wrong with it, if anything is."""

    number: int  # from 1
    file: str | None
    fields: dict[str, Any]
    fault: str | None = None


def read_table(file: storage.File, file_column: str | None = None, encoding: str = "") -> list[Row]:
    """All rows of a table. NotATableError where no column names files, or the dialect is not certain."""
    if file.size > _MOST_BYTES:
        raise NotATableError(f"larger than {_MOST_BYTES} bytes")
    data, ending = storage.read_bytes(file.url), storage.name(file.url).rsplit(".", 1)[-1].lower()
    if ending == "parquet":
        rows = list(_columns(data, file_column))
    elif ending in ("jsonl", "ndjson"):
        rows = list(_lines(data, file_column, encoding))
    elif ending == "json":
        rows = list(_records(data, file_column, encoding))
    else:
        rows = list(_cells(_text(data, encoding), file_column))
    if not any(row.file for row in rows):
        raise NotATableError("no column names pictures" if rows else "it has no rows")
    return rows


def _text(data: bytes, encoding: str) -> str:
    try:
        return decode_text(data, encoding)
    except ValueError:
        # What is not UTF-8 becomes lone surrogates: a file name finds its file by them, a caption is refused for them.
        return data.decode(guess_encoding(data), errors="surrogateescape")


def _named(fields: dict[str, Any], file_column: str | None) -> str | None:
    """The file that a record names: a text, or the path of a record such as `datasets` writes."""
    lowered = {name.strip().lower(): value for name, value in fields.items()}
    for name in [file_column.lower()] if file_column else FILE_NAMES:
        value = lowered.get(name)
        value = value.get("path") if isinstance(value, dict) else value
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None


def _row(number: int, fields: Any, file_column: str | None) -> Row:
    if not isinstance(fields, dict):
        return Row(number, None, {}, "broken row: not a JSON object")
    file = _named(fields, file_column)
    return Row(number, file, fields, None if file else "broken row: it names no file")


def _columns(data: bytes, file_column: str | None) -> Iterator[Row]:
    try:
        schema = pq.read_schema(pa.BufferReader(data))
        names = [each.name for each in schema if is_plain(each.type) and not pa.types.is_binary(each.type)]
        rows = pq.read_table(pa.BufferReader(data), columns=names, use_threads=False).to_pylist()
    except Exception as error:  # pyarrow raises all sorts on broken files
        raise NotATableError(f"it is broken: {' '.join(str(error).split())[:100]}") from None
    for number, fields in enumerate(rows, start=1):
        yield _row(number, fields, file_column)


def _lines(data: bytes, file_column: str | None, encoding: str) -> Iterator[Row]:
    guess = guess_encoding(data)
    lines = data.splitlines() if guess == "utf-8" else [line.encode() for line in _text(data, encoding).splitlines()]
    for number, line in enumerate(lines, start=1):
        try:
            text = decode_text(line, encoding)
            yield (
                _row(number, json.loads(text), file_column)
                if text.strip()
                else Row(number, None, {}, "broken row: an empty line")
            )
        except (ValueError, RecursionError):  # not JSON, or not UTF-8
            yield Row(number, None, {}, "broken row: not JSON")


def _records(data: bytes, file_column: str | None, encoding: str) -> Iterator[Row]:
    """A list of records; or those of COCO and of Karpathy's splits, under `images`, with `annotations` by image."""
    try:
        found = json.loads(decode_text(data, encoding))
    except (ValueError, RecursionError):
        raise NotATableError("it is not JSON") from None
    texts: dict[Any, list[Any]] = {}
    if isinstance(found, dict):
        notes = found.get("annotations")
        for note in notes if isinstance(notes, list) else []:
            if isinstance(note, dict) and isinstance(note.get("caption"), str):
                texts.setdefault(note.get("image_id"), []).append(note["caption"])
        found = found.get("images")
    if not isinstance(found, list):
        raise NotATableError("it holds no list of records")
    for number, each in enumerate(found, start=1):
        row = _row(number, each, file_column)
        if row.file and row.fields.get("id") in texts:
            row.fields["captions"] = texts[row.fields["id"]]
        folder = row.fields.get("filepath") if isinstance(row.fields.get("filename"), str) else None
        if isinstance(folder, str):  # Karpathy's: a folder and a name
            row = Row(number, f"{folder}/{row.fields['filename']}", row.fields)
        yield row


def _cells(text: str, file_column: str | None) -> Iterator[Row]:
    dialect, header = _dialect(text, file_column)
    names = [name.strip() for name in header]
    for number, cells in enumerate(_parse(text, dialect), start=0):
        if number == 0 or not cells:  # the header, or an empty line
            continue
        if isinstance(cells, str):
            yield Row(number, None, {}, f"broken row: {cells}")
            continue
        values = [cell.strip() for cell in cells] if dialect == "|" else cells
        fields = dict(zip(names, values, strict=False))
        row = _row(number, {name: value for name, value in fields.items() if name}, file_column)
        if len(cells) != len(names):
            fault = f"broken row: {len(cells)} fields where the header has {len(names)}"
            row = Row(number, row.file, {}, fault)
        yield row


def _dialect(text: str, file_column: str | None) -> tuple[str, list[str]]:
    """What divides the cells, and the header; NotATableError where that is not certain, or no cell names files."""
    fitting: list[tuple[bool, str, list[str]]] = []
    for delimiter in _DELIMITERS:
        rows = _parse(text, delimiter)
        header = list(first) if not isinstance(first := next(rows, []), str) else first
        if isinstance(header, str):
            raise NotATableError(f"not a readable table: {header}")
        names = {name.strip().lower() for name in header}
        if len(header) < 2 or not names & {file_column.lower() if file_column else "", *FILE_NAMES}:
            continue
        if len(names) < len(header):
            raise NotATableError("two columns of its header have one name")
        widths = [len(cells) for _, cells in zip(range(_LOOK), rows, strict=False) if cells and isinstance(cells, list)]
        fitting.append((widths.count(len(header)) * 2 > len(widths), delimiter, header))
    if len(fitting) > 1:  # the header may be read in several ways, the rows only in one
        fitting = [each for each in fitting if each[0]]
    if len(fitting) > 1:
        raise NotATableError("what divides its cells is not certain")
    if not fitting:
        raise NotATableError("no column of its header names files")
    return fitting[0][1:]


def _parse(text: str, delimiter: str) -> Iterator[Sequence[str] | str]:
    """The cells of each line; a text says what is wrong with a line."""
    # Bars and tabs divide plain text, in which a quotation mark stands for itself unless a cell begins with one.
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    while True:
        try:
            yield next(table)
        except StopIteration:
            return
        except csv.Error as error:
            yield str(error)
