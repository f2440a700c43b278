"""The gallery: rows of a corpus with their captions, scores and verdicts, as one HTML file that needs no network."""

import base64
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from captioner.habits import Report, faulty, styles, table

VERDICTS: tuple[str, ...] = ("keep", "rejected", "failed")
PIXELATED = 96  # a picture whose sides are below that is shown pixel by pixel, and kept without loss
ROW_BYTES = 2048  # no row can do with less

_FOLDER = Path(__file__).parent
_MARK = "<!--rows-->"  # where the template's text ends and the rows begin
_TEXT = (4000, 1000, 200, 40)  # characters of a text, tried in turn until the row fits its share of the page
# A data block ends at "</script", and a browser also looks for "<!--" in it; U+2028 ends a line of JavaScript.
_HTML = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample as the gallery shows it; whatever is None is left out.

    `image` is (H, W, 3) uint8, or says why there is none. `captions` are by style, `scores` by column: numbers, or, in
    columns named `flag_...`, what was found: truth, a text, or a list of texts. `verdict` is one of VERDICTS.
    `read` says by style how often a training reads the caption, where that is known.
    """

    sample_id: str
    key: str | None = None
    image: np.ndarray | Exception | None = None
    captions: Mapping[str, str | None] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    read: Mapping[str, float | None] = field(default_factory=dict)
    state: str | None = None
    verdict: str = "keep"
    reason: str | None = None

    def __post_init__(self) -> None:
        assert self.verdict in VERDICTS, self.verdict


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large the page may grow: each row has an equal share of the bytes, and is made smaller until it fits."""

    rows: int = 2000
    edge: int = 256  # pixels of a picture's longer side
    megabytes: int = 64

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"A gallery shows at least one row; found {self.rows}.")
        if not 16 <= self.edge <= 2048:
            raise ValueError(f"The longer side of a picture is 16 to 2048 pixels; found {self.edge}.")
        if self.share < ROW_BYTES:
            raise ValueError(
                f"{self.rows} rows do not fit into {self.megabytes} MB: a row needs {ROW_BYTES} bytes. Show fewer rows."
            )

    @property
    def share(self) -> int:
        """Bytes of one row."""
        return self.megabytes * 2**20 // self.rows


def write_gallery(
    rows: Iterable[Row],
    file: IO[bytes],
    *,
    title: str = "Gallery",
    summary: str = "",
    facts: Mapping[str, str] | None = None,
    totals: Mapping[str, int] | None = None,
    collapse: Mapping[str, Report] | None = None,
    faults: Mapping[str, Report] | None = None,
    limits: Limits | None = None,
) -> dict[str, int]:
    """Write the page, a row at a time, and return how many `rows`, `pictures`, `cut` texts and `bytes` it holds.

    `totals` says of each verdict how many rows there were to draw from, `collapse` what `Collapse.report` says of each
    style's captions, `faults` what `Faults.report` does. ValueError if there are more rows than the limits allow.
    Captions are anybody's text: they lie in a block of data, the script puts them on the page as text, and the page's
    policy forbids other scripts.
    """
    limits = limits or Limits()
    page = {"title": title, "summary": summary, "facts": dict(facts or {})}
    whole = {"table": table(collapse or {}), "styles": styles(collapse or {}), "faults": faulty(faults or {})}
    head, tail = _template().render(page=page, **whole).split(_MARK)
    counts = {"rows": 0, "pictures": 0, "cut": 0, "bytes": 0}

    def write(text: str) -> None:
        counts["bytes"] += file.write(text.encode(errors="replace"))

    write(head + '{"rows":[\n')
    for row in rows:
        if counts["rows"] == limits.rows:
            raise ValueError(f"The gallery holds {limits.rows} rows, and more came. Draw fewer, or raise its limits.")
        line, has_picture, is_cut = _line(row, limits)
        write((",\n" if counts["rows"] else "") + line)
        counts["rows"] += 1
        counts["pictures"] += has_picture
        counts["cut"] += is_cut
    told = {"totals": {name: int(count) for name, count in (totals or {}).items()}, "counts": counts}
    told["limit"] = {"bytes": limits.megabytes * 2**20}
    write("\n]," + _json(told)[1:] + tail)
    return counts


def fit(height: int, width: int, edge: int) -> tuple[int, int]:
    """(height, width) of the largest picture of these proportions whose longer side is at most `edge`."""
    scale = min(1.0, edge / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def thumbnail(pixels: np.ndarray, edge: int, most_bytes: int) -> tuple[bytes, int, int] | None:
    """(WebP, height, width) of (H, W, 3) uint8 pixels; coarser until it fits the bytes, None if nothing does."""
    image = Image.fromarray(pixels)
    lossless = max(image.size) < PIXELATED
    while edge >= 16:
        height, width = fit(image.height, image.width, edge)
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        for options in ({"lossless": True},) * lossless + ({"quality": 82}, {"quality": 50}, {"quality": 20}):
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", method=2, **options)
            if buffer.tell() <= most_bytes:
                return buffer.getvalue(), height, width
        edge = max(height, width) // 2
    return None


def _line(row: Row, limits: Limits) -> tuple[str, bool, bool]:
    """The row as JSON of at most its share of bytes, whether it has its picture, and whether a text was cut."""
    for most in _TEXT:
        told, is_cut = _told(row, most)
        line = _json(told)
        if len(line.encode()) <= limits.share // 2:
            break
    # Room for the names, the quotes and the base64 of the picture.
    room = (limits.share - len(line.encode()) - 100) * 3 // 4
    if isinstance(row.image, np.ndarray):
        found = thumbnail(row.image, limits.edge, room)
        if found is None:
            told["lost"] = "no room on the page"
        else:
            data, height, width = found
            told["image"] = [f"data:image/webp;base64,{base64.b64encode(data).decode()}", height, width]
    return _json(told), "image" in told, is_cut


def _told(row: Row, most: int) -> tuple[dict[str, Any], bool]:
    """What is known of a row, without its picture, each text cut to `most` characters; and whether one was."""
    cut = _Cut(most)
    scores = {name: _number(value) for name, value in row.scores.items() if not name.startswith("flag_")}
    flags = [label for name, value in row.scores.items() if name.startswith("flag_") for label in _flags(name, value)]
    told: dict[str, Any] = {
        "id": cut(row.sample_id) or "",
        "key": cut(row.key),
        "state": cut(row.state),
        "verdict": cut(row.verdict),
        "reason": cut(row.reason),
        "lost": cut(str(row.image) or type(row.image).__name__) if isinstance(row.image, Exception) else None,
        "captions": {style: cut(text) for style, text in row.captions.items()},
        "scores": {name: value for name, value in scores.items() if value is not None},
        "read": {style: share for style, value in row.read.items() if (share := _number(value))},
        "flags": [cut(label) for label in flags[:20]],
    }
    return {name: value for name, value in told.items() if value not in (None, {}, [])}, cut.happened


class _Cut:
    """Cuts texts, and says what was cut off."""

    def __init__(self, most: int) -> None:
        self.most, self.happened = most, False

    def __call__(self, text: Any) -> str | None:
        if text is None:
            return None
        text = str(text)
        if len(text) <= self.most:
            return text
        self.happened = True
        return f"{text[: self.most]}… (+{len(text) - self.most:,} characters)"


def _number(value: Any) -> float | None:
    """A finite number of four digits after the point, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return round(number, 4) if math.isfinite(number) else None


def _flags(column: str, value: Any) -> Iterator[str]:
    """What a flag's column says of a row: its name, with the text that was found up to the first colon."""
    name = column.removeprefix("flag_")
    if isinstance(value, str):
        if value:
            yield f"{name}: {value.split(':')[0]}"
    elif isinstance(value, Sequence | np.ndarray):
        for one in value:
            yield from _flags(column, one)
    elif value is not None and bool(value) and value == value:
        yield name


def _json(value: Any) -> str:
    """JSON that may stand in a data block of an HTML page."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode(errors="replace").decode().translate(_HTML)


@cache
def _template() -> jinja2.Template:
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"digest": _digest, "percent": _share, "count": "{:,.0f}".format}
    return env.get_template("gallery.html.jinja")


def _share(share: float) -> str:
    """In per cent; what is not 0 is not shown as 0."""
    return f"{100 * share:{'.1f' if share == 0 or share >= 0.001 else '.1g'}}\u00a0%"


def _digest(text: str) -> Markup:
    """The source of a script or style as its content policy names it."""
    digest = base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()
    return Markup(f"'sha256-{digest}'")
