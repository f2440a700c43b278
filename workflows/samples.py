"""Pictures that were drawn, read back one after another; and where they are few, files and a sheet to look at."""

import math
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from infra import storage, strict
from infra.artifact import MANIFEST, OWN_ROWS, Artifact
from infra.data.ahead import ahead
from infra.data.images import decode, encode_png
from infra.data.shards import ShardReader, shard_names
from t2i.pixels import sheet

SAMPLES, IMAGES, GRID = "samples.json", "images", "grid.png"
FEW = 4096  # pictures that lie as files, too
SHOWN = 64  # of them, on the sheet
AT_ONCE = 64  # rows that are read
COLUMNS = ("sample_id", "prompt", "prompt_id", "prompt_number", "picture", "seed", "scene", "corpus_id", "metadata")


def read_samples(samples: Artifact) -> Iterator[dict[str, Any]]:
    """What `sample` drew, in the order of the prompts: `prompt`, `image` (PNG), `scene` (JSON, or None), `sample_id`.

    The sample id is that of the row that the prompt is the caption of, if it is one. `number` counts pictures,
    `prompt_number` prompts, and `picture` those of a prompt, each from 0; `prompt_id` and `metadata` (JSON) are what
    the file of prompts says. Those of version 3 tell their `seed`, too.
    """
    if samples.has_own_rows:
        yield from drawn_in(samples.path)
        return
    for number, row in enumerate(storage.read_json(samples.url(SAMPLES))):
        known = {"scene": None, "sample_id": None, "prompt_number": number, "picture": 0, "metadata": None}
        known |= {"number": number, "prompt_id": f"{number:05d}"}
        yield {**known, **row, "image": storage.read_bytes(samples.url(row["image"]))}


def drawn_in(path: str) -> Iterator[dict[str, Any]]:
    """What `read_samples` gives, of the folder of an artifact that may not be finished."""
    for name in shard_names(path):
        reader = ShardReader([storage.join(path, OWN_ROWS), path], name)
        for start in range(0, len(reader), AT_ONCE):
            columns = reader.stored([*COLUMNS, "image"], np.arange(start, min(start + AT_ONCE, len(reader))))
            for values in zip(*columns.values(), strict=True):
                row = dict(zip(columns, values, strict=True))
                yield row | {"number": int(row["sample_id"]), "sample_id": row.pop("corpus_id")}


def check_folder(out: str) -> None:
    """ValueError where a folder holds other things than pictures that `show` wrote there."""
    there = storage.list_names(storage.absolute(out))
    if there and (SAMPLES not in there or MANIFEST in there):
        raise ValueError(f"{out} holds other things, such as {there[0]}. Give a folder of its own for the pictures.")


def show(path: str, out: str = "", images: str = IMAGES) -> None:
    """Write the pictures of an artifact as files into it, or `out`, a list of them and a sheet of the first.

    Those that were shown there before make room.
    """
    out = out or path
    for name in storage.list_names(out) if not images else []:
        if re.fullmatch(r"\d{5,}\.png", name):
            storage.remove(storage.join(out, name))

    def write(row: dict[str, Any]) -> dict[str, Any]:
        name = f"{images}/{row['number']:05d}.png".lstrip("/")
        storage.write_bytes(storage.join(out, name), row["image"])
        return {"prompt": row["prompt"], "image": name} | {key: row[key] for key in ("scene", "sample_id", "seed")}

    listed = list(ahead(write, drawn_in(path), threads=8, depth=32))
    storage.write_bytes(storage.join(out, SAMPLES), strict.dumps(listed, indent=1).encode())
    first = [decode(row["image"]) for row in islice(drawn_in(path), SHOWN)]
    storage.write_bytes(storage.join(out, GRID), encode_png(sheet(first, math.ceil(math.sqrt(len(first))))))
