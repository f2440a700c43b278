"""A model's folder is data: whatever a stranger put into it, none of it runs."""

import json
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BlipConfig, BlipForConditionalGeneration, CLIPConfig, CLIPModel

from captioner.clip import Clip
from captioner.model import Captioner, from_pretrained
from tests.bomb import Bomb

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CODE = "import os\nos.mkdir({!r})\n"


@pytest.fixture
def mark(tmp_path):
    """What code that runs would leave behind."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def published(vocabulary, tmp_path):
    """A small BLIP as published ones lie."""
    ids = {"bos_token_id": vocabulary.bos, "sep_token_id": vocabulary.sep, "pad_token_id": vocabulary.pad}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 16, **ids, **SIZES}
    blip = BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config={"image_size": 16, "patch_size": 8, **SIZES})
    )
    folder = tmp_path / "blip"
    blip.save_pretrained(folder)
    vocabulary.save(str(folder))
    return folder


@pytest.fixture
def clip(published, tmp_path):
    """A small CLIP as published ones lie; its words are the captioner's."""
    folder = tmp_path / "clip"
    text = {"vocab_size": 500, "max_position_embeddings": 16, "projection_dim": 16, **SIZES}
    vision = {"image_size": 16, "patch_size": 8, "projection_dim": 16, **SIZES}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (published / name).exists():
            (folder / name).write_bytes((published / name).read_bytes())
    return folder


LOADERS = {"blip": lambda folder: from_pretrained(str(folder)), "clip": lambda folder: Clip(str(folder))}


@pytest.fixture(params=["blip", "clip"])
def model(request):
    """A healthy folder, and what loads it."""
    folder = request.getfixturevalue({"blip": "published", "clip": "clip"}[request.param])
    LOADERS[request.param](folder)
    return folder, LOADERS[request.param]


def test_a_pickle_in_place_of_weights(model, mark):
    folder, load = model
    for content in (pickle.dumps(Bomb(mark)), b"\x80\x04." + bytes(100)):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(Exception, match=r"(?i)safetensors|header|deseriali"):
            load(folder)


def test_pickled_weights_alone(model, mark):
    """Older models have no others: weights are read from them, and nothing else."""
    folder, load = model
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    load(folder)
    torch.save({**weights, "bad": Bomb(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights_only|unsupported|pickle"):
        load(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("renamed", [False, True])
def test_code_beside_a_model(model, mark, file, renamed, monkeypatch):
    """`auto_map` names classes in files of the folder; where the family is unknown, a terminal would be asked."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, load = model
    (folder / "evil.py").write_text(CODE.format(str(mark)))
    found = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    names = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoImageProcessor", "AutoProcessor")
    found["auto_map"] = dict.fromkeys(names, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    if renamed and file == "config.json":
        found["model_type"] = "odd"
    if renamed and file == "tokenizer_config.json":
        found["tokenizer_class"] = "Evil"
    (folder / file).write_text(json.dumps(found))
    with suppress(ValueError, OSError, ImportError):
        load(folder)


def test_a_pickle_in_place_of_our_own_weights(make_captioner, tmp_path, mark):
    folder = tmp_path / "ours"
    folder.mkdir()
    make_captioner().save(str(folder))
    Captioner.load(str(folder))
    Path(folder, "model.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(Exception, match=r"(?i)safetensors|header|deseriali"):
        Captioner.load(str(folder))
