import json
import pickle
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from captioner.backends.endpoint import EndpointConfig
from captioner.backends.pretrained import TransformersConfig
from captioner.backends.protocol import CaptionError
from captioner.backends.stages import CaptionWith
from captioner.provenance import Sign
from captioner.styles import Style
from captioner.task import ALT_COLUMN
from infra.config import from_dict, to_dict
from infra.data.stage import ACCEPTED, FAILED, Runner, Stage

STYLES = (Style(name="short", prompt="a"), Style(name="long", prompt="b"))


@dataclass(frozen=True)
class Spoken:
    """A backend and its config in one, which says what it was given to say."""

    said: tuple

    def check(self, styles):
        assert styles == STYLES

    def build(self, styles, device, precision, actors):
        assert (styles, device, precision, actors) == (STYLES, "cpu", "bf16", 3)
        return self

    def caption(self, images, alts):
        assert len(images) == len(alts) == len(self.said[0])
        return [list(outcomes) for outcomes in self.said]


def run(*said, **more):
    stage = CaptionWith(Spoken(said), STYLES, "bf16", actors=3, **more)
    stage.setup()
    rows = len(said[0])
    pixels = [np.zeros((2, 2, 3), np.uint8)] * rows
    batch = {"pixels": pixels, ALT_COLUMN: ["x"] * rows, "state": [ACCEPTED] * rows, "reason": [None] * rows}
    return Runner([stage])(batch)


def test_rows_end_in_a_state_with_a_reason():
    timeout, oom = CaptionError("timeout", "no answer\nin 60 s"), CaptionError("oom", "too much " * 200)
    columns = run(("a", timeout, "c", oom), ("d", "e", oom, timeout))
    assert columns["state"] == [ACCEPTED, FAILED, FAILED, FAILED]
    assert columns["reason"][:2] == [None, "timeout: short: no answer in 60 s"]
    assert columns["reason"][2].startswith("oom: long: too much")
    assert columns["reason"][3].startswith("oom: short: too much")
    assert max(len(reason or "") for reason in columns["reason"]) < 500
    assert columns["caption_short"] == ["a", None, "c", None]
    assert columns["caption_long"] == ["d", "e", None, None]


def test_every_caption_is_signed_in_failed_rows_too():
    timeout = CaptionError("timeout", "no answer")
    sign = Sign({"short": ({"model": "a"},), "long": ({"model": "b"},)})
    columns = run(("a", timeout), ("d", "e"), sign=sign)
    assert columns["state"] == [ACCEPTED, FAILED]
    models = [[line and json.loads(line)["model"] for line in columns[f"provenance_{s}"]] for s in ("short", "long")]
    assert models == [["a", None], ["b", "b"]]


def test_half_characters_do_not_lose_the_shard():
    columns = run(("a \ud83d dot", CaptionError("error", "\udc00")), ("ok é 🟡", "b"))
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    assert table["caption_short"].to_pylist() == ["a ? dot", None]
    assert table["caption_long"][0].as_py() == "ok é 🟡"


def test_it_is_a_stage_that_can_be_sent():
    config = EndpointConfig(base_url="http://host/v1", model="m")
    stage = CaptionWith(config, STYLES, cpus=2, gpus=0.5)
    assert isinstance(stage, Stage)
    assert pickle.loads(pickle.dumps(stage)) == stage
    assert stage.reads == ("pixels", ALT_COLUMN)
    assert stage.writes == ("caption_short", "caption_long", "prompt_tokens", "answer_tokens")
    local = CaptionWith(TransformersConfig(model="x"), STYLES)
    assert local.writes == ("caption_short", "caption_long"), "only a server tells tokens"


def test_styles_are_checked_when_it_is_made():
    with pytest.raises(ValueError, match="'a' sets beams"):
        CaptionWith(EndpointConfig(base_url="http://host/v1", model="m"), (Style(name="a", prompt="x", beams=2),))


@pytest.mark.parametrize(
    "config", [TransformersConfig(model="m"), EndpointConfig(base_url="http://host/v1", model="m")]
)
def test_a_recipe_names_its_backend(config):
    @dataclass(frozen=True, kw_only=True)
    class Recipe:
        backend: TransformersConfig | EndpointConfig | None = None

    Recipe.__annotations__["backend"] = TransformersConfig | EndpointConfig | None
    plain = to_dict(Recipe(backend=config))
    assert plain["backend"]["class"] == type(config).__name__
    assert from_dict(Recipe, plain) == Recipe(backend=config)
