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
told = {}
for kind, name in json.loads(sys.argv[1]).items():
    for number, loads in enumerate(KINDS[kind]):
        try:
            loads(name)
            told[f"{kind} {number}"] = "had"
        except Exception as error:
            told[f"{kind} {number}"] = f"{type(error).__name__}: {error}"
print(json.dumps([told, len(waits)]))
"""
WAYS = {
    "away": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 does not answer"),
    "offline": ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
}


def loaded(names, cache, variables):
    """What each loader came to, how often a silent hub was asked again, and what was written to standard error."""
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", LOADS, json.dumps(names)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return *json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", WAYS)
def test_names_where_the_hub_is_away(way, tmp_path):
    variables, cause = WAYS[way]
    names = {kind: f"owner/{kind}" for kind in ("blip", "llava", "clip", "clip_text")} | {"t5": "owner/name/t5"}
    told, _, written = loaded(names, tmp_path, variables)
    assert len(told) == 11
    for loader, said in told.items():
        name = names[loader.split()[0]]
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
@pytest.mark.parametrize("way", WAYS)
def test_folders_ask_nobody(way, tmp_path, clip):  # noqa: F811
    folders = {
        "blip": tiny.blip(tmp_path / "blip"),
        "llava": tiny.llava(tmp_path / "llava"),
        "clip": clip[1],
        "clip_text": str(encoders.clip(tmp_path / "clip_text")),
        "t5": str(encoders.t5(tmp_path / "t5")),
    }
    told, asked, _ = loaded(folders, tmp_path / "cache", WAYS[way][0])
    assert set(told.values()) == {"had"}
    assert asked == 0, "a folder's files are all that is wanted"
