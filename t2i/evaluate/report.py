"""The report page: what a run made and how well, as one HTML file that needs no network."""

import base64
import difflib
import io
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jinja2
from markupsafe import Markup, escape
from PIL import Image

from t2i.evaluate.chart import Points, line_chart

NO_LOSSES = ("lr", "grad_norm", "loss_scale")  # of an update
_FOLDER = Path(__file__).parent
_SMALL = {"a", "an", "the", "and", "of", "with", "on", "at", "in"}  # words that say nothing by themselves


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One headline score; a score without an upper end (PSNR) has `scale` None and draws no bar."""

    name: str
    value: float
    target: float | None = None
    interval: tuple[float, float] | None = None  # 95 %
    n: int | None = None
    unit: str = ""
    scale: float | None = 1.0
    baseline: tuple[str, float] | None = None  # what the score is to be read against: ("alt text", 0.61)
    note: str = ""
    source: str = ""  # the step whose artifact it is of, as `Work` names it


@dataclass(frozen=True, kw_only=True)
class Line:
    """One caption of an image; its words are compared with `against`, where the truth is known."""

    kind: str
    text: str | None
    against: str | None = None


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """An image (encoded bytes) and its captions, before and after."""

    image: bytes
    lines: Sequence[Line]
    truth: str | None = None


@dataclass(frozen=True, kw_only=True)
class Habit:
    """A figure of each style's captions, in the order of the page's styles, and a sentence on what it warns of."""

    label: str
    values: Sequence[float | None]  # None: there is nothing to count
    kind: Literal["count", "share", "number", "ratio"] = "number"
    warns: str = ""


@dataclass(frozen=True, kw_only=True)
class Style:
    """All captions of one style: [bin, captions, share] of each bin of lengths, and [words, count] of phrases."""

    style: str
    lengths: Sequence[tuple[str, int, float]] = ()
    openings: Sequence[tuple[str, int]] = ()
    trigrams: Sequence[tuple[str, int]] = ()
    undercount: int = 0  # by how much the counts of phrases may be too low


@dataclass(frozen=True, kw_only=True)
class Faulty:
    """What is wrong with the captions of one style: shares of them all, and rates by shard.

    `strip` has the rates of stretches of shards in their order, `histogram` [rate, shards] of each bin, and `worst` the
    `shard`, `rows`, `share` and most frequent `fault` of the shards to look at.
    """

    style: str
    count: int
    faulty: float
    faults: Mapping[str, float] = field(default_factory=dict)
    decoded_again: float | None = None
    mended: float | None = None  # those decoded again that came out without a fault
    shards: int = 0
    worst: Sequence[Mapping[str, Any]] = ()
    strip: Sequence[float] = ()
    histogram: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A prompt and the picture drawn from it; `right` says whether it shows what was asked, where that is known."""

    prompt: str
    image: bytes
    right: bool | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """An image and what the tokenizer makes of it."""

    image: bytes
    rebuilt: bytes
    psnr: float | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Series of (step, value) drawn over common axes."""

    title: str
    series: Mapping[str, Points]
    loss: bool = True  # other curves (learning rate, throughput) are folded away
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What checkpoints of a training drew for the same prompts, from the first that is shown to the last."""

    title: str
    steps: Sequence[int]
    drawn: Sequence[tuple[str, Sequence[bytes]]]  # a prompt, and its picture (encoded) of each step
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One step of the path: what it took and where its result lies."""

    step: str
    artifact: str
    seconds: float | None = None
    amount: int | None = None
    unit: str = "rows"
    peak_gb: float | None = None
    path: str = ""
    flops: float | None = None


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that the report shows; an empty part is left out."""

    title: str
    summary: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)  # a few words each, shown under the title
    figures: Sequence[Figure] = ()
    captioned: Sequence[Captioned] = ()
    styles: Sequence[Style] = ()
    habits: Sequence[Habit] = ()  # of these styles
    faults: Sequence[Faulty] = ()
    sampled: Sequence[Sampled] = ()
    rebuilt: Sequence[Rebuilt] = ()
    curves: Sequence[Curve] = ()
    courses: Sequence[Course] = ()
    work: Sequence[Work] = ()
    sources: Mapping[str, str] = field(default_factory=dict)  # of whole sections, by the section's id
    command: str = ""  # the line that makes the page, and all that it is of, again
    recipe: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def render(page: Page) -> str:
    """The page as HTML. Captions are anybody's text: all of it is escaped, and the page forbids scripts altogether."""
    anchors = {item.step: f"made-{number}" for number, item in enumerate(page.work, 1)}
    made = {
        item.step: Markup('<a class="by" href="#{}">{} {}</a>').format(anchors[item.step], item.step, item.artifact)
        for item in page.work
    }
    marked = any(line.against is not None for item in page.captioned for line in item.lines)
    return template("report.html.jinja").render(page=page, marked=marked, anchors=anchors, made=made)


def curves(
    step: str, rows: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]] = (), source: str = ""
) -> list[Curve]:
    """The charts of one training step, from its metrics: a chart a quantity, a series an Update.

    A row holds `step` and figures named `quantity` or `update/quantity`; of a step logged twice, after a restart, the
    last row counts. Losses of rows that are held out, by the same names, are series of their own beside those.
    """
    found: dict[str, dict[str, Points]] = {}
    for name, points in _series(rows).items():
        update, _, quantity = name.rpartition("/")
        found.setdefault(quantity, {})[update] = points
    for name, points in _series(held_out).items():
        update, _, quantity = name.rpartition("/")
        if update and quantity in found:
            found[quantity][f"{update}, held out"] = points
    charts = [
        Curve(
            title=f"{step} · {quantity.replace('_', ' ')}",
            series=series,
            source=source,
            loss=quantity not in NO_LOSSES and "" not in series,
        )
        for quantity, series in found.items()
    ]
    return sorted(charts, key=lambda curve: not curve.loss)


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """The points of each figure, by its name."""
    last = {row["step"]: row for row in rows if isinstance(row.get("step"), int | float)}
    series: dict[str, list[tuple[float, float]]] = {}
    for x, row in sorted(last.items()):
        for name, value in row.items():
            if name not in ("step", "seconds") and isinstance(value, int | float):
                series.setdefault(name, []).append((float(x), float(value)))
    return series


def compared(text: str, against: str | None) -> Markup:
    """Escaped text in which the words that `against` does not have, in their place, are marked."""
    if against is None:
        return escape(text)
    pieces = re.findall(r"\S+", text)
    words, truth = ([_bare(word) for word in re.findall(r"\S+", side)] for side in (text, against))
    wrong: set[int] = set()
    for tag, start, end, _, _ in difflib.SequenceMatcher(None, words, truth, autojunk=False).get_opcodes():
        if tag != "equal":
            wrong |= {index for index in range(start, end) if words[index] not in _SMALL}
    tag = Markup("<mark>{}</mark>")
    marked = [tag.format(piece) if index in wrong else escape(piece) for index, piece in enumerate(pieces)]
    return Markup(" ").join(marked).replace(Markup("</mark> <mark>"), Markup(" "))


def data_uri(image: bytes) -> str:
    """The encoded picture itself, as an address; formats a browser does not know become PNG."""
    kinds = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"GIF8", "gif"))
    kind = next((name for magic, name in kinds if image.startswith(magic)), None)
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        kind = "webp"
    if kind is None:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(image)).convert("RGB").save(buffer, "PNG")
        image, kind = buffer.getvalue(), "png"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def picture(image: bytes, alt: str) -> Markup:
    """An `<img>` of encoded bytes; small pictures are enlarged pixel by pixel."""
    width, height = Image.open(io.BytesIO(image)).size
    return Markup('<img src="{}" alt="{}" width="{}" height="{}"{}>').format(
        data_uri(image), alt, width, height, Markup(' class="pixels"') if max(width, height) < 96 else ""
    )


def is_wide(image: bytes) -> bool:
    """Whether a picture wants a row of its own."""
    width, height = Image.open(io.BytesIO(image)).size
    return width > 1.8 * height


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: 0.4 s, 48 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@cache
def template(name: str) -> jinja2.Template:
    """A page of this folder, which escapes whatever it is given."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.globals |= {"picture": picture, "compared": compared, "chart": _chart, "pretty": _pretty}
    env.globals |= {"is_wide": is_wide, "percent": _percent, "quote": shlex.quote}
    env.filters |= {"duration": duration, "rate": lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.1f}"}
    env.filters |= {"percent": _share, "count": "{:,.0f}".format}
    return env.get_template(name)


def _chart(curve: Curve) -> Markup:
    return Markup(line_chart(curve.series, x_label="step", y_label=curve.title))  # line_chart escapes its labels


def _share(share: float) -> str:
    """In per cent; what is not 0 is not shown as 0."""
    return f"{100 * share:{'.1f' if share == 0 or share >= 0.001 else '.1g'}}\u00a0%"


def _percent(value: float, scale: float) -> str:
    return f"{100 * min(1.0, max(0.0, value / scale)):.2f}"


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str, allow_nan=False)


def _bare(word: str) -> str:
    return word.strip(".,;:!?\"'()").lower()
