"""The report page, built from made-up results and opened in a real browser."""

import io
import re
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from t2i.evaluate import report
from t2i.evaluate.chart import labels, line_chart, nice_ticks, number
from tests.browser import LAYOUT, in_browser, seen

HOSTILE = (
    """<script>document.title="owned"</script><img src=x onerror='document.title="owned"'>"{{ 7*7 }}"'</title>&amp;"""
)
SECTIONS = (
    "scores",
    "captions",
    "collapse",
    "faults",
    "samples",
    "reconstructions",
    "curves",
    "courses",
    "timings",
    "recipe",
    "provenance",
)


def encoded(size=(32, 32), kind="PNG", value=90):
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def metrics():
    return [
        {"step": s, "seconds": s / 9, "a/caption": 1 / s, "b/caption": 2 / s, "a/lr": 1e-3} for s in range(10, 500, 10)
    ]


def page(text="a red circle"):
    lines = [
        report.Line(kind="Alt text", text=text, against="a red circle"),
        report.Line(kind="Short", text=None),
        report.Line(kind="Descriptive", text="a blue circle", against="a red circle"),
    ]
    return report.Page(
        title=f"demo {text}",
        summary=text,
        facts={"Seed": "0", text: text},
        figures=[
            report.Figure(
                name="Scene score", value=0.84, target=0.8, interval=(0.79, 0.88), n=256, note=text, source="ingest"
            ),
            report.Figure(name="Captions", value=0.9, target=0.95, baseline=(text, 0.6)),
            report.Figure(name="Reconstruction", value=28.4, unit="dB", scale=None),
        ],
        captioned=[report.Captioned(image=encoded(), lines=lines, truth="a red circle")],
        styles=[
            report.Style(style="alt", lengths=[("1-5", 3, 0.75), ("6-10", 1, 0.25)], openings=[(text, 2)]),
            report.Style(style=text, lengths=[("1-5", 0, 0.0), ("6-10", 0, 0.0)], trigrams=[(text, 2)], undercount=7),
        ],
        habits=[
            report.Habit(label=text, values=[0.00042, 1.0], kind="share", warns=text),
            report.Habit(label="Captions", values=[12345, 0], kind="count"),
            report.Habit(label="Words", values=[7.25, 0.0]),
            report.Habit(label="Distinct", values=[0.000123, 1.0], kind="ratio"),
        ],
        faults=[
            report.Faulty(
                style=text,
                count=900,
                faulty=0.5,
                faults={text: 0.5},
                decoded_again=0.5,
                mended=0.125,
                shards=2,
                worst=[{"shard": text, "rows": 9, "share": 1.0, "fault": text}],
                strip=[0.0, 1.0],
                histogram=[("none", 1), (text, 1)],
            ),
            report.Faulty(style="clean", count=0, faulty=0.0),
        ],
        sampled=[
            report.Sampled(prompt=text, image=encoded(kind="WEBP"), right=False, note=text),
            report.Sampled(prompt="p", image=encoded(kind="JPEG"), right=True),
        ],
        rebuilt=[report.Rebuilt(image=encoded(), rebuilt=encoded(kind="BMP"), psnr=31.5)],
        curves=report.curves(text, metrics(), [{"step": 100, "a/caption": 0.5}]),
        courses=[
            report.Course(title=text, steps=[100, 12000], drawn=[(text, [encoded()] * 2), ("p", [encoded()] * 2)])
        ],
        work=[
            report.Work(step="ingest", artifact="a1b2", seconds=4.0, amount=1200, path=f"runs/{text}"),
            report.Work(step=text, artifact=text),
        ],
        sources={"captions": text, "samples": "ingest", "reconstructions": "nowhere"},
        command=f"rescribe run {text}",
        recipe={"corpus": {"note": text}},
        provenance={"torch": "2.13.0", text: text},
    )


@pytest.fixture(scope="module")
def hostile():
    return report.render(page(HOSTILE))


class Tags(HTMLParser):
    """Collects every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_all_sections_are_there(hostile):
    ids = {attrs.get("id") for _, attrs in Tags(hostile).found}
    assert ids >= set(SECTIONS)


def test_intervals_are_told_of_where_there_are_some():
    figure = {"name": "PSNR", "value": 18.5, "unit": "dB"}
    assert "Intervals are" not in report.render(report.Page(title="t", figures=[report.Figure(**figure)]))
    assert "Intervals are" in report.render(
        report.Page(title="t", figures=[report.Figure(**figure, interval=(18.0, 19.0), n=8)])
    )


def test_what_is_not_counted_is_a_dash():
    habit = report.Habit(label="Lower case", values=[None, 0.5], kind="share")
    styles = [report.Style(style="alt"), report.Style(style="short")]
    shown = report.render(report.Page(title="t", styles=styles, habits=[habit]))
    (row,) = re.findall(r"Lower case.*?</tr>", shown)
    assert re.findall(r"<td>([^<]*)", row) == ["–", "50.0\xa0%"]
    assert row.count('class="bar"') == 1


def test_empty_parts_are_left_out():
    text = report.render(report.Page(title="nothing yet"))
    assert not {attrs.get("id") for _, attrs in Tags(text).found} & set(SECTIONS)


def test_strangers_words_stay_text(hostile):
    tags = Tags(hostile).found
    assert not [tag for tag, _ in tags if tag in ("script", "iframe", "object", "link", "base", "form")]
    assert not [name for _, attrs in tags for name in attrs if name.startswith("on")]
    assert "49" not in re.findall(r"\d+", hostile[hostile.index("<h1>") : hostile.index("</h1>")])
    assert HOSTILE in unescape(hostile)
    policy = next(attrs["content"] for _, attrs in tags if "http-equiv" in attrs)
    assert "default-src 'none'" in policy


def test_captions_as_a_whole_are_told_in_words_and_figures(hostile):
    text = " ".join(
        re.sub(r"<[^>]*>", " ", hostile[hostile.index('id="collapse"') : hostile.index('id="reconstructions"')]).split()
    )
    for words in ("0.04 % 100.0 %", "12,345 0", "7.2 0.0", "0.00012 1.00000", "too low by 7", "6-10 words: 1, 25.0 %"):
        assert words in text, words
    for words in (
        "50.0 % of 900",
        "50.0 % 12.5 % mended",
        "along the 2 shards",
        "100.0 % faulty",
        "clean Faulty 0.0 % of 0",
    ):
        assert words in text, words


def test_nothing_is_fetched(hostile):
    for _, attrs in Tags(hostile).found:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attrs.get(name) or "#").startswith(("data:image/", "#"))
    assert not re.search(r"url\(|@import|https?:", re.sub(r"base64,[^\"]*", "", hostile))


def test_every_picture_has_words_for_those_who_do_not_see_it(hostile):
    hidden = hostile[hostile.index('class="mosaic') : hostile.index('class="facts"')]
    pictures = [attrs for tag, attrs in Tags(hostile.replace(hidden, "")).found if tag == "img"]
    assert len(pictures) == 9
    assert all(attrs["alt"] for attrs in pictures)
    assert all(attrs["aria-label"] for tag, attrs in Tags(hostile).found if tag == "svg")


def test_only_what_differs_is_marked():
    assert report.compared("a blue circle, here", "a red circle, here") == "a <mark>blue</mark> circle, here"
    assert report.compared("dog & cat", None) == "dog &amp; cat"
    assert report.compared("free <b> shipping", "a circle") == "<mark>free &lt;b&gt; shipping</mark>"
    assert report.compared("A circle.", "a circle") == "A circle."


def test_pictures_come_first_and_numbers_lead_to_what_made_them(hostile):
    assert hostile.index('<section id="samples">') < hostile.index('<section id="scores">')
    links = [attrs["href"] for tag, attrs in Tags(hostile).found if tag == "a" and "made" in attrs.get("href", "")]
    assert links.count("#made-1") == 3  # the figure, what it is of, and the samples
    assert links.count("#made-2") == 3  # captions and what is said of all of them
    ids = [attrs["id"] for _, attrs in Tags(hostile).found if attrs.get("id", "").startswith("made-")]
    assert ids == ["made-1", "made-2"]
    assert HOSTILE in unescape(hostile[hostile.index("This line makes it again") :])
    assert "rescribe show 'runs/" in unescape(hostile)


def test_small_pictures_are_enlarged_pixel_by_pixel():
    assert 'class="pixels"' in report.picture(encoded(), "x")
    assert "pixels" not in report.picture(encoded((100, 400)), "x")
    assert 'width="400" height="100"' in report.picture(encoded((100, 400)), "x")
    assert report.data_uri(encoded(kind="TIFF")).startswith("data:image/png;")


def test_curves_are_grouped_by_quantity_and_a_repeated_step_counts_once():
    rows = [
        {"step": 10, "a/loss": 3.0},
        {"step": 10, "a/loss": 2.0, "b/loss": 1.0, "a/lr": 0.1, "rows_per_second": 5, "waiting_share": 0},
    ]
    losses, *others = report.curves("train", rows)
    assert losses.title == "train · loss"
    assert losses.series == {"a": [(10, 2.0)], "b": [(10, 1.0)]}
    assert losses.loss
    assert not any(curve.loss for curve in others)
    assert report.curves("train", []) == []


def test_losses_that_are_held_out_stand_beside_those_of_training():
    rows = [{"step": step, "prior/codes": 1.0, "prior/lr": 0.1} for step in (10, 20)]
    held_out = [{"step": 20, "seconds": 3.0, "prior/codes": 2.0, "held_out_cpu_seconds": 9.0, "other/loss": 1.0}]
    loss, rate = report.curves("train", rows, held_out)
    assert loss.series == {"prior": [(10, 1.0), (20, 1.0)], "prior, held out": [(20, 2.0)]}
    assert list(rate.series) == ["prior"]
    svg = line_chart(loss.series, x_label="step", y_label="codes")
    assert svg.count('<circle class="s1"') == 2  # one is seen always, one under the pointer
    assert "prior, held out from 2 to 2" in svg


def test_pictures_of_checkpoints_stand_under_their_steps(hostile):
    shown = hostile[hostile.index('<section id="courses"') : hostile.index('<section id="timings"')]
    assert re.findall(r'<th scope="col">([^<]*)</th>', shown)[1:] == ["100", "12,000"]
    words = [attrs["alt"] for tag, attrs in Tags(shown).found if tag == "img"]
    assert words[2:] == ["After 100 steps: p", "After 12000 steps: p"]


@pytest.mark.parametrize(
    "points",
    [
        [(1, 5.0)],
        [(0, 0.0), (1, 0.0)],
        [(1, 1e-9), (9000, 1e6)],
        [(1, -2.0), (2, 3.0)],
        [(x, x % 7) for x in range(5000)],
    ],
)
def test_a_chart_is_whole_svg_within_its_frame(points):
    svg = line_chart({"<a>": points}, x_label="step", y_label="loss")
    tree = ElementTree.fromstring(svg)
    drawn = tree.find("polyline").get("points").split()
    xs, ys = zip(*(map(float, point.split(",")) for point in drawn), strict=True)
    assert len(drawn) <= 121
    assert 0 <= min(xs) <= max(xs) <= 420
    assert 0 <= min(ys) <= max(ys) <= 232
    assert "<a> from" in tree.get("aria-label")


def test_a_chart_leaves_out_what_is_not_a_number():
    assert line_chart({"a": [(1, float("nan"))]}, x_label="step", y_label="loss") == ""
    assert "nan" not in line_chart({"a": [(1, float("nan")), (2, 1.0), (3, float("inf"))]}, x_label="x", y_label="y")


def test_ticks_are_round():
    assert nice_ticks(0, 1, 4) == [0, 0.5, 1]
    assert nice_ticks(0, 4000, 5) == [0, 1000, 2000, 3000, 4000]
    assert labels([4.86, 4.865, 4.87]) == ["4.86", "4.865", "4.87"]
    assert labels([1e6, 1e6]) == ["1M", "1M"]
    assert [number(v) for v in (0.05, 12, 1500, 15000, 2.5e6)] == ["0.05", "12", "1500", "15k", "2.5M"]


@in_browser
@pytest.mark.timeout(120)
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_opens_in_a_browser(hostile, tmp_path, width):
    drawn = """const charts = [...document.querySelectorAll("svg polyline")].filter((p) => p.getBBox().width > 100);
        const bars = [...document.querySelectorAll("svg.bars .fill")].filter((bar) => bar.getBBox().height > 30);
        const tall = [...document.querySelectorAll("section")].filter((s) => s.offsetHeight > 40);
        const told = await (async () => { LAYOUT })();
        return { ...told, charts: charts.length, bars: bars.length, sections: tall.length };"""
    file = tmp_path / "report.html"
    file.write_text(hostile, encoding="utf-8")
    told = seen(file, drawn.replace("LAYOUT", LAYOUT), width)
    assert told["width"] == width
    assert told["title"].startswith("demo <script>")
    assert told["pictures"] == 11
    assert told["blank"] == told["fetched"] == told["dead"] == 0
    assert told["sections"] == len(SECTIONS)
    assert told["charts"] >= 2
    assert told["bars"] == 2  # the tallest of the lengths, and of the shards
    assert told["overflow"] <= 0
    assert not told["wide"]
