"""The gallery, of rows that mean it no good, opened in a real browser."""

import io
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner.collapse import describe
from captioner.faults import Faults
from captioner.gallery import VERDICTS, Limits, Row, fit, thumbnail, write_gallery
from captioner.habits import HABITS, styles

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
OWNED = 'document.title="owned"'
HOSTILE = [
    f"</script><script>{OWNED}</script>",
    f"<!--<script>{OWNED}//",
    f"<img src=x onerror='{OWNED}'><svg onload='{OWNED}'>",
    f"\"'`${{{OWNED}}}{{{{ 7*7 }}}}{{% raw %}} &lt;script&gt; \\u003c \\",
    "\u2028\u2029\u202e drawkcab \u0000\u0007\ud800 قطة سوداء 黒猫 🐈‍⬛",
    "x" * 100_000,
    "Z" + "\u0301" * 500,
    "%%% ?#&=+ [.*+^$()|\\/-",
]
REASONS = {"keep": None, "rejected": "alt too short", "failed": f"Caption: OSError: {HOSTILE[2]}"}


def pixels(height=40, width=64, value=90):
    return np.full((height, width, 3), value, np.uint8)


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def hostile_row(n):
    """Rows in which every text is hostile, and every other thing is absent now and then."""
    text, verdict = HOSTILE[n % len(HOSTILE)], VERDICTS[n % 3]
    return Row(
        sample_id=f"{n:024x}",
        key=text[:200] if n % 5 else None,
        image=[pixels(value=n % 256), None, ValueError(text), pixels(1, 900), noise(300, 200)][n % 5],
        captions={
            "alt": text,
            "short": None if n % 4 == 0 else f"a cat number {n}",
            "constructor": text[::-1] if n % 2 else "",
        }
        | ({"__proto__": text} if n % 3 == 0 else {}),
        scores={
            "logp_alt": [-1.5, None, float("nan"), -float("inf"), np.float32(-n)][n % 5],
            "match_short": n % 7 / 7 if n % 4 else None,
            "clip_short": np.float64(30 - n / 10),
            "flag_short": [True, False, None, np.bool_(True)][n % 4],
            "flag_alt": [text, None, ["shouting", text], ""][n % 4],
        },
        state="accepted" if verdict == "keep" else verdict,
        verdict=verdict,
        reason=REASONS[verdict],
    )


ROWS = [hostile_row(n) for n in range(130)]
# Styles of any name and captions of anybody; few, long and short, so that there is more than one bar of lengths.
COLLAPSE = {
    name: describe([*HOSTILE[:5], "a cat on a mat", "a cat " * 9] * n)
    for n, name in enumerate(("alt", "short", HOSTILE[0]))
}
FAULTS = Faults()
for number in range(300):
    FAULTS.add(
        HOSTILE[number % 4],
        ["repetition", HOSTILE[0], True, None] * (1 + number % 3),
        [3, 2, None, 2] * (1 + number % 3),
    )


def page(rows, **options):
    file = io.BytesIO()
    counts = write_gallery(rows, file, **options)
    assert counts["bytes"] == len(file.getvalue())
    return file.getvalue().decode(), counts


def data(text):
    return json.loads(re.search(r'<script type="application/json" id="rows">(.*?)</script>', text, re.S)[1])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    options = {"title": HOSTILE[0], "summary": HOSTILE[2], "facts": {HOSTILE[1]: HOSTILE[3]}, "collapse": COLLAPSE}
    options["faults"] = {"short": FAULTS.report(), HOSTILE[0]: FAULTS.report(), "none": Faults().report()}
    text, counts = page(ROWS, **options, totals={"keep": 1_000_000, "rejected": 43, "failed": 43})
    assert counts["rows"] == len(ROWS)
    path = tmp_path_factory.mktemp("gallery") / "index.html"
    path.write_text(text, encoding="utf-8")
    return path


class Page(HTMLParser):
    """What a browser made of the page: rows by id in order, tags, and the words outside of scripts."""

    def __init__(self, dom):
        super().__init__()
        self.tags, self.text, self._within = [], "", ""
        self.feed(dom)
        self.ids = [attrs["data-id"] for tag, attrs in self.tags if "data-id" in attrs]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._within = tag

    def handle_data(self, text):
        self.text += text if self._within not in ("script", "style") else ""


def open_page(path, profile, anchor=""):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={profile}", "--virtual-time-budget=5000", "--window-size=1200,900", "--dump-dom"]
    command = [CHROMIUM, *flags, f"{path.as_uri()}#{anchor}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


def checked(path, script, name):
    """A copy of the page without its policy, so that escaping alone has to hold and a script of the test may look."""
    text = path.read_text(encoding="utf-8")
    changed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert changed != text
    copy = path.with_name(name)
    copy.write_text(changed.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return copy


def seen_by(path, profile):
    """What the page's own script saw. On a busy machine the browser's virtual time may end before the script does."""
    for _ in range(4):
        if found := re.search(r'data-seen="([^"]*)"', open_page(path, profile)):
            return json.loads(unescape(found[1]))
    raise AssertionError(f"the script of {path} never ended")


def test_the_page_is_data_and_one_known_script(hostile):
    text = hostile.read_text(encoding="utf-8")
    tags = Page(text).tags
    assert [attrs.get("type") for tag, attrs in tags if tag == "script"] == ["application/json", None]
    assert not [tag for tag, _ in tags if tag in ("iframe", "object", "link", "base", "img", "embed")]
    assert not [name for _, attrs in tags for name in attrs if name.startswith("on") or name == "style"]
    policy = next(attrs["content"] for _, attrs in tags if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert not re.search(r"url\(|@import|https?:|innerHTML|insertAdjacent|eval\(", re.sub(r"base64,[^\"]*", "", text))
    assert "\u2028" not in text
    assert len(data(text)["rows"]) == len(ROWS)


def test_the_captions_as_a_whole_are_told_in_words_and_figures():
    faults = Faults()
    faults.add("000007", ["repetition", None, None, None], [3, 2, 1, 1])
    text, _ = page(
        [],
        collapse={"alt": describe(["A cat.", "dog"]), "short": describe(["a b c"])},
        faults={"short": faults.report()},
    )
    seen = " ".join(Page(text).text.split())
    for habit in HABITS:
        assert f"{habit.label} {habit.warns}" in seen or f"{habit.label}{habit.warns}" in seen
    for words in (
        "50.0 % 100.0 %",
        "1.5 3.0",
        "25.0 % of 4",
        "50.0 % 25.0 % mended",
        "000007 25.0 % 4 repetition",
    ):
        assert words in " ".join(re.sub(r"<[^>]*>", " ", text).split()), words
    assert "collapse" not in page([])[0].split("<body>")[1].split("<script")[0]


def test_what_was_given_is_in_the_data():
    row = hostile_row(1)
    found = data(page([row], totals={"keep": 9})[0])
    assert found["totals"] == {"keep": 9}
    (told,) = found["rows"]
    assert told["captions"] == dict(row.captions)
    assert told["scores"] == {"match_short": 0.1429, "clip_short": 29.9}
    assert told["verdict"] == told["state"] == "rejected"
    assert told["reason"] == "alt too short"
    assert "flags" not in told  # flag_short is False
    flagged = [data(page([hostile_row(n)])[0])["rows"][0].get("flags") for n in (0, 2, 3)]
    assert flagged == [
        ["short", 'alt: </script><script>document.title="owned"</script>'],
        ["alt: shouting", flagged[1][1]],
        ["short"],
    ]


@in_browser
@pytest.mark.timeout(120)
def test_strangers_words_stay_words(hostile, tmp_path):
    seen = Page(open_page(hostile, tmp_path))
    assert "<title>owned" not in seen.text
    assert seen.ids == [row.sample_id for row in ROWS[:48]]
    for text in (*HOSTILE[:4], HOSTILE[7], "drawkcab", "قطة سوداء 黒猫 🐈‍⬛", "(+96,000 characters)"):
        assert text in seen.text, text
    assert "44 of 1,000,000 that are kept, 43 of 43 that are rejected, 43 of 43 that are failed" in seen.text
    assert "130 of 130 rows, 1 to 48 shown" in seen.text
    cut = sum(len(text) > 4000 for row in ROWS for text in (row.captions["alt"],))
    assert re.search(
        rf"130 rows and 78 pictures take \d.\d MB of at most 64.0 MB; texts of {cut} rows were cut", seen.text
    )
    pictures = [attrs for tag, attrs in seen.tags if tag == "img"]
    assert len(pictures) == sum(isinstance(row.image, np.ndarray) for row in ROWS[:48])
    assert all(attrs["src"].startswith("data:image/webp;base64,") and attrs["alt"] for attrs in pictures)
    assert not [name for _, attrs in seen.tags for name in attrs if name.startswith("on")]


@in_browser
@pytest.mark.timeout(120)
def test_the_page_holds_without_its_policy_and_on_a_phone(hostile, tmp_path):
    look = """addEventListener("load", async () => {
        const all = [...document.images];
        await Promise.all(all.map((one) => one.decode().catch(() => 0)));
        parent.postMessage({
            width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth, title: document.title,
            blank: all.filter((one) => !one.naturalWidth).length, pictures: all.length,
            scripts: document.scripts.length, cards: document.querySelectorAll("#cards > li").length,
            bars: document.querySelectorAll("#collapse svg.bars g").length,
            wide: [...document.querySelectorAll(".row > *, form > *")].filter(
                (e) => e.getBoundingClientRect().right > innerWidth).length,
            fetched: performance.getEntriesByType("resource").filter((e) => !e.name.startsWith("data:")).length,
            names: [...document.querySelectorAll("button, input, select")].filter((e) => !e.closest("[hidden]") &&
                !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim())).length,
        }, "*")})"""
    checked(hostile, look, "checked.html")
    frame = hostile.with_name("phone.html")
    frame.write_text(
        """<body><iframe src="checked.html" width="360" height="800" style="border:0"></iframe><script>
        addEventListener("message", (e) => { document.body.dataset.seen = JSON.stringify(e.data); })</script></body>"""
    )
    seen = seen_by(frame, tmp_path)
    assert seen["title"].startswith("</script>")
    assert seen["width"] == 360
    assert seen["overflow"] <= 0
    assert seen["wide"] == seen["blank"] == seen["fetched"] == seen["names"] == 0
    assert seen["scripts"] == 2  # the page's, whose data is gone by now, and this one
    assert (seen["cards"], seen["bars"]) == (48, sum(len(one["lengths"]) for one in styles(COLLAPSE)))


def scored(name, rows, down):
    given = [row for row in rows if row.scores[name] is not None and np.isfinite(row.scores[name])]
    rest = [row for row in rows if row not in given]
    return sorted(given, key=lambda row: round(float(row.scores[name]), 4), reverse=down) + rest


def kept(condition):
    return [row for row in ROWS if condition(row)]


ADDRESSES = {
    "verdict=failed": kept(lambda row: row.verdict == "failed"),
    "reason=Caption&page=1": kept(lambda row: row.verdict == "failed"),
    "flag=short": kept(lambda row: row.scores["flag_short"]),
    "flag=alt%3A+shouting&verdict=keep": kept(
        lambda row: isinstance(row.scores["flag_alt"], list) and row.reason is None
    ),
    "q=CAT+101": [ROWS[101]],
    "q=" + quote(HOSTILE[0], safe=""): kept(lambda row: row.captions["alt"] == HOSTILE[0]),
    "q=" + ROWS[99].sample_id: [ROWS[99]],
    "q=no+such+words": [],
    "sort=clip_short": ROWS[::-1],
    "sort=-match_short&page=2": scored("match_short", ROWS, True)[48:],
    "sort=logp_alt&verdict=keep": scored("logp_alt", kept(lambda row: row.verdict == "keep"), False),
    "page=3": ROWS[96:],
    "page=99": ROWS[96:],
    "verdict=%3Cscript%3E&reason=none&flag=x&sort=constructor&page=-5&other=1": ROWS,
    "q=%E0%A4%A&page=1e99": [],
}


@in_browser
@pytest.mark.timeout(120)
def test_an_address_restores_what_was_seen(hostile, tmp_path):
    seen = Page(open_page(hostile, tmp_path / "one", "q=cat&sort=clip_short&verdict=rejected"))
    cats = kept(lambda row: row.verdict == "rejected" and row.captions["short"])
    assert seen.ids == [row.sample_id for row in cats[::-1]]
    assert sum(tag == "mark" for tag, _ in seen.tags) >= len(cats)
    visit = f"""(async () => {{
        const seen = [];
        for (const one of {json.dumps(list(ADDRESSES))}) {{
            location.hash = one;
            await new Promise((done) => setTimeout(done, 50));
            seen.push([...document.querySelectorAll(".row")].map((row) => row.dataset.id));
        }}
        document.body.dataset.seen = JSON.stringify(seen);
    }})()"""
    found = seen_by(checked(hostile, visit, "visited.html"), tmp_path / "two")
    for (anchor, expected), ids in zip(ADDRESSES.items(), found, strict=True):
        assert ids == [row.sample_id for row in expected[:48]], anchor


@in_browser
@pytest.mark.timeout(120)
def test_it_is_worked_by_mouse_and_by_keys(hostile, tmp_path):
    work = """(async () => {
        const $ = (s) => document.querySelector(s), seen = [];
        const rows = () => document.querySelectorAll(".row").length;
        const note = () => seen.push([location.hash, $("#count").textContent, rows()]);
        const key = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        const pause = () => new Promise((done) => setTimeout(done, 400));
        key("ArrowRight"); note();
        $('#verdict input[value=keep]').click(); note();
        key("/"); const focused = document.activeElement.id;
        $("#q").value = "cat"; $("#q").dispatchEvent(new Event("input")); await pause(); note();
        $("#sort").value = "clip_short"; $("#sort").dispatchEvent(new Event("change")); $("#down").click(); note();
        const first = $(".row").dataset.id;
        $("#clear").click(); note();
        const more = $(".more"), short = more.closest("dl").querySelector(".long").offsetHeight;
        more.click(); const long = more.closest("dl").querySelector(".long").offsetHeight;
        location.hash = "#verdict=failed"; await pause(); note();
        $(".foot a").click(); await pause(); note();
        location.hash = "#collapse"; await pause(); note();
        const before = getComputedStyle(document.body).backgroundColor; $("#theme").click();
        const theme = before !== getComputedStyle(document.body).backgroundColor;
        document.body.dataset.seen = JSON.stringify({ seen, focused, first, theme, grown: long > 2 * short });
    })()"""
    found = seen_by(checked(hostile, work, "worked.html"), tmp_path)
    cats = kept(lambda row: row.verdict == "keep" and row.captions["short"])
    assert found["focused"] == "q"
    assert found["theme"]
    assert found["grown"]
    assert found["first"] == cats[0].sample_id
    assert found["seen"] == [
        ["#page=2", "130 of 130 rows, 49 to 96 shown", 48],
        ["#verdict=keep", "44 of 130 rows", 44],
        ["#q=cat&verdict=keep", f"{len(cats)} of 130 rows", len(cats)],
        ["#q=cat&verdict=keep&sort=-clip_short", f"{len(cats)} of 130 rows", len(cats)],
        ["#all=", "130 of 130 rows, 1 to 48 shown", 48],
        ["#verdict=failed", "43 of 130 rows", 43],
        [f"#q={ROWS[2].sample_id}", "1 of 130 rows", 1],
        ["#collapse", "1 of 130 rows", 1],  # a place on the page is no filter
    ]


@in_browser
@pytest.mark.timeout(120)
def test_two_thousand_rows_are_opened(tmp_path):
    picture = noise(64, 96)  # nothing is harder to compress
    rows = (Row(sample_id=f"{n:06x}", image=picture, captions={"alt": f"row {n}"}) for n in range(2000))
    path = tmp_path / "many.html"
    with open(path, "wb") as file:
        counts = write_gallery(rows, file, limits=Limits(rows=2000, megabytes=16))
    assert counts["rows"] == counts["pictures"] == 2000
    assert path.stat().st_size < 16 * 2**20 + 60_000
    seen = Page(open_page(path, tmp_path / "one", "page=42"))
    assert seen.ids == [f"{n:06x}" for n in range(1968, 2000)]


@in_browser
@pytest.mark.timeout(120)
def test_rows_of_nothing_but_none_and_no_rows_are_shown(tmp_path):
    path = tmp_path / "none.html"
    empty = [Row(sample_id=None), Row(sample_id="", captions={"alt": None}, scores={"logp_alt": None, "flag_x": None})]
    path.write_text(page(empty, collapse={"alt": describe([])}, faults={"alt": Faults().report()})[0], encoding="utf-8")
    seen = Page(open_page(path, tmp_path / "profile"))
    assert seen.ids == ["", ""]
    assert "2 of 2 rows" in seen.text
    assert "no image" in seen.text
    path.write_text(page([])[0], encoding="utf-8")
    assert "No row is like that." in Page(open_page(path, tmp_path / "again")).text


def test_more_rows_than_the_limit_are_refused():
    limits = Limits(rows=3)
    assert page(ROWS[:3], limits=limits)[1]["rows"] == 3
    with pytest.raises(ValueError, match="more came"):
        page(iter(ROWS), limits=limits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"rows": 0}, "at least one row"), ({"edge": 8}, "16 to 2048"), ({"rows": 10_000, "megabytes": 8}, "do not fit")],
)
def test_limits_check_themselves(fields, message):
    with pytest.raises(ValueError, match=message):
        Limits(**fields)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    texts=st.lists(st.one_of(st.none(), st.text(), st.sampled_from(HOSTILE)), min_size=4, max_size=4),
    score=st.one_of(st.none(), st.floats(), st.booleans(), st.text(max_size=5), st.lists(st.text(max_size=3))),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
)
def test_any_row_fits_its_share_and_ends_no_script(texts, score, size):
    limits = Limits(rows=8192, megabytes=16)
    row = Row(
        sample_id=texts[0] or "0",
        key=texts[1],
        image=noise(*size),
        captions={"alt": texts[2], "short": texts[3]},
        scores={"logp_alt": score, "flag_alt": score},
        reason=texts[3],
    )
    text, counts = page([row], limits=limits)
    empty = page([], limits=limits)[1]["bytes"]
    assert counts["bytes"] - empty <= limits.share
    block = text[text.index('id="rows">') + 10 : text.index("</script>", text.index('id="rows">'))]
    assert not set(block) & set("<>&\u2028\u2029")
    (told,) = json.loads(block)["rows"]
    short = [one for one in texts[2:] if one is not None and len(one) <= 40]
    clean = [one.encode(errors="replace").decode() for one in short]
    assert set(clean) <= set(told["captions"].values())


@pytest.mark.parametrize("size", [(2000, 1000), (1, 5000), (64, 64), (7, 3), (97, 200)])
def test_thumbnails_keep_their_shape_and_their_bounds(size):
    data, height, width = thumbnail(noise(*size), 128, 20_000)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (width, height)
        if max(size) < 96:
            assert np.array_equal(np.asarray(image.convert("RGB")), noise(*size))
    assert len(data) <= 20_000
    assert max(height, width) == min(128, max(size))
    assert (height, width) == fit(*size, 128)
    coarse = thumbnail(noise(*size), 128, 900)
    assert coarse is None or len(coarse[0]) <= 900
    assert thumbnail(noise(*size), 128, 10) is None


def test_a_picture_without_room_says_so():
    limits = Limits(rows=8192, megabytes=16)
    captions = {f"style{n}": "word " * 900 for n in range(12)}
    text, counts = page([Row(sample_id="0", image=noise(90, 90), captions=captions)], limits=limits)
    (told,) = data(text)["rows"]
    assert counts["cut"] == 1
    assert told["captions"]["style3"].endswith("… (+4,460 characters)")
    assert ("image" in told) != (told.get("lost") == "no room on the page")
