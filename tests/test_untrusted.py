"""Recipes, models and checkpoints are data: a pickle in their place is refused, and what they do not know is named."""

import hashlib
import json
import pickle
import re

import pytest
import torch
from safetensors.torch import save_model

from infra import storage
from infra.config import to_dict
from infra.train import checkpoint
from t2i.priors.task import PriorShape, load_prior
from t2i.protocol import Space
from t2i.tokenizers.task import build_tokenizer, load_tokenizer, save_tokenizer
from tests.bomb import Bomb
from workflows.__main__ import main
from workflows.recipes import debug


@pytest.fixture
def bombs(tmp_path):
    """Pickles as `pickle` and as `torch.save` write them; the test fails if one was loaded."""
    torch.save({"w": Bomb(tmp_path / "ran")}, tmp_path / "torch.pt")
    yield pickle.dumps(Bomb(tmp_path / "ran")), (tmp_path / "torch.pt").read_bytes()
    assert not (tmp_path / "ran").exists()


SHAPE = PriorShape(model=debug().prior.model, space=Space((2, 2), codes=16), conditions=())


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("load", [load_prior, load_tokenizer])
def test_a_pickle_in_a_models_folder(tmp_path, bombs, load, file):
    folder = tmp_path / "model"
    for bomb in bombs:
        folder.mkdir(exist_ok=True)
        if load is load_prior:
            save_model(SHAPE.build(), str(folder / "model.safetensors"))
            (folder / "config.json").write_text(json.dumps(to_dict(SHAPE)))
        else:
            save_tokenizer(build_tokenizer(debug().tokenizer.model), str(folder))
        (folder / file).write_bytes(bomb)
        with pytest.raises(Exception, match=r"(?i)safetensors|header|deseriali|JSON"):
            load(str(folder))


def test_a_pickle_in_a_checkpoint(tmp_path, bombs):
    for bomb in bombs:
        url = checkpoint.place(str(tmp_path), 3)
        storage.write_bytes(storage.join(url, "part"), bomb)
        sized = {"name": "part", "size": len(bomb), "sha256": hashlib.sha256(bomb).hexdigest()}
        checkpoint.write_commit(url, {"step": 3, "parts": [sized], "meta": {}})
        with pytest.raises(Exception, match=r"(?i)header|safetensors|tensor"):
            checkpoint.Checkpoint(url)
        storage.write_bytes(storage.join(url, checkpoint.COMMIT), bomb)
        assert checkpoint.read_commit(url) is None


@pytest.fixture
def recipe(capsys):
    """The recipe `debug` as `show` writes it."""
    main(["show", "debug"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("evil",), 1, "Recipe has no field 'evil'"),
        (("captioner", "__class__"), "os.system", "has no field '__class__'"),
        (("captioner", "model", "vision", "__reduce__"), ["os.system", "id"], "has no field '__reduce__'"),
        (("tokenizer", "model", "class"), "os.system", 'tokenizer.model: .*one of .*found "os.system"'),
        (("corpus", "labels"), "os", 'corpus.labels: expected one of .*found "os"'),
        (("corpus", "labels"), "shapes", 'corpus.labels: expected one of .*found "shapes"'),
    ],
)
def test_a_recipe_names_no_code(recipe, tmp_path, capsys, path, value, sentence):
    at = recipe
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(file), "--store", str(tmp_path / "store")])
    assert ended.value.code not in (0, None)
    assert re.search(sentence, capsys.readouterr().err)


def test_a_pickled_recipe(tmp_path, capsys, bombs):
    for bomb in bombs:
        (tmp_path / "recipe.json").write_bytes(bomb)
        with pytest.raises(SystemExit):
            main(["plan", str(tmp_path / "recipe.json"), "--store", str(tmp_path / "store")])
        assert "recipe.json" in capsys.readouterr().err
