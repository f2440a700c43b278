"""Blind pairs: what the page gives away, what a person does there, and what the answers come to."""

import base64
import json
import re
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from infra import storage
from infra.cluster import Cluster
from infra.data.images import decode
from infra.store import Artifact, Store
from t2i.evaluate import intervals
from t2i.evaluate.rating import TIE, seal
from tests import kills
from tests.browser import LAYOUT, in_browser, seen
from tests.workflows.test_compare import HOSTILE, pictures
from tests.workflows.test_evaluate import make, shapes_row
from workflows.corpora.shapes import draw_scene, render
from workflows.rate import RateConfig, rate
from workflows.rated import score_files

CLUSTER = Cluster(name="test", actors=(1, 1))


@pytest.fixture
def scenes():
    rng = np.random.default_rng(0)
    return [draw_scene(rng) for _ in range(12)]


@pytest.fixture
def samples(scenes, tmp_path):
    """Two models' pictures: the second's are wrong, but for the first and the last, which are the same."""
    wrong = tuple(range(1, 11))
    prompts = [HOSTILE if number == 5 else f"prompt {number}" for number in range(12)]
    made = [pictures(tmp_path, name, scenes, each, prompts) for name, each in (("a", ()), ("b", wrong))]
    for each, name in zip(made, "ab", strict=True):  # of ids of their own, as they have in a store
        told = storage.read_json(each.url("manifest.json")) | {"id": name * 16}
        storage.write_json(each.url("manifest.json"), told)
    return [Artifact.open(each.path) for each in made]


@pytest.fixture
def captions(tmp_path):
    """A corpus of 20 and its captions in two styles, equal in every fourth row, none in another."""
    rng = np.random.default_rng(0)
    rows = [shapes_row(number, rng)[0] for number in range(20)]
    told = [
        {"sample_id": row["sample_id"], "state": "accepted", "reason": None, "caption_short": row["reference_short"]}
        | {"caption_descriptive": row["reference_short" if n % 4 == 0 else "reference_descriptive"] if n != 7 else None}
        for n, row in enumerate(rows)
    ]
    images = make(tmp_path, "ingest", shards=[rows[:10], rows[10:]])
    summary = {"styles": [{"name": "short"}, {"name": "descriptive"}]}
    return rows, make(tmp_path, "recaption", [images], [told[:10], told[10:]], summary=summary)


def page_of(tmp_path, first, second=None, **config):
    made = Store(str(tmp_path / "runs"), CLUSTER).step(rate, RateConfig(**config), first, second)
    text = Path(made.url("rate.html")).read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    return made, text, data["pairs"]


def encoded(uri):
    return base64.b64decode(uri.partition(",")[2])


def key_of(made):
    return storage.read_json(made.url("key.json"))


def written(tmp_path, made, answers, rater="r", name="ratings.json", /, **otherwise):
    told = {"page": made.id, "rater": rater, "answers": answers, "seal": seal(made.id, rater, answers)}
    (tmp_path / name).write_text(json.dumps(told | otherwise))
    return str(tmp_path / name)


def test_pictures_stand_as_the_key_says_and_equal_ones_are_left_out(samples, tmp_path, scenes):
    made, _, pairs = page_of(tmp_path, *samples)
    assert (made.summary["pairs"], made.summary["equal"], len(pairs)) == (10, 2, 10)
    key = key_of(made)
    assert (key["first"], key["second"]) == ("sample/" + "a" * 16, "sample/" + "b" * 16)
    lefts = Counter()
    for pair in pairs:
        number = 5 if pair["prompt"] == HOSTILE else int(pair["prompt"].split()[1])
        right = render(scenes[number], (32, 32))
        marks = [side["mark"] for side in pair["sides"]]
        assert sorted(marks) == sorted(key["pairs"][pair["id"]])
        at = marks.index(key["pairs"][pair["id"]][0])
        assert np.array_equal(decode(encoded(pair["sides"][at]["image"])), right)
        assert not np.array_equal(decode(encoded(pair["sides"][1 - at]["image"])), right)
        lefts[at] += 1
    assert set(lefts) == {0, 1}
    assert page_of(tmp_path, *samples, seed=0)[0].path == made.path
    other = page_of(tmp_path, *samples, seed=1)
    assert [pair["prompt"] for pair in other[2]] != [pair["prompt"] for pair in pairs]
    assert len(page_of(tmp_path, *samples, count=4)[2]) <= 4


def test_the_page_gives_nobody_away(samples, tmp_path):
    drawn = samples[0].url("images/00003.png")
    buffer = BytesIO()
    told = PngInfo()
    told.add_text("parameters", "Model: train_prior/aaaaaaaaaaaaaaaa")
    Image.fromarray(decode(storage.read_bytes(drawn))).save(buffer, "PNG", pnginfo=told)
    storage.write_bytes(drawn, buffer.getvalue())
    _, text, pairs = page_of(tmp_path, *samples)
    plain = re.sub(r"base64,[^\"]*", "", text)
    assert not [word for word in ("a" * 16, "b" * 16, "train_prior", str(tmp_path)) if word in plain]
    for pair in pairs:
        for side in pair["sides"]:
            assert set(side) == {"mark", "text", "image"}
            assert not getattr(Image.open(BytesIO(encoded(side["image"]))), "text", {})
    marks = [side["mark"] for pair in pairs for side in pair["sides"]]
    assert len(set(marks)) == len(marks)  # no side is known again in another pair
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert not re.search(r"url\(|@import|https?:|innerHTML|insertAdjacent|eval\(", plain)


def test_captions_of_two_styles_with_their_picture(captions, tmp_path):
    rows, made = captions
    rated, _, pairs = page_of(tmp_path, made, styles=("short", "descriptive"), count=50)
    assert (rated.summary["pairs"], rated.summary["equal"]) == (14, 5)
    key = key_of(rated)
    assert key["first"].endswith(" short")
    for pair in pairs:
        texts = {side["mark"]: side["text"] for side in pair["sides"]}
        short, long = (texts[mark] for mark in key["pairs"][pair["id"]])
        fits = [row for row in rows if (row["reference_short"], row["reference_descriptive"]) == (short, long)]
        assert any(np.array_equal(decode(encoded(pair["image"])), decode(row["image"])) for row in fits)
    assert page_of(tmp_path, made, styles=("alt", "short"), count=3)[0].summary["pairs"] == 3


def test_what_cannot_be_judged_is_said(captions, samples, tmp_path):
    _, made = captions
    for inputs, config, words in (
        ((made,), {}, "Say which styles are judged"),
        ((made,), {"styles": ("short", "short")}, "Say which styles are judged"),
        ((made, None), {"styles": ("short", "long")}, "There are no captions in the style 'long'"),
        ((samples[0], made), {}, "are of two kinds"),
        ((samples[0],), {}, "give those of two models"),
        ((samples[0], samples[0]), {}, "All 12 pairs are equal"),
    ):
        with pytest.raises(ValueError, match=words):
            page_of(tmp_path, *inputs, **config)
    with pytest.raises(ValueError, match="At least one pair"):
        RateConfig(count=0)


def test_a_win_rate_counts_ties_half_and_has_an_interval(samples, tmp_path):
    made, _, _ = page_of(tmp_path, *samples)
    pairs = key_of(made)["pairs"]
    names = sorted(pairs)
    answers = {name: pairs[name][0] for name in names[:6]} | {names[6]: pairs[names[6]][1], names[7]: TIE}
    told = score_files((written(tmp_path, made, answers),), str(tmp_path / "runs"))
    assert (told["first_wins"], told["second_wins"], told["ties"]) == (6, 1, 1)
    wanted = intervals.share([1.0] * 6 + [0.0, 0.5])
    assert (told["win_rate"], tuple(told["win_rate_interval"])) == (6.5 / 8, wanted.interval)
    assert (told["win_rate_n"], told["pairs"]) == (8, 10)
    assert told["first"] == "sample/" + "a" * 16
    both = (written(tmp_path, made, answers), written(tmp_path, made, {names[0]: pairs[names[0]][1]}, "s", "s.json"))
    told = score_files(both, str(tmp_path / "runs"))
    assert (told["raters"], told["second_wins"]) == (2, 2)
    assert told["win_rate"] == pytest.approx(6 / 8)  # of the pair that both judged, the half


def test_tampered_and_foreign_files_are_refused(samples, tmp_path):
    made, _, _ = page_of(tmp_path, *samples)
    store, pairs = str(tmp_path / "runs"), key_of(made)["pairs"]
    answers = {name: marks[0] for name, marks in pairs.items()}
    whole = written(tmp_path, made, answers)
    sealed = seal(made.id, "r", answers)
    first, second = sorted(pairs)[:2]
    changed = answers | {first: pairs[first][1]}
    for words, told in (
        ("its seal does not fit", {"answers": changed, "seal": sealed}),
        ("its seal does not fit", {"answers": {first: answers[first]}, "seal": sealed}),
        ("its seal does not fit", {"rater": "someone else"}),
        ("its seal does not fit", {"seal": 7}),
        ("none of that pair's sides", {"answers": answers | {first: pairs[second][0]}}),
        ("none of that pair's sides", {"answers": answers | {first: ["x"]}}),
        ("a pair '99' that its page does not have", {"answers": {"99": TIE}}),
        ("nothing was judged", {"answers": {}}),
        ("holds no answers", {"answers": [1, 2]}),
        ("is of no page of the store", {"page": "0" * 16}),
        ("is of no page of the store", {"page": "../../etc"}),
        ("is of no page of the store", {"page": None}),
    ):
        with pytest.raises(ValueError, match=words):
            score_files((written(tmp_path, made, answers, "r", "x.json", **told),), store)
    for text, words in (("{", "it is no JSON"), ("[1]", "holds no answers"), ("null", "holds no answers")):
        (tmp_path / "y.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            score_files((str(tmp_path / "y.json"),), store)
    with pytest.raises(ValueError, match="another file is of the same rater"):
        score_files((whole, whole), store)
    other, _, _ = page_of(tmp_path, *samples, seed=1)
    with pytest.raises(ValueError, match="its answers are of the page"):
        score_files((whole, written(tmp_path, other, {first: TIE}, "s", "s.json")), store)
    storage.write_json(made.url("key.json"), key_of(made) | {"pairs": {n: m[::-1] for n, m in pairs.items()}})
    with pytest.raises(ValueError, match="was changed since the page was made"):
        score_files((whole,), store)


WORK = """const $ = (id) => document.getElementById(id);
localStorage.clear();
const press = (key) => dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
const marks = () => [...document.querySelectorAll("#sides button")].map((b) => b.getAttribute("aria-pressed"));
const places = [], note = () => places.push($("place").textContent);
note(); press("ArrowLeft"); note(); press("ArrowRight"); note(); press("ArrowDown"); note();
press("ArrowUp"); const tied = $("tie").getAttribute("aria-pressed"); note(); press("ArrowUp"); const pressed = marks();
press("x"); $("next").click(); $("next").click(); note();
document.querySelectorAll("#sides button")[1].click(); note();
$("back").click(); note(); $("next").click();
for (let n = 0; n < 20; n++) press("ArrowLeft");
note();
const told = await (await fetch($("download").href)).json();
const stored = Object.keys(localStorage).map((key) => JSON.parse(localStorage.getItem(key)).seal);
return { places, tied, pressed, told, stored, done: !$("done").hidden, pair: $("pair").hidden, title: document.title,
    name: $("download").download, shown: !$("download").hidden };"""


@in_browser
@pytest.mark.timeout(120)
def test_a_person_judges_by_keys_and_taps(samples, tmp_path):
    made, _, pairs = page_of(tmp_path, *samples)
    found = seen(Path(made.url("rate.html")), WORK)
    at = [int(place.split()[1]) if place.startswith("Pair") else place for place in found["places"]]
    assert at == [1, 2, 3, 4, 3, 4, 5, 4, "10 of 10 judged"]
    assert found["tied"] == "true"
    assert found["pressed"] == ["false", "true"]
    assert found["done"] is found["pair"] is found["shown"] is True
    told = found["told"]
    chosen = [pair["sides"][which]["mark"] for pair, which in zip(pairs, (0, 1, 0, 1, *[0] * 6), strict=True)]
    chosen[2] = TIE
    assert told["answers"] == {pair["id"]: mark for pair, mark in zip(pairs, chosen, strict=True)}
    assert found["stored"] == [told["seal"]] == [seal(made.id, told["rater"], told["answers"])]
    (tmp_path / found["name"]).write_text(json.dumps(told))
    code, results, said = kills.here(
        "rate", "--score", str(tmp_path / "ratings.json"), "--store", str(tmp_path / "runs"), "--json"
    )
    assert code == 0, said
    key = key_of(made)["pairs"]
    assert results["first_wins"] == sum(mark == key[pair][0] for pair, mark in told["answers"].items())
    assert results["ties"] == 1
    assert "which count half" in said


@in_browser
@pytest.mark.timeout(120)
def test_answers_are_found_again_and_strangers_words_stay_words(samples, captions, tmp_path):
    made, _, pairs = page_of(tmp_path, *samples)
    page = Path(made.url("rate.html"))
    before = {"page": made.id, "rater": "me", "answers": {pairs[0]["id"]: TIE, "nowhere": TIE, pairs[1]["id"]: "x"}}
    kept = f"localStorage.clear(); localStorage.setItem('rescribe-rate-{made.id}', {json.dumps(json.dumps(before))});"
    text = page.read_text()
    page.with_name("kept.html").write_text(
        text.replace('<script type="application/json"', f'<script>{kept}</script><script type="application/json"')
    )
    look = """const words = [];
        for (let n = 0; n < 9; n++) {
            words.push(document.getElementById("prompt").textContent);
            dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown" }));
        }
        const told = await (await fetch(document.getElementById("download").href)).json();
        return { words, rater: told.rater, title: document.title, count: Object.keys(told.answers).length };"""
    found = seen(page.with_name("kept.html"), look)
    assert found["words"] == [pair["prompt"] for pair in pairs[1:]]
    assert HOSTILE in found["words"]
    assert (found["rater"], found["count"]) == ("me", 10)
    assert found["title"].startswith("Which picture")
    rated, _, _ = page_of(tmp_path, captions[1], styles=("short", "descriptive"), count=5)
    for each in (made, rated):
        for width in (390, 1280):
            told = seen(Path(each.url("rate.html")), LAYOUT, width)
            assert told["overflow"] <= 0
            assert not told["wide"]
            assert told["blank"] <= 1  # the picture that pairs of pictures do not have
            assert told["fetched"] == 0
