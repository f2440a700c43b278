"""What an export tells of a row: whose it is, its captions, and all that is known of each."""

import json
from typing import Any

import numpy as np
import pyarrow as pa

from captioner.provenance import PROVENANCE
from infra import strict
from infra.data.shards import ShardReader

CAPTION, ALT = "caption_", "alt"
FAULT = "alt_fault"
INDEX = (FAULT, "width", "height", "sha256", "split", "split_fault", "meta", "meta_fault")
ALTS = "captions_alt"  # all texts that a picture came with, where a corpus has several of one
SCORES = {"weight": "weights_alt", "logp": "logps_alt", "match": "matches_alt", "clip": "clips_alt"}  # of each of these
MIXED = ("keep", "keep_reason")
TEXTS = ("caption", "flag", "keep_reason")
SOURCE = ("source_name", "key")  # the file within the corpus that a sample came in, and its key there
# The types of columns that a shard without an accepted row may not know.
TYPES = {"tries": pa.int64(), "attempt": pa.int64(), "weight": pa.float32(), "logp": pa.float64()}
TYPES |= {"match": pa.float64(), "clip": pa.float64(), "clip_cut": pa.bool_(), "keep": pa.bool_()}


def styles_of(columns: set[str]) -> list[str]:
    """The styles that columns hold captions of, the alt text apart."""
    return sorted(name.removeprefix(CAPTION) for name in columns if name.startswith(CAPTION) and name != CAPTION + ALT)


def _kind_of(column: str, styles: list[str]) -> tuple[str, str] | None:
    """`logp_short` is of the kind logp and the style short; None for a column of no style."""
    fitting = [style for style in styles if column.endswith(f"_{style}")]
    style = max(fitting, key=len, default="")
    return (column.removesuffix(f"_{style}"), style) if style else None


def _columns(reader: ShardReader) -> list[str]:
    """What is told of a row, in the order of a reader's interest."""
    styles = [ALT, *styles_of(reader.names)]
    kinds = ["caption", "weight", "flag", "logp", "match", "clip", "clip_cut", "tries", "attempt", PROVENANCE]
    wanted = [f"{kind}_{style}" for kind in kinds for style in styles]
    return [name for name in (*INDEX, *MIXED, *wanted) if name in reader.names]


def table_of(reader: ShardReader, rows: np.ndarray, names: pa.Table, several: bool, text: str = "") -> pa.Table:
    """Some rows with all that an export tells of them; `names` are the source and key of every row.

    Where one style is the `text` of a picture, what is wrong with the alt text is told beside that alone.
    """
    ids = {"sample_id": reader.sample_ids, "state": reader.states, "reason": reader.reasons}
    table = pa.table({name: pa.array([values[row] for row in rows], pa.string()) for name, values in ids.items()})
    for name in SOURCE:
        table = table.append_column(name, names[name].take(rows))
    if several:
        types = {ALTS: pa.string()} | {name: TYPES[kind] for kind, name in SCORES.items()}
        for name, values in _alts(reader, rows).items():
            table = table.append_column(name, pa.array(values, pa.list_(types[name])))
    told = [name for name in _columns(reader) if name != FAULT or text in ("", ALT)]
    stored = reader.table(told, rows)
    styles = [ALT, *styles_of(reader.names)]
    for name in stored.column_names:
        kind = (_kind_of(name, styles) or (name, ""))[0]
        column = stored[name]
        if name == "meta":  # others may have written NaN
            column = pa.array([text and strict.restated(text) for text in column.to_pylist()], pa.string())
        table = table.append_column(
            name, column.cast(TYPES.get(kind, pa.string())) if pa.types.is_null(column.type) else column
        )
    return table


def scores_of(columns: set[str]) -> dict[str, str]:
    """Where scores of all texts that a picture came with are written, by the columns that have those of the first."""
    return {f"{kind}_{ALT}": name for kind, name in SCORES.items() if f"{kind}_{ALT}" in columns}


def _alts(reader: ShardReader, rows: np.ndarray) -> dict[str, list[list[Any]]]:
    """All texts that each row's picture came with, in order, and as many of each score; null where there is none."""

    def listed(first: str, every: str) -> list[list[Any]]:
        table = reader.table([first, every + "?"], rows)
        pairs = zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
        return [[one] if each is None else each for one, each in pairs]

    texts = [[] if each in ([None], [""]) else each for each in listed(CAPTION + ALT, ALTS)]
    told: dict[str, list[list[Any]]] = {ALTS: texts}
    for first, every in scores_of(reader.names).items():
        pairs = zip(texts, listed(first, every), strict=True)
        told[every] = [(values + [None] * len(own))[: len(own)] for own, values in pairs]
    return told


def told_of(reader: ShardReader, several: bool) -> list[dict[str, Any]]:
    """For each row what `captions.json` says: its id, its state, and of each caption all that is known.

    A text that is not there is "", for readers that take the type of a field from the first rows that they meet.
    """
    styles = [ALT, *styles_of(reader.names)]
    names = [name for name in _columns(reader) if name in MIXED or _kind_of(name, styles)]
    stored = reader.stored(names, np.arange(len(reader)))
    alts, told = _alts(reader, np.arange(len(reader))) if several else {}, []
    for row, sample_id in enumerate(reader.sample_ids):
        said: dict[str, Any] = {
            "sample_id": sample_id,
            "state": reader.states[row],
            "reason": reader.reasons[row] or "",
        }
        captions: dict[str, dict[str, Any]] = {style: {} for style in styles}
        for name in names:
            kind, style = _kind_of(name, styles) or (name, "")
            value = stored[name][row]
            if kind == PROVENANCE:
                value = json.loads(value) if value else None
            elif kind in TEXTS:
                value = value or ""
            (captions[style] if style else said)[kind] = value
        told.append(said | {"captions": captions} | {name: each[row] for name, each in alts.items()})
    return told
