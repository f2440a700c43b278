"""What the texts of a sample are worth: captions, metadata and split, each kept or null with its fault."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from infra import strict
from infra.data.samples import MAX_TEXT_BYTES
from infra.data.text import decode_text, is_blank

MAX_CAPTION_CHARACTERS = 10_000
TRAIN, TEST = "train", "test"  # splits by any other name are captioned, and neither trained on nor tested with
# What people call them, in any case of letters.
_TESTS = ("test", "testing", "val", "valid", "validation", "dev", "eval")
SPLITS: dict[str, str] = {"train": TRAIN, "training": TRAIN, **dict.fromkeys(_TESTS, TEST)}


def read_captions(captions: Sequence[Any], encoding: str = "") -> tuple[list[str], str | None]:
    """The captions that are texts, in order, and what is wrong with the first that is none."""
    texts, faults = list[str](), list[str]()
    for caption in captions:
        try:
            texts.append(read_caption(caption, encoding))
        except ValueError as error:
            faults.append(str(error))
    if not captions:
        faults.append("no caption")
    if texts and faults:
        return texts, f"{len(faults)} of {len(captions)} captions left out: {faults[0]}"
    return texts, faults[0] if faults else None


def read_caption(caption: Any, encoding: str = "") -> str:
    """The caption as text; ValueError with the reason if it cannot be one."""
    if not isinstance(caption, bytes | str):
        raise ValueError(f"caption is not text: {type(caption).__name__}")
    if len(caption) > MAX_TEXT_BYTES:
        raise ValueError(f"caption too long: more than {MAX_TEXT_BYTES:,} bytes")
    try:
        text = decode_text(caption, encoding).strip()
    except ValueError as error:
        raise ValueError(f"caption is {error}") from None
    if is_blank(text):
        raise ValueError("empty caption")
    if len(text) > MAX_CAPTION_CHARACTERS:
        raise ValueError(f"caption too long: {len(text):,} characters, of at most {MAX_CAPTION_CHARACTERS:,}")
    return text


def read_meta(
    meta: bytes | str | dict[str, Any] | None, encoding: str = ""
) -> tuple[dict[str, Any], str | None, str | None]:
    """The row's own JSON: parsed (empty where it is none), as strict JSON text, and what is wrong with it."""
    if meta is None:
        return {}, None, None
    if isinstance(meta, dict):
        meta = json.dumps(meta, default=str)
    if len(meta) > MAX_TEXT_BYTES:
        return {}, None, f"broken metadata: more than {MAX_TEXT_BYTES:,} bytes"
    try:
        text = decode_text(meta, encoding)
    except ValueError as error:
        return {}, None, f"broken metadata: {error}"
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            return {}, None, "broken metadata: not a JSON object"
        return value, strict.restated(text), None
    except (ValueError, RecursionError):
        return {}, None, "broken metadata: not JSON"


def read_split(split: Any, named: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The split that a row's metadata says, and what is wrong with it; None where it says none.

    `train` and `test` by any of their names; what `named` maps; else the name as it is, which nobody trains on or tests
    with.
    """
    name = split.strip() if isinstance(split, str) else "" if split is None or split != split else json.dumps(split)
    if not name:
        return None, None
    known = named.get(name.lower()) or SPLITS.get(name.lower())
    return (known, None) if known else (name, "unknown split")


def named_splits(told: Sequence[str]) -> dict[str, str]:
    """`("restval=train",)` as a mapping; ValueError where it is none."""
    found = dict(each.strip().lower().split("=", 1) for each in told if "=" in each)
    for name, split in found.items():
        if SPLITS.get(split) is None:
            raise ValueError(f"A split becomes train or test, but '{name}' was to become '{split}'.")
    if unclear := [each for each in told if "=" not in each]:
        raise ValueError(f"A split is named as in restval=train, but '{unclear[0]}' was found.")
    return {name: SPLITS[split] for name, split in found.items()}


def label_by_json(
    sample_id: str, meta: dict[str, Any], test_fraction: float, splits: Mapping[str, str]
) -> dict[str, str | None]:
    """Split, references and scene as the row's json has them; without a split there, one drawn by the sample's id."""
    split, fault = read_split(meta.get("split"), splits)
    if split is None:
        split = TEST if int(sample_id[:8], 16) / 2**32 < test_fraction else TRAIN
    scene = meta.get("scene")
    return {
        "split": split,
        "split_fault": fault,
        "reference_short": _text_or_none(meta.get("caption_short")),
        "reference_descriptive": _text_or_none(meta.get("caption_descriptive")),
        "scene": None if scene is None else strict.dumps(scene),
    }


def _text_or_none(value: Any) -> str | None:
    return value.strip() or None if isinstance(value, str) else None
