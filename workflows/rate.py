"""Blind pairs for a person to judge: pictures of two models for the same prompts, or captions of the same picture."""

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from infra import storage
from infra.cluster import Cluster
from infra.data.images import decode, encode_png
from infra.data.shards import ShardReader, joined_names
from infra.metrics import Report
from infra.store import Artifact, step
from infra.train.draw import numeric_ids, uniforms
from t2i.evaluate.rating import Pair, Side, render
from workflows.compare import paired
from workflows.evaluate import reduced, styles_of
from workflows.sample import sample

PAGE, KEY = "rate.html", "key.json"
QUESTIONS = {True: "Which picture shows the prompt better?", False: "Which caption describes the picture better?"}


@dataclass(frozen=True, kw_only=True)
class RateConfig:
    """How many pairs, which, and of captions the style: one for both artifacts, or one for each."""

    count: int = 100
    seed: int = 0  # of which pairs are shown, in which order, and who stands on the left
    styles: tuple[str, ...] = ()
    question: str = ""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"At least one pair is judged, but count is {self.count}.")


class Both(NamedTuple):
    """What is judged: two pictures (encoded) or two texts, and what they are of."""

    first: bytes | str
    second: bytes | str
    prompt: str | None = None
    image: bytes | None = None


@step(version=1)
def rate(
    config: RateConfig, first: Artifact, second: Artifact | None = None, *, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Write `rate.html`, on which nothing says whose a side is, and `key.json`, which does.

    Two artifacts of `sample` for the same prompts, two of captions of the same pictures, or one of captions in two
    styles. Pairs that are equal cannot be judged: they are counted and not shown. ValueError where nothing is left.
    """
    of_pictures = first.step == sample.name
    if second is not None and (second.step == sample.name) != of_pictures:
        raise ValueError(f"Pictures are judged against pictures: {first.path} and {second.path} are of two kinds.")
    styles = _styles(config, first, second) if not of_pictures else ()
    found = _pictures(config, first, second) if of_pictures else _captions(config, first, second or first, styles)
    shown = [both for both in found if both.first != both.second]
    if not shown:
        raise ValueError(f"All {len(found)} pairs are equal: there is nothing to judge.")
    report(1, 2, "parts")
    page, rng = storage.name(out), np.random.default_rng([config.seed, len(shown)])
    pairs, marks = [], {}
    for number, (both, turned) in enumerate(zip(shown, rng.integers(2, size=len(shown)), strict=True)):
        pair = f"{number:05d}"
        marks[pair] = [_mark(page, pair, which) for which in (0, 1)]
        sides = [_side(mark, given) for mark, given in zip(marks[pair], both[:2], strict=True)]
        left, right = sides[::-1] if turned else sides
        pairs.append(Pair(id=pair, sides=(left, right), prompt=both.prompt, image=both.image))
    storage.write_bytes(
        storage.join(out, PAGE), render(page, config.question or QUESTIONS[of_pictures], pairs).encode()
    )
    told = {"page": page, "first": _called(first, styles[:1]), "second": _called(second or first, styles[1:])}
    equal = len(found) - len(shown)
    storage.write_json(storage.join(out, KEY), {**told, "equal": equal, "pairs": marks})
    return {**told, "pairs": len(pairs), "equal": equal}


def _pictures(config: RateConfig, first: Artifact, second: Artifact | None) -> list[Both]:
    if second is None:
        raise ValueError("Pictures are judged in pairs: give those of two models for the same prompts.")
    drawn, _ = paired([first, second])
    order = np.random.default_rng([config.seed]).permutation(len(drawn[0]))[: config.count]
    return [
        Both(_plain(drawn[0][place]["image"]), _plain(drawn[1][place]["image"]), drawn[0][place]["prompt"])
        for place in order
    ]


def _captions(config: RateConfig, first: Artifact, second: Artifact, styles: Sequence[str]) -> list[Both]:
    """Rows that both have captions of, those with the lowest numbers drawn for (seed, sample id)."""
    images = first.inputs[0]
    if second.inputs[0].id != images.id:
        raise ValueError(f"Captions are judged beside their picture, but {first.path} and {second.path} are of others.")
    rows = heapq.nsmallest(config.count, _rows(config.seed, images, (first, second), styles))
    pictures: dict[tuple[str, int], bytes] = {}
    for shard in sorted({row[2] for row in rows}):
        places = [row[3] for row in rows if row[2] == shard]
        stored = ShardReader([images.path], shard).rows(["image"], places)["image"]
        pictures |= {(shard, place): _plain(image) for place, image in zip(places, stored, strict=True)}
    return [Both(*texts, image=pictures[shard, place]) for _, _, shard, place, texts in rows]


def _rows(
    seed: int, images: Artifact, both: Sequence[Artifact], styles: Sequence[str]
) -> Iterator[tuple[float, str, str, int, tuple[str, str]]]:
    """Number, sample id, shard, place among the rows of the index, and both texts of each row that has them."""
    for shard in joined_names([images.path]):
        texts: list[dict[str, str | None]] = []
        for made, style in zip(both, styles, strict=True):
            columns = ShardReader([images.path, made.path], shard).columns(["sample_id", f"caption_{style}"])
            texts.append(dict(zip(*columns.values(), strict=True)))
        ids = list(ShardReader([images.path], shard).columns(["sample_id"])["sample_id"])
        numbers = uniforms(seed, np.zeros(len(ids)), numeric_ids(ids), "rate")
        for place, (name, number) in enumerate(zip(ids, numbers, strict=True)):
            one, other = (each.get(name) for each in texts)
            if one and other:
                yield float(number), name, shard, place, (one, other)


def _styles(config: RateConfig, first: Artifact, second: Artifact | None) -> tuple[str, str]:
    """The style of each side; ValueError where it is not clear, or not there."""
    there = [["alt", *styles_of(made)] for made in (first, second or first)]
    given = config.styles * 2 if second is not None and len(config.styles) == 1 else config.styles
    if not given and second is not None:
        shared = [style for style in there[0][1:] if style in there[1]]
        given = tuple(shared[-1:] * 2)
    if len(given) != 2 or (second is None and given[0] == given[1]):
        raise ValueError(
            f"Say which styles are judged: {first.path} has {', '.join(there[0])}"
            + (f" and {second.path} {', '.join(there[1])}." if second else ", of which a pair is two.")
        )
    for style, known in zip(given, there, strict=True):
        if style not in known:
            raise ValueError(f"There are no captions in the style '{style}'; there are {', '.join(known)}.")
    return given[0], given[1]


def _plain(image: bytes) -> bytes:
    """The picture without what its file says beside it: who drew it must not be read there."""
    return reduced(encode_png(decode(image)))


def _side(mark: str, given: bytes | str) -> Side:
    return Side(mark=mark, text=given) if isinstance(given, str) else Side(mark=mark, image=given)


def _mark(page: str, pair: str, which: int) -> str:
    return hashlib.sha256(f"{page} {pair} {which}".encode()).hexdigest()[:12]


def _called(made: Artifact, style: Sequence[str]) -> str:
    return " ".join([f"{made.step}/{made.id}", *style])
