"""Weights by name where the hub is away are told in one sentence with its cause; for a folder nobody is asked."""

import json
import os
import subprocess
import sys
import time

import pytest

from captioner import hub
from tests.captioner.backends import tiny
from tests.captioner.test_scoring import clip  # noqa: F401 -- a fixture
from tests.t2i.conditions import tiny as encoders

LOADS = """
import json, sys, time
from huggingface_hub.utils import _http

waits = []
_http.time.sleep = waits.append  # between tries of a server that does not answer

from captioner.backends.loading import load
from captioner.clip import Clip
from captioner.model import published
from captioner.task import load_captioner, load_tower
from t2i.clip.embedder import Embedder
from t2i.conditions.encoders import TextEncoder, TextEncoderConfig
from workflows.asked import captioner_of
import torch

KINDS = {
    "blip": (published, load_captioner, load_tower, captioner_of),
    "llava": (lambda name: load(name, "", False, torch.float32), captioner_of),
    "clip": (Clip, published, Embedder),
    "clip_text": (lambda name: TextEncoder(TextEncoderConfig(model=name)),),
    "t5": (lambda name: TextEncoder(TextEncoderConfig(model=name)),),
}
for names in json.loads(sys.argv[1]):
    told = {}
    for kind, name in names.items():
        for number, loads in enumerate(KINDS[kind]):
            try:
                loads(name)
                told[f"{kind} {number}"] = "had"
            except Exception as error:
                told[f"{kind} {number}"] = f"{type(error).__name__}: {error}"
    print(json.dumps([told, len(waits)]))
    print(end="\x1e", file=sys.stderr, flush=True)
    waits.clear()
"""
WAYS = {
    "away": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 does not answer"),
    "offline": ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
}
NAMES = {kind: f"owner/{kind}" for kind in ("blip", "llava", "clip", "clip_text")} | {"t5": "owner/name/t5"}


def loaded(several, cache, variables):
    """Of each set of names, what each loader came to, how often a silent hub was asked again, and what was written."""
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", LOADS, json.dumps(several)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-len(several) :]
    return [(*json.loads(line), said) for line, said in zip(lines, done.stderr.split("\x1e"), strict=False)]


@pytest.fixture(scope="module", params=WAYS)
def way(request, clip, tmp_path_factory):  # noqa: F811
    """A way to be away: its cause, and what names and folders came to, in one process that has loaded the libraries."""
    variables, cause = WAYS[request.param]
    place = tmp_path_factory.mktemp(request.param)
    folders = {
        "blip": tiny.blip(place / "blip"),
        "llava": tiny.llava(place / "llava"),
        "clip": clip[1],
        "clip_text": str(encoders.clip(place / "clip_text")),
        "t5": str(encoders.t5(place / "t5")),
    }
    return cause, *loaded([NAMES, folders], place / "cache", variables)


@pytest.mark.timeout(300)
def test_names_where_the_hub_is_away(way):
    cause, (told, _, written), _ = way
    assert len(told) == 11
    for loader, said in told.items():
        name = NAMES[loader.split()[0]]
        assert said.startswith(f"ConnectionError: {name} is not on this machine"), said
        assert cause in said
        assert "give the folder" in said
        assert len(said) < 400
        assert ".." not in said
    assert "Retrying" not in written
    assert "Traceback" not in written


def test_what_is_waited_for_is_said(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(hub, "PATIENCE_SECONDS", 0.05)
    for name in (str(tmp_path), "owner/name"):
        with hub.asked(name, "model"):
            time.sleep(0.3)
    with hub.asked("owner/quick", "model"):
        pass
    time.sleep(0.2)
    assert capfd.readouterr().err.startswith("rescribe: owner/name is being looked for, here and at https://")


@pytest.mark.timeout(300)
def test_folders_ask_nobody(way):
    _, _, (told, asked, _) = way
    assert set(told.values()) == {"had"}
    assert asked == 0, "a folder's files are all that is wanted"
