"""Scenes of simple shapes: said in words, read back from words or pixels, and scored exactly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

RGB = tuple[int, int, int]

# Five shapes that stay apart at seven pixels; each is a polygon in the box [-1, 1] x [-1, 1], y pointing down.
_ANGLES = np.linspace(0, 2 * np.pi, 48, endpoint=False)
_ARM = 0.34  # half the width of the cross's arms
OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": tuple((float(np.cos(a)), float(np.sin(a))) for a in _ANGLES),
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)),
    "diamond": ((0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)),
    "cross": (
        *((-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM)),
        *((_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM)),
    ),
}
COLORS: dict[str, RGB] = {
    "red": (215, 25, 35),
    "orange": (245, 120, 10),
    "yellow": (250, 225, 40),
    "green": (40, 160, 60),
    "cyan": (60, 210, 220),
    "blue": (40, 70, 210),
    "purple": (130, 45, 180),
    "pink": (250, 130, 190),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
    "brown": (110, 75, 45),
}
SIZES: dict[str, float] = {"small": 0.5, "large": 0.85}  # radius over half the shorter side of a cell
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
SHAPES = tuple(OUTLINES)
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
ATTRIBUTES = ("shape", "color", "size", "place")
UNKNOWN = "unknown"  # what the reader calls something that is there but is nothing it knows
# The facts that a caption of each style is asked for.
STYLES = {"short": ("shape", "color"), "descriptive": (*ATTRIBUTES, "background")}


@dataclass(frozen=True)
class Thing:
    """One object of a scene; the reader may leave an attribute `UNKNOWN`."""

    shape: str
    color: str
    size: str
    place: str

    def __post_init__(self) -> None:
        for name, known in (("shape", SHAPES), ("color", tuple(COLORS)), ("size", tuple(SIZES)), ("place", PLACES)):
            value = getattr(self, name)
            if value not in known and (value != UNKNOWN or name == "place"):
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")


@dataclass(frozen=True)
class Scene:
    """Objects in distinct places on a plain background; objects are kept in the order of `PLACES`."""

    objects: tuple[Thing, ...]
    background: str

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS and self.background != UNKNOWN:
            raise ValueError(f"background is {self.background!r}; it must be one of {', '.join(BACKGROUNDS)}.")
        ordered = tuple(sorted(self.objects, key=lambda thing: PLACES.index(thing.place)))
        if len({thing.place for thing in ordered}) < len(ordered):
            raise ValueError(f"Two objects share a place: {', '.join(thing.place for thing in ordered)}.")
        object.__setattr__(self, "objects", ordered)

    def to_dict(self) -> dict[str, Any]:
        """The scene as JSON holds it."""
        return asdict(self) | {"objects": [asdict(thing) for thing in self.objects]}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Scene:
        """The scene that `to_dict` was made of; ValueError for words outside the vocabulary."""
        return Scene(tuple(Thing(**thing) for thing in values["objects"]), values["background"])


@dataclass(frozen=True)
class ParsedThing:
    """One object that a caption speaks of: any words of the vocabulary, None where it is silent."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class ParsedScene:
    """What a caption says, in its own order; objects may be many, and places may repeat."""

    objects: tuple[ParsedThing, ...] = ()
    background: str | None = None


def describe(scene: Scene, style: str = "descriptive") -> str:
    """The reference caption of a scene.

    "descriptive": a large red circle at the top left, a small blue square at the bottom right, on a white background
    "short":       a red circle and a blue square
    """
    if style not in STYLES:
        raise ValueError(f"Style is {style!r}; it must be one of {', '.join(STYLES)}.")
    facts = STYLES[style]
    things = tuple(
        ParsedThing(**{name: getattr(thing, name) for name in ATTRIBUTES if name in facts}) for thing in scene.objects
    )
    return phrase(ParsedScene(things, scene.background if "background" in facts else None))


def phrase(said: ParsedScene) -> str:
    """The caption that says just this, leaving out what is None."""
    clauses = []
    for thing in said.objects:
        words = " ".join(word for word in (thing.size, thing.color, thing.shape or "object") if word)
        clauses.append(f"{_with_article(words)}{f' at the {thing.place}' if thing.place else ''}")
    if said.background:
        clauses.append(f"on {_with_article(said.background)} background")
    elif len(clauses) > 1:
        clauses[-2:] = [f"{clauses[-2]} and {clauses[-1]}"]
    return ", ".join(clauses)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


_SAME = {"grey": "gray", "big": "large", "little": "small", "tiny": "small", "upper": "top", "lower": "bottom"}
_NOUNS = {word: word for word in SHAPES} | dict.fromkeys(("object", "shape", "thing"))
_NOUNS |= {word + ("es" if word.endswith("s") else "s"): shape for word, shape in _NOUNS.items()}
_BREAKS = {"a", "an", "and", "on", "with", "in"}  # words before which an object ends, though its noun be missing


def parse(caption: str | None) -> ParsedScene:
    """What a caption says of a scene, read from any text; it never raises, and junk words say nothing.

    A noun takes the size and colour before it, and the first place after it (or, where none follows, before it).
    A colour without a noun is an object without a shape; a colour before "background" is the background's.
    Of two colours, sizes or places said of one object only one counts, so listing them all gains nothing.
    """
    things: list[dict[str, str | None]] = []
    pending: dict[str, str | None] = {}
    background = row = column = None

    def finish(shape: str | None) -> None:
        things.append({"shape": shape, **pending})
        pending.clear()

    for word in re.findall("[a-z]+", caption.lower() if isinstance(caption, str) else ""):
        word = _SAME.get(word, word)
        if word in _NOUNS:
            finish(_NOUNS[word])
            row = column = None
        elif word in COLORS or word in BACKGROUNDS:
            pending["color"] = word
        elif word in SIZES:
            pending["size"] = word
        elif word == "background":
            background = background or pending.get("color")
            pending.clear()
        elif word in _BREAKS and "color" in pending:
            finish(None)
        elif word in ROWS:
            row = word
        elif word in COLUMNS:
            column = word
        if row and column:
            if "color" in pending:
                finish(None)
            owner = things[-1] if things and things[-1].get("place") is None else pending
            owner["place"] = f"{row} {column}"
            row = column = None
    if "color" in pending:
        finish(None)
    return ParsedScene(tuple(ParsedThing(**thing) for thing in things), background)


def caption_scores(
    captions: Sequence[str | None], scenes: Sequence[Scene], style: str = "descriptive"
) -> dict[str, float]:
    """Precision, recall and F1 of the facts that captions state about their scenes, summed over all `caption_facts`.

    Precision divides the right facts by all facts said, so that a wrong, an extra or a repeated object costs; recall
    divides them by all facts true, so that silence costs. Without right facts all three are 0.
    """
    right, said, true = (int(count) for count in caption_facts(captions, scenes, style).sum(0))
    return {
        "precision": right / max(said, 1),
        "recall": right / max(true, 1),
        "f1": 2 * right / max(said + true, 1),
    }


def caption_facts(captions: Sequence[str | None], scenes: Sequence[Scene], style: str = "descriptive") -> np.ndarray:
    """(N, 3) of each caption: facts that are right, that are said, and that are true of its scene.

    A fact is one attribute of one object (shape, color, size, place) or the background; "short" counts shape and color
    only. A caption's objects are paired one to one with the scene's so that most facts agree, and a pair's equal
    attributes are the right facts.
    """
    if not scenes or len(captions) != len(scenes):
        raise ValueError(f"Scores need a caption for each scene; found {len(captions)} captions, {len(scenes)} scenes.")
    if style not in STYLES:
        raise ValueError(f"Style is {style!r}; it must be one of {', '.join(STYLES)}.")
    names = [name for name in ATTRIBUTES if name in STYLES[style]]
    counts = np.zeros((len(scenes), 3), int)
    for count, caption, scene in zip(counts, captions, scenes, strict=True):
        parsed = parse(caption)
        count += (
            _agreeing(parsed.objects, scene.objects, names),
            sum(getattr(thing, name) is not None for thing in parsed.objects for name in names),
            len(scene.objects) * len(names),
        )
        if "background" in STYLES[style]:
            count += (parsed.background == scene.background, parsed.background is not None, 1)
    return counts


def _agreeing(said: Sequence[ParsedThing], true: Sequence[Thing], names: Sequence[str]) -> int:
    """The most attributes that agree over all one-to-one pairings of what is said with what is true."""
    most = {0: 0}  # bit set of the true objects already paired -> agreeing attributes
    for thing in said:
        for taken, count in list(most.items()):
            for k, truth in enumerate(true):
                if not taken >> k & 1:
                    agree = sum(getattr(thing, name) == getattr(truth, name) for name in names)
                    most[taken | 1 << k] = max(most.get(taken | 1 << k, 0), count + agree)
    return max(most.values())


_NAMES = (*COLORS, *BACKGROUNDS)
_PALETTE = np.array([*COLORS.values(), *BACKGROUNDS.values()], np.float32)
_VISIBLE = 45.0  # a pixel's distance from the background; half that of the nearest two colours, purple and gray
# A pixel is misfit where it differs from the best template by this share of the object's contrast, and an object is
# known where misfit pixels are fewer than this share of its area. Tighter, blurred objects are lost; looser, stars,
# rings and halves pass as shapes.
_MISFIT, _TOLERANCE = 0.30, 0.10


@dataclass(frozen=True)
class _Templates:
    """Coverage of every shape, size and shift in one cell: `masks` is (templates, height * width), in [0, 1]."""

    names: tuple[tuple[str, str], ...]
    masks: np.ndarray
    least_area: float  # pixels of the smallest object


@lru_cache(maxsize=8)
def _templates(height: int, width: int, side: float) -> _Templates:
    """Templates for windows of height x width pixels, of objects made for cells whose shorter side is `side`."""
    fine = 4
    reach, step = round(side / 8 * fine), max(1, round(side / 32 * fine))  # shifts up to 1/8 cell, by 1/32 cell
    y = ((np.arange(-reach, height * fine + reach) + 0.5) / fine - height / 2)[:, None]
    x = ((np.arange(-reach, width * fine + reach) + 0.5) / fine - width / 2)[None, :]
    names, masks, areas = [], [], []
    shifts = [reach + k * step for k in range(-(reach // step), reach // step + 1)]
    for shape, corners in OUTLINES.items():
        for size, share in SIZES.items():
            radius = share * side / 2
            held = inside(y / radius, x / radius, corners)
            for dy in shifts:
                for dx in shifts:
                    window = held[dy : dy + height * fine, dx : dx + width * fine]
                    mask = window.reshape(height, fine, width, fine).mean((1, 3))
                    names.append((shape, size))
                    masks.append(mask.reshape(-1))
                    areas.append(mask.sum())
    return _Templates(tuple(names), np.stack(masks).astype(np.float32), float(min(areas)))


def inside(y: np.ndarray, x: np.ndarray, corners: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Which points of the grid y (Y, 1), x (1, X) a polygon holds, by the even-odd rule: (Y, X) bool."""
    held = np.zeros((y.shape[0], x.shape[1]), bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 != y1:
            held ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return held


def _smooth(cells: np.ndarray) -> np.ndarray:
    """3x3 means over the axes (-3, -2) of (..., height, width, channels)."""
    wide = np.pad(cells, [(0, 0)] * (cells.ndim - 3) + [(1, 1), (1, 1), (0, 0)], mode="edge")
    tall = wide[..., :-2, :, :] + wide[..., 1:-1, :, :] + wide[..., 2:, :, :]
    return (tall[..., :-2, :] + tall[..., 1:-1, :] + tall[..., 2:, :]) / 9


def read(image: np.ndarray) -> Scene:
    """The scene shown by one (height, width, 3) uint8 image; see `read_many`."""
    return read_many(image[None])[0]


def read_many(images: np.ndarray) -> list[Scene]:
    """The scenes shown by (N, height, width, 3) uint8 images: what stands in each cell, told by least squares.

    In each cell the pixels' difference from the background is fitted by `coverage x one colour` for every shape, size
    and shift. The reader forgives nothing: whatever stands out of the background over a quarter of the smallest
    object's area is an object, and what no template explains, or a second thing in the same cell, is an object with
    `UNKNOWN` shape, size and colour, which equals no wanted one.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"Images must be (N, height, width, 3) uint8; found {images.shape} {images.dtype}.")
    if images.shape[1] < 8 * len(ROWS) or images.shape[2] < 8 * len(COLUMNS):
        raise ValueError(
            f"Images of {images.shape[1]}x{images.shape[2]} are too small to read; 8 pixels a cell are needed."
        )
    return [scene for start in range(0, len(images), 64) for scene in _read_chunk(images[start : start + 64])]


def _read_chunk(images: np.ndarray) -> list[Scene]:
    cells, side = _cells(images)
    count, places, height, width, _ = cells.shape
    templates = _templates(height, width, side)

    # The background is the palette's most frequent colour, its exact value the median of the pixels near to that.
    pixels = cells.reshape(count, -1, 3)
    near = _nearest(pixels)
    winners = np.stack([np.bincount(row, minlength=len(_PALETTE)) for row in near]).argmax(1)
    background = np.stack([np.median(row[votes == w], 0) for row, votes, w in zip(pixels, near, winners, strict=True)])

    offset = cells - background[:, None, None, None]
    soft = _smooth(offset)
    stands_out = np.linalg.norm(soft, axis=-1) > _VISIBLE
    present = stands_out.sum((2, 3)) > templates.least_area / 4

    flat = offset.reshape(count * places, -1, 3)
    norms = (templates.masks**2).sum(1)
    dots = np.einsum("cpk,tp->ctk", flat, templates.masks, optimize=True)
    best = ((dots**2).sum(2) / norms).argmax(1)
    contrast = dots[np.arange(len(best)), best] / norms[best][:, None]  # fitted colour minus background
    fit = templates.masks[best].reshape(count, places, height, width, 1)
    contrast = contrast.reshape(count, places, 1, 1, 3)
    colors = _nearest(contrast[:, :, 0, 0] + background[:, None])

    area = fit.sum((2, 3, 4))
    strength = np.linalg.norm(contrast[..., 0, 0, :], axis=-1)
    wrong = np.linalg.norm(_smooth(offset - fit * contrast), axis=-1) > _MISFIT * strength[..., None, None]
    stray = stands_out & (_smooth(_smooth(fit))[..., 0] == 0)
    known = (wrong.sum((2, 3)) < _TOLERANCE * area) & (stray.sum((2, 3)) < templates.least_area / 4)

    scenes = []
    for i in range(count):
        things = []
        for j in np.flatnonzero(present[i]):
            shape, size = templates.names[best[i * places + j]]
            color = _NAMES[colors[i, j]]
            if known[i, j]:
                things.append(Thing(shape, color if color in COLORS else UNKNOWN, size, PLACES[j]))
            else:
                things.append(Thing(UNKNOWN, UNKNOWN, UNKNOWN, PLACES[j]))
        name = _NAMES[winners[i]]
        scenes.append(Scene(tuple(things), name if name in BACKGROUNDS else UNKNOWN))
    return scenes


def _cells(images: np.ndarray) -> tuple[np.ndarray, float]:
    """(N, H, W, 3) cut into (N, places, height, width, 3) float32 cells, and the shorter side of the scene's cells.

    Cells of 32 pixels and more are reduced to 16 and more. Pixels shared by two cells, where the grid does not divide
    the image, belong to neither.
    """
    _, high, wide, _ = images.shape
    height, width = high // len(ROWS), wide // len(COLUMNS)
    tops = [-(-row * high // len(ROWS)) for row in range(len(ROWS))]
    lefts = [-(-column * wide // len(COLUMNS)) for column in range(len(COLUMNS))]
    cells = np.stack([images[:, y : y + height, x : x + width] for y in tops for x in lefts], 1)
    k = max(1, min(height, width) // 16)
    y, x = height % k // 2, width % k // 2
    cells = cells[:, :, y : y + height // k * k, x : x + width // k * k].astype(np.float32)
    reduced = cells.reshape(*cells.shape[:2], height // k, k, width // k, k, 3).mean((3, 5))
    return reduced, min(high / len(ROWS), wide / len(COLUMNS)) / k


def _nearest(pixels: np.ndarray) -> np.ndarray:
    """Index into the palette of the nearest colour of each (..., 3) pixel."""
    return ((pixels[..., None, :] - _PALETTE) ** 2).sum(-1).argmin(-1)
