"""`import rescribe`: models that draw and describe, rows as a table, models of other packages; and their page."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import rescribe
import torch
from PIL import Image
from setuptools import find_namespace_packages as find_packages

from captioner.model import Captioner, CaptionerConfig, TextConfig, VisionConfig
from captioner.stages import Caption
from captioner.styles import Style
from captioner.task import ALT_COLUMN
from captioner.tower import Tower
from captioner.vocabulary import train_vocabulary
from infra import others, storage
from infra.data.images import decode
from infra.store import Artifact, Store, step
from t2i.conditions.words import WordsConfig
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.priors.sampling import SamplingConfig
from t2i.priors.task import PriorShape, PriorTask, save_vocabulary
from t2i.protocol import Space
from t2i.tokenizers.finite_scalar import FiniteScalarConfig
from t2i.tokenizers.patch_vqgan import PatchVQGAN, PatchVQGANConfig
from t2i.tokenizers.task import save_tokenizer
from t2i.vocabulary import TextVocabulary
from tests.captioner.backends import server
from tests.docs.pages import ROOT, Page
from tests.workflows import test_export as plain  # its steps need no Ray
from workflows.lookup import ChoiceError
from workflows.sample import SampleConfig, sample

PAGE = Page(ROOT / "docs" / "python.md")
SAID = ["a large red circle", "a small blue square at the top"] * 3


@step(version=2)
def train_tokenizer(config: dict, images: Artifact, *, out, cluster, report):
    """Weights as they come."""
    model = PatchVQGANConfig(patch=8, channels=8, groups=4, quantizer=FiniteScalarConfig(levels=(4, 4)))
    torch.manual_seed(0)
    os.makedirs(f"{out}/model")
    save_tokenizer(PatchVQGAN(model), f"{out}/model")
    return {}


@step(version=2)
def train_prior(config: dict, mixture: Artifact, codes: Artifact, tokenizer: Artifact, *, out, cluster, report):
    """Every weight random."""
    words = TextVocabulary.train(SAID, 64, 12)
    save_vocabulary(words, f"{out}/vocabulary")
    told = WordsConfig(vocabulary_size=len(words), length=12)
    model = AutoregressiveConfig(width=16, layers=1, heads=2)
    shape = PriorShape(model=model, space=Space((2, 2), codes=16), conditions=(told,))
    task = PriorTask(shape=shape, folder=f"{out}/vocabulary", styles=("short",), optim=None)
    prior = shape.build(task.folder)
    torch.manual_seed(1)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    os.makedirs(f"{out}/model")
    task.export({"prior": prior}, f"{out}/model")
    return {}


@step(version=1)
def train_captioner(config: dict, images: Artifact, *, out, cluster, report):
    """Every weight random."""
    vocabulary = train_vocabulary(SAID, 300)
    sizes = {"hidden": 32, "layers": 1, "heads": 2, "mlp": 64}
    vision = VisionConfig(image_size=(16, 16), patch_size=8, **sizes)
    blip = CaptionerConfig(vision=vision, text=TextConfig(max_length=24, **sizes), init_std=0.4).blip(vocabulary)
    torch.manual_seed(0)
    os.makedirs(f"{out}/model")
    styles = (Style(name="descriptive", max_tokens=9), Style(name="short", max_tokens=5))
    Captioner(blip, vocabulary, ("alt", "short", "descriptive"), styles).save(f"{out}/model")
    return {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a store in it as a recipe makes it."""
    place = str(tmp_path_factory.mktemp("api"))
    store = Store(f"{place}/runs", plain.CLUSTER)
    images = store.step(plain.ingest, plain.IngestConfig(corpus=plain.write_corpus(place), image_size=(16, 16)))
    captions = store.step(plain.recaption, {"fails": ["two"], "flagged": []}, images)
    mixture = store.step(plain.mix, plain.MixConfig(weights={"short": 1.0}, max_words=20), images, captions)
    tokenizer = store.step(train_tokenizer, {}, images)
    prior = store.step(train_prior, {}, mixture, images, tokenizer)
    store.step(train_captioner, {"model": "x", "base": None, "styles": []}, images)
    drawn = SampleConfig(prompts=tuple(SAID[:2]), seed=3, sampling=SamplingConfig(temperature=0.5))
    store.step(sample, drawn, mixture, prior, tokenizer)
    return place


def only(folder):
    (path,) = Path(folder).iterdir()
    return path


def test_a_prior_draws_what_the_command_draws(runs):
    painter = rescribe.load(f"{runs}/runs/train_prior")
    assert painter.sampling == SamplingConfig(), "pictures for one's own prompts are not the recipe's"
    pictures = painter.sample(SAID[:2], seed=3, temperature=0.5)
    drawn = [np.asarray(Image.open(only(f"{runs}/runs/sample") / f"images/{n:05d}.png")) for n in range(2)]
    assert [np.asarray(picture).tolist() for picture in pictures] == [picture.tolist() for picture in drawn]
    (alone,) = painter.sample(SAID[0], seed=3, temperature=0.5)
    assert alone.tobytes() == pictures[0].tobytes()
    assert painter.sample(SAID[0], seed=3, temperature=5.0)[0].tobytes() != alone.tobytes()
    with pytest.raises(ValueError, match="negative"):
        painter.sample("a", temperature=-1.0)
    with pytest.raises(ValueError, match="no field of sampling 'guidence'"):
        painter.sample("a", guidence=2.0)


def test_a_captioner_speaks(runs):
    captioner = rescribe.load(f"{runs}/runs/train_captioner")
    pictures = [f"{runs}/0.png", f"{runs}/1.png"]
    for n, path in enumerate(pictures):
        storage.write_bytes(path, plain.encode(plain.picture(n)))
    pixels = [decode(storage.read_bytes(path)) for path in pictures]
    for style in captioner.styles:
        stage = Caption(Tower(f"{only(f'{runs}/runs/train_captioner')}/model"), captioner.styles, score_alt=False)
        stage.setup()
        batch = {stage.tower.view: [stage.tower.fit(each) for each in pixels], ALT_COLUMN: [None, None]}
        assert captioner.caption(pictures, style=style.name) == stage(batch)[f"caption_{style.name}"]
    assert captioner.caption(pixels) == captioner.caption(pictures, style="descriptive")
    assert captioner.caption([]) == []
    assert captioner.caption(Image.fromarray(pixels[1])) == captioner.caption(pictures)[1:]
    assert captioner.caption(Path(pictures[0])) == captioner.caption(pictures)[:1]
    storage.write_bytes(f"{runs}/note.txt", b"none")
    with pytest.raises(ValueError, match=r"note\.txt: not an image"):
        captioner.caption(f"{runs}/note.txt")
    with pytest.raises(ValueError, match="no style 'long'; it has descriptive, short"):
        captioner.caption(pictures, style="long")


def test_a_server_speaks(runs):
    def answer(body, number):
        return server.status(400) if number > 1 else server.completion("a dog", finish_reason="stop")

    endpoint = server.Endpoint(answer)
    try:
        captioner = rescribe.load(endpoint.url, model="NAME")
        glass = np.zeros((8, 8, 4), np.uint8)
        for clear in (glass, Image.fromarray(glass), glass / 255):
            endpoint.bodies.clear()
            assert captioner.caption(clear) == ["a dog"]
            assert np.asarray(server.picture(endpoint.bodies[0])).min() > 250, "transparency lies on white"
        endpoint.bodies.clear()
        assert captioner.caption(plain.picture(0)) == ["a dog"]
        with pytest.raises(RuntimeError, match="http_400"):
            captioner.caption(plain.picture(0))
    finally:
        endpoint.close()
    with pytest.raises(ValueError, match="use `rescribe recaption"):
        rescribe.load("vllm:NAME")


def test_rows_come_with_those_of_what_they_were_made_of(runs):
    rows = rescribe.open(f"{runs}/runs/mix").to_pandas().set_index("key")
    assert len(rows) == 7
    assert rows.loc["two", ["state", "reason", "caption_alt"]].tolist() == [
        "failed", "oom: Caption: too much", "größer",
    ]  # fmt: skip
    assert rows.loc["silent", ["caption_short", "weight_short", "keep"]].tolist() == ["this is silent", 1.0, True]
    assert "image" not in rows
    few = rescribe.open(f"{runs}/runs/recaption").to_pandas(["caption_short"])
    assert list(few) == ["sample_id", "state", "reason", "caption_short"]
    copies = rescribe.open(f"{runs}/runs/ingest").to_pandas(["image", "state"])  # a shard without a picture has none
    assert [decode(each).shape for each in copies["image"].dropna()] == [(16, 16, 3)] * 4
    assert rescribe.open(f"{runs}/runs").artifact.step == "mix"
    with pytest.raises(ValueError, match="no column 'no'"):
        rescribe.open(f"{runs}/runs/mix").to_pandas(["no"])


def test_the_columns_that_there_are(runs):
    rows = rescribe.open(f"{runs}/runs/mix")
    assert {"sample_id", "state", "reason", "key", "caption_alt", "caption_short", "keep"} <= {*rows.columns}
    assert set(rows.to_pandas().columns) == {*rows.columns} - {"image"}
    assert len(rows.to_pandas(rows.columns).columns) == len(rows.columns)


def test_what_cannot_be_is_told(runs):
    with pytest.raises(ValueError, match=r"rescribe\.load\('http://localhost:1/v1', model=\"NAME\"\)"):
        rescribe.load("http://localhost:1/v1")
    with pytest.raises(ChoiceError, match=r"rescribe\.load\('.*/train_prior/"):
        rescribe.load(f"{runs}/runs")
    with pytest.raises(FileNotFoundError, match="holds no rows"):
        rescribe.open(f"{runs}/runs/train_prior")
    with pytest.raises(FileNotFoundError, match="no finished artifact"):
        rescribe.open(f"{runs}/nowhere")


def test_the_page_runs(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    blocks = [block.text for block in PAGE.blocks if block.language == "python" and not block.text.startswith("# ")]
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {})
    assert "['descriptive', 'short']" in capsys.readouterr().out


OTHER = """
from dataclasses import dataclass
from t2i.tokenizers.patch_vqgan import PatchVQGAN, PatchVQGANConfig

@dataclass(frozen=True, kw_only=True)
class MineConfig(PatchVQGANConfig):
    depth: int = 1
    def build(self):
        return Mine(self)

class Mine(PatchVQGAN):
    pass
"""
TRIED = """
import json, sys
from places.recipes import places  # before Rescribe: a package's own tests do so
from places.model import Places, PlacesConfig
from other import Mine, MineConfig
from infra.config import fingerprint, from_dict, to_dict
from t2i.priors.asking import CAPTION
from t2i.priors.task import PriorShape, PriorTask, load_prior, save_vocabulary
from t2i.tokenizers.task import load_tokenizer, save_tokenizer
from t2i.conditions.words import WordsConfig
from t2i.priors.sampling import SamplingConfig
from t2i.protocol import Space
from t2i.vocabulary import TextVocabulary
from workflows.__main__ import main
from workflows.options import recipe_options
from workflows.recipes import RECIPES
from workflows.text_to_image import Recipe

recipe = recipe_options(["places", "--prior.model.width", "16"], "plan").recipe
assert recipe.prior.model == PlacesConfig(width=16)
assert recipe.tokenizer == RECIPES["debug"]().tokenizer
table = json.loads(json.dumps(to_dict(recipe)))
assert table["prior"]["model"] == {"class": "PlacesConfig", "width": 16}
assert from_dict(Recipe, table) == recipe
table["tokenizer"]["model"] = {"class": "MineConfig", "patch": 8, "depth": 2}
assert from_dict(Recipe, table).tokenizer.model == MineConfig(patch=8, depth=2)

save_tokenizer(MineConfig(depth=3).build(), "tokenizer")
assert isinstance(load_tokenizer("tokenizer"), Mine)
words = TextVocabulary.train(["a b c"] * 3, 64, 5)
save_vocabulary(words, "vocabulary")
told = WordsConfig(vocabulary_size=len(words), length=5)
shape = PriorShape(model=PlacesConfig(width=8), space=Space((2, 3), codes=7), conditions=(told,))
task = PriorTask(shape=shape, folder="vocabulary", styles=("short",), optim=None)
task.export({"prior": shape.build("vocabulary")}, "prior")
prior, ask = load_prior("prior")
assert isinstance(prior, Places)
codes = prior.sample(ask({CAPTION: ["a b", "c"]}, [1, 2]), [1, 2], SamplingConfig())
assert codes.shape == (2, 2, 3)
(again,) = prior.sample(ask({CAPTION: ["c"]}, [2]), [2], SamplingConfig())
assert (again == codes[1]).all()

main(["--help"])
print(json.dumps({name: fingerprint(RECIPES[name]()) for name in ("debug", "demo")}))
"""


@pytest.mark.timeout(180)
def test_a_package_adds_models_and_a_recipe(tmp_path):
    """The page's package, and a tokenizer; what is there keeps its fingerprint."""
    (text,) = [block.text for block in PAGE.blocks if block.language == "text"]
    groups = tomllib.loads(text)["project"]["entry-points"] | {"rescribe.tokenizers": {"mine": "other:MineConfig"}}
    points = "".join(
        f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in each.items()) for group, each in groups.items()
    )
    files = {block.text.splitlines()[0][2:]: block.text for block in PAGE.blocks if block.text.startswith("# places/")}
    files |= {"other.py": OTHER, "mine-0.1.dist-info/entry_points.txt": points}
    files |= {"mine-0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: mine\nVersion: 0.1\n"}
    for name, content in files.items():
        storage.write_bytes(str(tmp_path / name), content.encode())
    for name in ("tokenizer", "prior"):
        (tmp_path / name).mkdir()
    where = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", TRIED], cwd=tmp_path, env={**os.environ, "PYTHONPATH": where}, capture_output=True,
        text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Of mine." in done.stdout
    golden = json.loads(Path(__file__).with_name("recipes.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == {name: golden[name] for name in ("debug", "demo")}


def test_a_package_that_will_not_do_is_told(monkeypatch):
    twin = type("AutoregressiveConfig", (PatchVQGANConfig,), {})
    for added, message in ((twin, "a second AutoregressiveConfig"), (dict, "which are frozen dataclasses")):
        monkeypatch.setattr(others, "others", lambda group, added=added: {"mine": added})
        with pytest.raises(ValueError, match=message):
            others.with_others(AutoregressiveConfig, "rescribe.priors")
    monkeypatch.undo()
    assert others.with_others(AutoregressiveConfig, "nobody's") is AutoregressiveConfig

    class Point:
        name, value, dist = "mine", "nowhere:Config", None

        def load(self):
            raise ModuleNotFoundError("No module named 'nowhere'")

    monkeypatch.setattr(others, "entry_points", lambda group: [Point()])
    with pytest.raises(ValueError, match=r"adds mine = nowhere:Config to a group.*No module named"):
        others.others("a group")


def test_it_is_installed_beside_the_packages():
    assert Path(rescribe.__file__ or "") == ROOT / "workflows" / "python" / "rescribe" / "__init__.py"
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = {name for place in find["where"] for name in find_packages(ROOT / place, find["exclude"], find["include"])}
    assert {"rescribe", "workflows", "t2i.priors", "infra.data"} <= found
    assert not [name for name in found if name.startswith("workflows.python")]
