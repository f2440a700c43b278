import email.utils
import json
import pickle
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.backends import http
from captioner.backends.endpoint import EndpointConfig, caption_of
from captioner.backends.protocol import CaptionError
from captioner.styles import Style
from infra.config import from_dict, to_dict
from tests.captioner.backends import server
from tests.captioner.backends.server import completion, status

SHORT = Style(name="short", prompt="Describe this picture in one sentence.", max_tokens=30)
ABOUT = Style(name="about", prompt="Describe this picture.[ Its file says: {alt}]", max_tokens=60)
KEY = "sk-test-0123456789-secret"


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(http, "BACKOFF", 0.01)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def serve():
    started = []

    def start(answer):
        started.append(server.Endpoint(answer))
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.close()


def build(endpoint, styles=(SHORT,), actors=1, **options):
    options = {"timeout": 2.0, "patience": 5.0, "tries": 4, "concurrency": 4} | options
    config = EndpointConfig(base_url=endpoint.url, model="a-model", **options)
    config.check(styles)
    return config.build(styles, "cpu", "fp32", actors)


def grey(shade, size=(8, 12)):
    return np.full((*size, 3), shade, np.uint8)


def one(endpoint, **options):
    return build(endpoint, **options).caption([grey(10)], [None])[0][0]


def shade(body):
    return round(np.asarray(server.picture(body).convert("L")).mean() / 10)


def test_each_row_and_style_gets_its_own_answer(serve):
    def answer(body, number):
        time.sleep(0.01 * (number % 3))  # answers come in another order
        return completion(f" {shade(body)} {server.prompt(body)}\n")

    endpoint = serve(answer)
    alts = [None, "seven", "", *[f"alt {row}" for row in range(3, 20)]]
    said = build(endpoint, (SHORT, ABOUT)).caption([grey(10 * row) for row in range(20)], alts)
    assert said[0] == [f"{row} {SHORT.prompt}" for row in range(20)]
    assert said[1] == [
        f"{row} Describe this picture.{f' Its file says: {alt}' if alt else ''}" for row, alt in enumerate(alts)
    ]
    assert 2 <= endpoint.most_busy <= 4
    assert len(endpoint.bodies) == 40


@pytest.mark.parametrize(("encoding", "kind"), [("jpeg", "JPEG"), ("png", "PNG")])
def test_what_is_sent(serve, encoding, kind):
    endpoint = serve(lambda body, number: completion("x"))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 100, 3), dtype=np.uint8)
    build(endpoint, (ABOUT,), encoding=encoding, max_side=50, seed=7).caption(
        [pixels, pixels[:5, :7]], ["a {b} [c]", None]
    )
    large, small = sorted(endpoint.bodies, key=lambda body: -server.picture(body).width)
    assert {name: large[name] for name in ("model", "max_tokens", "temperature", "seed")} == {
        "model": "a-model",
        "max_tokens": 60,
        "temperature": 0,
        "seed": 7,
    }
    assert set(large) == {"model", "messages", "max_tokens", "temperature", "seed"}
    assert server.prompt(large) == "Describe this picture. Its file says: a {b} [c]"
    assert (server.picture(large).size, server.picture(large).format) == ((50, 15), kind)
    assert server.picture(small).size == (7, 5)
    assert large["messages"][0]["content"][0]["image_url"]["url"].startswith(f"data:image/{encoding};base64,")
    if encoding == "png":
        assert np.array_equal(np.asarray(server.picture(small)), pixels[:5, :7])


@pytest.mark.parametrize("pixels", [np.zeros((0, 5, 3), np.uint8), np.zeros((4, 4), np.float64)])
def test_a_picture_that_cannot_be_sent_fails_alone(serve, pixels):
    endpoint = serve(lambda body, number: completion("fine"))
    bad, good = build(endpoint).caption([pixels, grey(1)], [None, None])[0]
    assert str(bad).startswith("decode_error: ")
    assert good == "fine"


@pytest.mark.parametrize("failing", [408, 429, 500, 502, 503, 529])
def test_errors_of_the_moment_are_tried_again(serve, failing):
    endpoint = serve(lambda body, number: status(failing) if number <= 2 else completion("fine"))
    assert one(endpoint) == "fine"
    assert len(endpoint.bodies) == 3
    assert endpoint.bodies[0] == endpoint.bodies[2]


@pytest.mark.parametrize("code", [400, 401, 403, 404, 413, 422])
def test_errors_that_stay_are_not(serve, code):
    endpoint = serve(lambda body, number: status(code, {"error": {"message": "no such\n  thing", "code": 7}}))
    assert str(one(endpoint)) == f"http_{code}: no such thing"
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (status(429, {"error": {"message": "slow down"}}), "rate_limit: slow down (given up after 3 tries)"),
        (status(500, b"<html>oh"), "http_500: <html>oh (given up after 3 tries)"),
        (status(503), "http_503: Service Unavailable (given up after 3 tries)"),
        (server.slam, "error: connection: "),
        (server.cut("length"), "error: connection: IncompleteRead"),
        (server.cut("chunks"), "error: connection: IncompleteRead"),
        (server.cut(None), "error: the answer is not JSON: "),
        (status(200, b"not json"), "error: the answer is not JSON: "),
        (status(200, b"[" * 100_000), "error: the answer is not JSON: "),
        (status(200, b"\xff\xfe\xfd"), "error: the answer is not JSON: "),
    ],
)
def test_what_does_not_mend_is_given_up_with_its_reason(serve, answer, reason):
    endpoint = serve(lambda body, number: answer)
    assert str(one(endpoint, tries=3)).startswith(reason)
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize("broken", [server.cut("length"), server.cut("chunks"), server.slam, status(200, b"{")])
def test_a_cut_answer_is_asked_for_again(serve, broken):
    endpoint = serve(lambda body, number: broken if number == 1 else completion("whole"))
    assert one(endpoint) == "whole"


@pytest.mark.parametrize("slow", [server.hang(3), server.drip(3)])
def test_a_server_that_hangs_is_left_in_time(serve, slow):
    endpoint = serve(lambda body, number: slow)
    started = time.monotonic()
    assert str(one(endpoint, timeout=0.2, tries=2)).startswith(
        "timeout: no whole answer within 0.2 s (given up after 2"
    )
    assert time.monotonic() - started < 2
    assert len(endpoint.bodies) == 2


def test_all_tries_together_have_an_end(serve):
    endpoint = serve(lambda body, number: server.hang(3))
    started = time.monotonic()
    assert str(one(endpoint, timeout=0.3, tries=100, patience=0.8)).startswith("timeout: ")
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_kept_by_all_threads(serve, form):
    asked = []

    def answer(body, number):
        asked.append(time.monotonic())
        if number == 1:
            # A date has no fractions of a second.
            value = "0.5" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
            return status(429, Retry_After=value)
        return completion("fine")

    endpoint = serve(answer)
    said = build(endpoint, concurrency=1, patience=10).caption([grey(1), grey(2), grey(3)], [None] * 3)[0]
    assert said == ["fine"] * 3
    assert asked[1] - asked[0] >= (0.5 if form == "seconds" else 0.9)
    assert asked[2] - asked[1] < 0.5


def test_a_retry_after_beyond_patience_ends_the_tries_and_holds_nobody(serve):
    endpoint = serve(lambda body, number: status(429, Retry_After="86400") if number == 1 else completion("fine"))
    started = time.monotonic()
    said = build(endpoint, concurrency=1).caption([grey(1), grey(2)], [None] * 2)[0]
    assert str(said[0]).startswith("rate_limit: ")
    assert said[1] == "fine"
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("value", ["soon", "-5", "", "Wed, 99 Foo 2020", "nan", "inf", "1e9"])
def test_a_retry_after_that_says_nothing_is_passed_over(serve, value):
    endpoint = serve(lambda body, number: status(503, Retry_After=value) if number == 1 else completion("fine"))
    assert one(endpoint) == "fine"


def test_one_row_is_refused_and_the_others_are_not(serve):
    def answer(body, number):
        filtered = {"error": {"code": "content_policy_violation", "message": "not this one"}}
        return status(400, filtered) if shade(body) == 3 else completion(f"row {shade(body)}")

    said = build(serve(answer)).caption([grey(10 * row) for row in range(6)], [None] * 6)[0]
    assert str(said.pop(3)) == "refused: not this one"
    assert said == [f"row {row}" for row in (0, 1, 2, 4, 5)]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"choices": []}, "error: the answer has no caption: {'choices': []}"),
        ({}, "error: the answer has no caption"),
        ([], "error: the answer has no caption"),
        ("text", "error: the answer has no caption"),
        (None, "error: the answer has no caption"),
        ({"choices": [{"message": None}]}, "error: the answer has no caption"),
        (completion(None, finish_reason="length"), "error: the caption is empty (finish_reason: length)"),
        (completion("  \n "), "error: the caption is empty"),
        (completion("", finish_reason="content_filter"), "refused: the server's filter kept the caption back"),
        ({"choices": [{"message": {"content": None, "refusal": "I will not."}}]}, "refused: I will not."),
        ({"error": {"message": "inside"}}, "error: the answer has no caption: {'error': {'message': 'inside'}}"),
    ],
)
def test_answers_without_a_caption(answer, reason):
    with pytest.raises(CaptionError) as told:
        caption_of(answer)
    assert str(told.value).startswith(reason)


def test_an_answer_in_parts():
    assert (
        caption_of(completion([{"type": "text", "text": "a "}, {"type": "text", "text": "dot"}, {}, None])) == "a dot"
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["choices", "message", "content", "refusal", "text"]) | st.text(), inner)
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_a_caption_or_an_error(answer):
    for given_answer in (answer, {"choices": answer}, {"choices": [{"message": answer}]}, completion(answer)):
        try:
            said = caption_of(given_answer)
        except CaptionError as error:
            said = error.kind
        assert said.strip()


def test_the_rate_is_kept_and_shared_out(serve):
    endpoint = serve(lambda body, number: completion("x"))
    backend = build(endpoint, actors=3, requests_per_minute=3600, concurrency=8)  # 20 a second for each of the three
    backend.caption([grey(1)] * 12, [None] * 12)
    spans = np.array(endpoint.times[10:]) - np.array(endpoint.times[:2])
    assert spans.min() > 10 / 20 / 2  # the first requests of a loaded machine are late
    assert spans.max() < 3


def test_the_limiter_spaces_turns():
    limiter = http.Limiter(600)
    turns = [limiter.turn() for _ in range(5)]
    assert turns == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=0.05)
    limiter.hold(2)
    assert limiter.turn() == pytest.approx(2, abs=0.05)
    unlimited = http.Limiter(None)
    assert [unlimited.turn() for _ in range(3)] == pytest.approx([0, 0, 0], abs=0.01)


def test_the_key_is_sent_and_told_to_nobody(serve, monkeypatch):
    monkeypatch.setenv("CAPTION_KEY", f" {KEY}\n")

    def answer(body, number):
        if number == 1:
            return status(400, {"error": {"message": f"Incorrect API key provided: {KEY}."}})
        return status(200, f"what is {KEY}?".encode()) if number == 2 else completion("fine")

    endpoint = serve(answer)
    backend = build(endpoint, key_variable="CAPTION_KEY", tries=1, concurrency=1)
    said = backend.caption([grey(1)] * 3, [None] * 3)[0]
    assert {headers["Authorization"] for headers in endpoint.headers} == {f"Bearer {KEY}"}
    assert [str(outcome).split(":")[0] for outcome in said] == ["http_400", "error", "fine"]
    config = backend._config
    for told in (*map(str, said), *map(repr, said), repr(config), repr(backend._client), json.dumps(to_dict(config))):
        assert KEY not in told
    assert KEY.encode() not in pickle.dumps(config)
    assert "***" in str(said[0])


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_the_key_does_not_follow_a_redirect(serve, monkeypatch, code):
    monkeypatch.setenv("CAPTION_KEY", KEY)
    other = serve(lambda body, number: completion("stolen"))
    endpoint = serve(lambda body, number: status(code, Location=f"{other.url}/chat/completions"))
    assert str(one(endpoint, key_variable="CAPTION_KEY")).startswith(f"http_{code}: ")
    assert other.headers == []


def test_without_a_variable_no_key_is_sent(serve):
    endpoint = serve(lambda body, number: completion("fine"))
    one(endpoint)
    assert not any("Authorization" in headers for headers in endpoint.headers)


@pytest.mark.parametrize("value", [None, "", "  ", "schlüssel", "two\nlines"])
def test_a_key_that_is_none_stops_the_run(serve, monkeypatch, value):
    endpoint = serve(lambda body, number: completion("fine"))
    monkeypatch.delenv("CAPTION_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("CAPTION_KEY", value)
    with pytest.raises(ValueError, match="CAPTION_KEY") as told:
        build(endpoint, key_variable="CAPTION_KEY")
    assert not (value or "").strip() or value not in str(told.value)


def test_a_key_that_is_not_taken_stops_the_run(serve, monkeypatch):
    monkeypatch.setenv("CAPTION_KEY", KEY)
    endpoint = serve(lambda body, number: completion("fine"))
    endpoint.models_status = 401
    with pytest.raises(ValueError, match=r"does not take the key in CAPTION_KEY: HTTP 401"):
        build(endpoint, key_variable="CAPTION_KEY")
    with pytest.raises(ValueError, match=r"does not take requests without a key"):
        build(endpoint)
    endpoint.models_status = 404  # has no list of models
    assert one(endpoint) == "fine"


def test_a_server_that_is_not_there_stops_the_run(serve):
    endpoint = serve(lambda body, number: completion("fine"))
    endpoint.close()
    with pytest.raises(ConnectionError, match=r"Nobody answers at http://127.0.0.1:\d+/v1"):
        build(endpoint)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base_url": "localhost:8000"}, "base_url must be like"),
        ({"base_url": "file:///etc/passwd"}, "base_url must be like"),
        ({"base_url": f"https://user:{KEY}@host/v1"}, "holds more than an address"),
        ({"base_url": f"https://host/v1?api-key={KEY}"}, "holds more than an address"),
        ({"model": ""}, "Name the model"),
        ({"key_variable": KEY}, "not a key"),
        ({"concurrency": 0}, "concurrency must be positive"),
        ({"patience": -1.0}, "patience must be positive"),
        ({"requests_per_minute": 0.0}, "requests_per_minute must be positive"),
    ],
)
def test_configs_check_themselves(options, said):
    with pytest.raises(ValueError, match=said) as told:
        EndpointConfig(**{"base_url": "http://host/v1", "model": "m"} | options)
    assert KEY not in str(told.value)


@pytest.mark.parametrize("options", [{"beams": 4}, {"min_tokens": 5}, {"decoder": "alt"}, {"prompt": " "}])
def test_styles_that_an_endpoint_cannot_speak_in(options):
    style = Style(**{"name": "odd", "prompt": "Describe."} | options)
    with pytest.raises(ValueError, match="'odd'"):
        EndpointConfig(base_url="http://host/v1", model="m").check((style,))


def test_a_config_survives_its_plain_form():
    config = EndpointConfig(base_url="http://host/v1", model="m", requests_per_minute=30.0, key_variable="A_KEY")
    assert from_dict(EndpointConfig, json.loads(json.dumps(to_dict(config)))) == config
