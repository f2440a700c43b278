"""The page of a comparison: what several models drew for the same prompts, side by side, and a table of scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from t2i.evaluate.intervals import Interval
from t2i.evaluate.report import template

SIDE = 128  # pixels of the longer side of a small picture on the sheet, at least
GAP, LINE = 8, 16  # pixels between pictures on the sheet, and of a line of text


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model: what it is called, the artifacts that its figures are of, by kind, and the lines that make them."""

    name: str
    made: Mapping[str, str] = field(default_factory=dict)
    lines: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A prompt, the picture (encoded) of each model, and whether it shows what was asked, where that is known."""

    prompt: str
    images: Sequence[bytes]
    right: Sequence[bool | None]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure of one model as it is written; `apart` is its difference from the first model, and `better` its sign.

    `better` is None where the interval of the difference holds 0, or where nothing is better by it.
    """

    value: str = ""
    interval: str = ""
    apart: str = ""
    better: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the table: a score, and a cell a model."""

    name: str
    cells: Sequence[Cell]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that the page shows."""

    title: str
    models: Sequence[Model]
    drawn: Sequence[Drawn]
    lines: Sequence[Line]
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    command: str = ""  # the line that makes the comparison again


def render(page: Comparison) -> str:
    """The page as HTML. Prompts and names are anybody's text: all of it is escaped, and the page forbids scripts."""
    return template("compare.html.jinja").render(page=page)


def figure(value: float) -> str:
    """A score in three places, a count in thousands; what is large in powers of ten."""
    if abs(value) >= 1e9:
        return f"{value:.3g}"
    if float(value).is_integer() and abs(value) >= 10:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def between(interval: Interval) -> str:
    """An interval as it is written."""
    low, high = map(figure, interval)
    return f"{low} to {high}"


def contact_sheet(names: Sequence[str], drawn: Sequence[tuple[str, Sequence[np.ndarray]]]) -> np.ndarray:
    """(H, W, 3) uint8: a row a prompt, written above it, and a column a model, named at the top.

    Pictures (h, w, 3) uint8; small ones are enlarged by whole numbers.
    """
    first = drawn[0][1][0]
    times = max(1, -(-SIDE // max(first.shape[:2])))
    shown = [(prompt, [picture.repeat(times, 0).repeat(times, 1) for picture in each]) for prompt, each in drawn]
    height, width = (max(picture.shape[axis] for _, each in shown for picture in each) for axis in (0, 1))
    whole = GAP + len(names) * (width + GAP)
    font = ImageFont.load_default(size=12)
    texts = [_wrapped(prompt, font, whole - 2 * GAP) for prompt, _ in shown]
    tall = LINE + 2 * GAP + sum(len(text) * LINE + height + 2 * GAP for text in texts)
    sheet = Image.new("RGB", (whole, tall), "white")
    pen, top = ImageDraw.Draw(sheet), GAP
    for column, name in enumerate(names):
        (short, *_) = _wrapped(name, font, width)
        pen.text((GAP + column * (width + GAP), top), short, "#3d4fc4", font)
    top += LINE + GAP
    for text, (_, each) in zip(texts, shown, strict=True):
        for line in text:
            pen.text((GAP, top), line, "#1f1d1a", font)
            top += LINE
        for column, picture in enumerate(each):
            sheet.paste(Image.fromarray(picture), (GAP + column * (width + GAP), top + GAP // 2))
        top += height + 2 * GAP
    return np.asarray(sheet)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int = 3) -> list[str]:
    """The text in lines of at most a width in pixels; what three lines do not hold is left out, and marked."""
    lines, left = [""], " ".join(text.split())
    for letter in left:
        if font.getlength(lines[-1] + letter) <= width:
            lines[-1] += letter
            continue
        kept, space, word = lines[-1].rpartition(" ")
        lines[-1:] = [kept, (word + letter).lstrip()] if space and letter != " " else [lines[-1], letter.strip()]
        if len(lines) > most:
            return [*lines[: most - 1], lines[most - 1][:-2] + "…"]
    return lines
