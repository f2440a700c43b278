"""Draw rows of a recaptioned corpus, rejected and failed ones too, and put them on a page to be looked at."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from captioner.gallery import VERDICTS, Limits, Row, fit, write_gallery
from infra import storage
from infra.data.ahead import ahead
from infra.data.images import decode, measure
from infra.data.shards import ShardReader, joined_names
from infra.data.stage import ACCEPTED, FAILED
from infra.store import Artifact
from infra.train.draw import numeric_ids, uniforms
from workflows.habits import habits

CAPTION = "caption_"
SCORES = ("logp_", "match_", "clip_", "flag_")
KEEP, KEEP_REASON, WEIGHT = "keep", "keep_reason", "weight_"  # what `mix` decided
HEAD = 4096  # bytes of a page, in which its title stands


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Which rows are shown, ascending, by shard, and how many rows of each verdict there were to draw from."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)


def gallery(
    images: Artifact,
    captions: Artifact,
    mixture: Artifact | None = None,
    *,
    out: str,
    count: int = 500,
    seed: int = 0,
    title: str = "Captions",
    edge: int = 256,
    megabytes: int = 64,
    whole: bool = True,
) -> dict[str, Any]:
    """Write the page to `out`, a path or s3:// address, and return what it holds.

    At most `count` rows are shown, drawn by (seed, sample id): as many of each verdict, as far as there are, so that
    rare failures are seen; the page says of how many they were drawn, and, with `whole`, of all accepted captions how
    alike they are and what is wrong with them, for which all are read. Images are read of the drawn rows only.
    `mixture` tells which rows are kept and how often each of their captions is read; without one every accepted row is.
    """
    check_page(out)
    limits = Limits(rows=count, edge=edge, megabytes=megabytes)
    inputs = [artifact.path for artifact in (images, captions, mixture) if artifact is not None]
    drawn, found = draw(inputs, count, seed), habits(images, captions) if whole else None
    facts = {artifact.step: artifact.id for artifact in (images, captions, mixture) if artifact is not None}
    with tempfile.NamedTemporaryFile(prefix="rescribe-", suffix=".html") as file:
        counts = write_gallery(
            read_rows(inputs, drawn, edge),
            file,
            title=title,
            summary="A draw of rows with the text that each image came with and the captions written anew.",
            facts=facts | {"Seed": str(seed)},
            totals=drawn.totals,
            collapse=found and found.collapse,
            faults=found and found.faults,
            limits=limits,
        )
        file.flush()
        storage.upload(file.name, out)
    return {"page": out, **counts, "drawn_from": drawn.totals}


def check_page(out: str) -> None:
    """ValueError where a page would stand in the place of a file of somebody else's."""
    if not storage.exists(out):
        return
    with storage.open_read(out) as file:
        ours = re.search(rb"<title>[^<]* Rescribe</title>", file.read(HEAD))
    if not ours:
        raise ValueError(f"{out} is there and is no page of Rescribe's: give --out another name, or remove it.")


def draw(inputs: list[str], count: int, seed: int) -> Drawn:
    """At most `count` rows, those of each verdict with the lowest numbers drawn for (seed, sample id).

    Memory holds the states of one shard and `count` candidates of each verdict, whatever the corpus.
    """
    totals = dict.fromkeys(VERDICTS, 0)
    best: dict[str, list[tuple[float, str, int]]] = {verdict: [] for verdict in VERDICTS}
    for name in joined_names(inputs):
        reader = ShardReader(inputs, name, every=True)
        verdicts = np.array([verdict for verdict, _ in judge(reader)], dtype=object)
        ids = numeric_ids(reader.sample_ids)
        numbers = uniforms(seed, np.zeros(len(ids)), ids, "gallery")
        for verdict in VERDICTS:
            rows = np.flatnonzero(verdicts == verdict)
            totals[verdict] += len(rows)
            lowest = rows[np.argsort(numbers[rows], kind="stable")[:count]]
            candidates = [(float(numbers[row]), name, int(row)) for row in lowest]
            best[verdict] = sorted(best[verdict] + candidates)[:count]
    chosen: dict[str, list[int]] = defaultdict(list)
    for verdict, size in shares(totals, count).items():
        for _, name, row in best[verdict][:size]:
            chosen[name].append(row)
    return Drawn(rows={name: np.array(sorted(rows)) for name, rows in sorted(chosen.items())}, totals=totals)


def shares(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """`count` divided as evenly as the sizes allow: what a small group cannot take goes to the larger ones."""
    found: dict[str, int] = {}
    for left, name in zip(range(len(sizes), 0, -1), sorted(sizes, key=lambda name: sizes[name]), strict=True):
        found[name] = min(sizes[name], (count - sum(found.values())) // left)
    return found


def judge(reader: ShardReader) -> list[tuple[str, str | None]]:
    """The verdict on each row of a shard that shows every row, and its reason: of the steps before, then of `mix`."""
    everything = np.arange(len(reader))
    mixed = {KEEP, KEEP_REASON} <= reader.names
    decided = reader.stored([KEEP, KEEP_REASON], everything) if mixed else {}
    nothing = [None] * len(everything)
    verdicts = []
    for state, reason, keep, why in zip(
        reader.states, reader.reasons, decided.get(KEEP, nothing), decided.get(KEEP_REASON, nothing), strict=True
    ):
        if state == ACCEPTED:
            verdicts.append(("rejected", why or "not kept") if keep is False else ("keep", None))
        else:
            verdicts.append(("failed" if state == FAILED else "rejected", reason))
    return verdicts


def read_rows(inputs: list[str], drawn: Drawn, edge: int) -> Iterator[Row]:
    """The drawn rows, a shard after another, their images already near the size that they are shown at."""
    for name, indices in drawn.rows.items():
        reader = ShardReader(inputs, name, every=True)
        verdicts = judge(reader)
        captions = sorted(column for column in reader.names if column.startswith(CAPTION))
        captions.sort(key=lambda column: column != f"{CAPTION}alt")  # the text that came with the image goes first
        scores = sorted(column for column in reader.names if column.startswith(SCORES))
        weights = sorted(column for column in reader.names if column.startswith(WEIGHT))
        keys = ["key"] if "key" in reader.names else []
        columns = reader.stored([*captions, *scores, *weights, *keys], indices)
        pictures = ahead(partial(_shrunk, edge=edge), reader.images(indices), threads=4, depth=8)
        for place, (row, image) in enumerate(zip(indices, pictures, strict=True)):
            verdict, reason = verdicts[row]
            yield Row(
                sample_id=reader.sample_ids[row],
                key=columns["key"][place] if keys else None,
                image=image,
                captions={column.removeprefix(CAPTION): columns[column][place] for column in captions},
                scores={column: columns[column][place] for column in scores},
                read={column.removeprefix(WEIGHT): columns[column][place] for column in weights},
                state=reader.states[row],
                verdict=verdict,
                reason=reason,
            )


def _shrunk(image: bytes | Exception, edge: int) -> np.ndarray | Exception:
    """The picture of at most `edge` pixels a side, or why there is none: the page is for bad rows too."""
    if isinstance(image, Exception):
        return image
    try:
        height, width = measure(image)
        size = fit(height, width, edge)
        return decode(image, None if size == (height, width) else size)
    except ValueError as error:
        return error
