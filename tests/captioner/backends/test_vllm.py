import io
import json
import pickle
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image

from captioner.backends.vllm import Questions, VLLMConfig
from captioner.styles import Style

SHORT = Style(name="short", prompt="Describe this picture.", min_tokens=2, max_tokens=30)
ABOUT = Style(name="about", prompt="Describe this.[ It says: {alt}]", max_tokens=60)


def questions(**options):
    return Questions(VLLMConfig(model="a/model", **options), (SHORT, ABOUT), "alt")


def test_rows_become_requests():
    ask = questions(encoding="png", max_side=20, seed=5)
    pixels = [np.random.default_rng(row).integers(0, 256, (10, 12 + 30 * row, 3), dtype=np.uint8) for row in range(2)]
    asked = ask({"pixels": pixels, "alt": ["a cat", None]})
    assert (ask.reads, ask.writes) == (("pixels", "alt"), ("caption_short", "caption_about"))
    assert tuple(asked) == ask.writes
    assert [request["sampling_params"] for request in asked["caption_short"]] == [
        {"temperature": 0.0, "min_tokens": 2, "max_tokens": 30, "seed": 5, "detokenize": False}
    ] * 2
    turns = [request["messages"] for request in asked["caption_about"]]
    assert [turn["role"] for (turn,) in turns] == ["user", "user"]
    assert [turn["content"][1] for (turn,) in turns] == [
        {"type": "text", "text": "Describe this. It says: a cat"},
        {"type": "text", "text": "Describe this."},
    ]
    shown = []
    for (turn,) in turns:
        part = turn["content"][0]
        assert part["type"] == "image_url"
        shown.append(Image.open(io.BytesIO(b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,")))))
    assert np.array_equal(np.asarray(shown[0]), pixels[0])
    assert shown[1].size == (20, 5)
    assert json.loads(json.dumps(asked)) == asked
    assert pickle.loads(pickle.dumps(ask)) == ask


def test_how_the_engine_is_set_up():
    engine = VLLMConfig(model="a/model", gpus_per_engine=2, max_length=4096, template_reads="text").engine()
    assert engine["model_source"] == "a/model"
    assert engine["engine_kwargs"]["tensor_parallel_size"] == 2
    assert engine["engine_kwargs"]["max_model_len"] == 4096
    assert engine["engine_kwargs"]["trust_remote_code"] is False
    assert engine["prepare_multimodal_stage"]["model_config_kwargs"]["trust_remote_code"] is False
    assert engine["prepare_multimodal_stage"]["chat_template_content_format"] == "string"
    assert "max_model_len" not in VLLMConfig(model="m").engine()["engine_kwargs"]


def test_ray_data_takes_the_engine():
    from ray.data.llm import vLLMEngineProcessorConfig
    from ray.llm._internal.batch.stages.configs import PrepareMultimodalStageConfig, resolve_stage_config

    engine = VLLMConfig(model="a/model").engine()
    config = vLLMEngineProcessorConfig(**engine, concurrency=(1, 2), should_continue_on_error=True)
    assert (config.model_source, config.batch_size) == ("a/model", 32)
    stage = resolve_stage_config(config.prepare_multimodal_stage, PrepareMultimodalStageConfig, {})
    assert stage.enabled
    assert stage.chat_template_content_format == "openai"


@pytest.mark.parametrize("options", [{"model": ""}, {"batch": 0}, {"max_side": 0}, {"gpus_per_engine": 0}])
def test_configs_check_themselves(options):
    with pytest.raises(ValueError, match=r"needs a model|at least 1"):
        VLLMConfig(**{"model": "m"} | options)


@pytest.mark.parametrize("style", [Style(name="a"), Style(name="a", prompt="x", beams=2)])
def test_styles_it_cannot_speak_in(style):
    with pytest.raises(ValueError, match="'a'"):
        VLLMConfig(model="m").check((style,))
