"""Where a record keeps its captions: a table's row, a row's JSON, a Parquet record, in the field's own habits."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from infra.data.text import decode_text

# Names of columns and fields, in this order: the first that holds a text counts.
CAPTION_NAMES = (
    *("caption", "text", "txt", "alt_text", "alt", "description"),
    *("title", "prompt", "comment", "captions", "texts", "prompts", "sentences", "raw", "conversations"),
)
_WITHIN = ("raw", "caption", "text", "value", "content")  # of a caption that is a record itself
_ANSWERS = ("gpt", "assistant")

Texts = list[bytes | str]


def split_captions(record: Mapping[str, Any], named: str | None = None) -> tuple[list[Any], dict[str, Any]]:
    """The captions of a record, in order, and its other fields.

    `named` is a field's name, or a path into it (`meta.captions.0`); else the first of CAPTION_NAMES, in any case of
    letters, that holds a text. What is there and is no text is given as it is, for others to say so.
    """
    lowered = {str(name).strip().lower(): name for name in record}
    wanted = [named.lower()] if named else CAPTION_NAMES
    present = [lowered[name] for name in wanted if name in lowered and not _is_null(record[lowered[name]])]
    found = next((name for name in present if texts_in(record[name])), present[0] if present else None)
    if found is not None:
        rest = {name: value for name, value in record.items() if name != found}
        return texts_in(record[found]) or [record[found]], rest
    value = follow(record, named) if named else None
    return ([] if _is_null(value) else texts_in(value) or [value]), dict(record)


def captions_of_json(data: Any, named: str | None = None, encoding: str = "") -> list[Any]:
    """The captions that a sample's JSON holds: a record, or a list of texts; none where it is no JSON."""
    try:
        value = json.loads(decode_text(data, encoding))
    except (ValueError, RecursionError):
        return []
    if isinstance(value, dict):
        return split_captions(value, named)[0]
    return texts_in(value) if isinstance(value, list) and not named else []


def texts_in(value: Any) -> Texts:
    """The texts of a caption's field: one, several in a list, `{raw: ...}` of COCO, the first answer of a talk."""
    if isinstance(value, bytes | str):
        return [value] if value.strip() else []
    if isinstance(value, Mapping):
        within = (value[name] for name in _WITHIN if name in value)
        if found := next((texts for each in within if (texts := texts_in(each))), None):
            return found
        # By language: `{"en": ..., "de": ...}`.
        return list(value.values()) if all(isinstance(each, str) and each.strip() for each in value.values()) else []
    if isinstance(value, Sequence):
        if said := [turn for turn in value if isinstance(turn, Mapping) and ("from" in turn or "role" in turn)]:
            answers = [turn for turn in said if turn.get("from", turn.get("role")) in _ANSWERS]
            return texts_in(answers[0]) if answers else []
        return [text for each in value for text in texts_in(each)]
    return []


def follow(record: Any, path: str) -> Any:
    """What stands at a dotted path; None where nothing does."""
    for part in path.split("."):
        if isinstance(record, Mapping):
            record = record.get(part)
        elif isinstance(record, list | tuple) and part.isdigit() and int(part) < len(record):
            record = record[int(part)]
        else:
            return None
    return record


def _is_null(value: Any) -> bool:
    return value is None or value != value  # NaN is what tables write for nothing
