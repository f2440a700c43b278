"""A served model is not asked twice for what it has said, however slow it is and whoever is killed meanwhile."""

import time
from collections import Counter

import pyarrow as pa
import pytest

from captioner.backends.endpoint import EndpointConfig
from captioner.backends.http import Budget
from captioner.backends.stages import CaptionWith
from captioner.styles import Style
from infra.data import work
from infra.data.actor import Actor
from infra.data.ledger import commit
from infra.data.parts import parts_of
from infra.data.shards import ShardReader
from infra.data.work import StageWork
from tests.captioner.backends import server
from tests.infra.data.test_work import index  # noqa: F401 - a fixture: twenty pictures, one of which is none


class Killed(BaseException):
    """Ends a process where it stands."""


@pytest.fixture
def slow(monkeypatch):
    """A server that takes a twentieth of a second over a caption."""
    monkeypatch.setattr(work, "CALL_SECONDS", 0.2)

    def answer(body, number):
        time.sleep(0.05)
        return server.completion(f"caption {number}")

    endpoint = server.Endpoint(answer)
    yield endpoint
    endpoint.close()


def caption_with(endpoint):
    config = EndpointConfig(base_url=endpoint.url, model="m", concurrency=2)
    return CaptionWith(config, (Style(name="short", prompt="p"),))


def with_alts(index, tmp_path):  # noqa: F811
    alts, ids = str(tmp_path / "alts"), ShardReader([index], "000000", every=True).sample_ids
    states = {"state": ["accepted"] * len(ids), "reason": pa.nulls(len(ids), pa.string())}
    commit(alts, "000000", pa.table({"sample_id": ids, **states, "caption_alt": ["a picture"] * len(ids)}))
    return (index, alts)


def test_a_key_that_is_taken_no_longer_fails_no_row(slow, index, tmp_path):  # noqa: F811
    slow.answer = lambda body, number: server.completion("fine") if number < 12 else server.status(401)
    out, stage = str(tmp_path / "out"), caption_with(slow)
    result = Actor(StageWork((stage,), with_alts(index, tmp_path), 64), out, 1000, 100.0)._run("000000")
    assert result["ended"] == "away"
    assert result["error"].startswith("The server takes the key no longer: http_401")
    assert sum(part.accepted for part in parts_of(out, "000000")) == 11
    assert sum(part.failed for part in parts_of(out, "000000")) <= 1, "but for the picture that is none"


@pytest.mark.parametrize(("requests", "styles"), [(1, 1), (9, 1), (14, 2), (19, 2)])
def test_what_a_budget_paid_for_is_kept(slow, index, tmp_path, requests, styles):  # noqa: F811
    # Some are answered at the second try, which spends requests that later pictures then lack.
    tried = set()

    def answer(body, number):
        asked = server.prompt(body) + body["messages"][0]["content"][0]["image_url"]["url"]
        if number % 5 == 2 and asked not in tried:
            tried.add(asked)
            return server.status(503, Retry_After="0.05")
        said.append(asked)
        return server.completion("fine")

    said, slow.answer = [], answer
    config = EndpointConfig(base_url=slow.url, model="m", concurrency=3)
    asked = tuple(Style(name=f"s{number}", prompt=f"p{number}") for number in range(styles))
    images, out = with_alts(index, tmp_path), str(tmp_path / "out")
    frugal = Actor(StageWork((CaptionWith(config, asked, budget=Budget(requests)),), images, 64), out, 1000, 100.0)
    result = frugal._run("000000")
    assert result["ended"] == "halt"
    assert result["error"] == f"The budget of {requests} requests is used up. Give the line again, and it goes on."
    assert len(slow.bodies) == requests
    pictures = Counter(each.partition("data:")[2] for each in said)
    whole = sum(count == styles for count in pictures.values())
    assert sum(part.accepted for part in parts_of(out, "000000")) == whole
    assert len(pictures) - whole <= 3, "pictures that are half done"
    assert frugal._run("000000")["ended"] == "halt", "it asks for nothing more"
    assert len(slow.bodies) == requests
    rest = Actor(StageWork((CaptionWith(config, asked),), images, 64), out, 1000, 100.0)
    assert rest._run("000000")["ended"] == "well"
    table = ShardReader([out], "000000")
    assert all(set(table.columns([f"caption_{style.name}"])[f"caption_{style.name}"]) == {"fine"} for style in asked)


def test_a_killed_actor_is_followed_by_one_that_asks_for_the_rest(slow, index, tmp_path, monkeypatch):  # noqa: F811
    out, calls = str(tmp_path / "out"), []
    caption = CaptionWith.__call__

    def watched(self, batch):
        calls.append(len(batch["pixels"]))
        if len(calls) == 4:
            raise Killed
        return caption(self, batch)

    monkeypatch.setattr(CaptionWith, "__call__", watched)
    images = with_alts(index, tmp_path)
    stage = caption_with(slow)
    with pytest.raises(Killed):
        Actor(StageWork((stage,), images, 64), out, 1000, 0.0)._run("000000")
    assert max(calls) <= 8 < 64, "a call takes some tenths of a second, and not all rows at once"
    kept = sum(part.accepted for part in parts_of(out, "000000"))
    assert kept == len(slow.bodies) >= 6
    assert Actor(StageWork((stage,), images, 64), out, 1000, 0.0)._run("000000")["error"] == ""
    pictures = Counter(body["messages"][0]["content"][0]["image_url"]["url"] for body in slow.bodies)
    assert len(pictures) == 19
    assert set(pictures.values()) == {1}
    texts = ShardReader([out], "000000").columns(["caption_short"])["caption_short"]
    assert len(set(texts)) == 19
