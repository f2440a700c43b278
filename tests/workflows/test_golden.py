"""What an older commit made is found, opens, verifies, captions, encodes, samples and exports.

`tests/data/<commit>/` holds a recipe and the store that the commit made of it, without checkpoints. A commit that
raises a version adds a folder of its own, and none is ever replaced.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from captioner.stages import Caption
from captioner.tower import Tower
from infra import storage
from infra.cluster import Cluster
from infra.config import from_dict
from infra.data.images import decode
from infra.data.shards import ShardReader, shard_names
from infra.metrics import Progress
from infra.store import Artifact, Plan, Step
from t2i.stages import Encode
from tests.infra.data.here import work_here
from workflows import export as export_module
from workflows import look, text_to_image
from workflows.export import ExportOptions, export
from workflows.sample import sample
from workflows.text_to_image import STEPS, Recipe

DATA = Path(__file__).parents[1] / "data"
OLD = sorted(path.name for path in DATA.iterdir() if (path / "store").is_dir())  # others hold no store
BY_NAME = {work.name: work for work in STEPS}
CLUSTER = Cluster(name="test", actors=(1, 1))


@pytest.fixture(params=OLD)
def old(request, tmp_path):
    """A recipe, and its store, moved to another place."""
    shutil.copytree(DATA / request.param / "store", tmp_path / "moved")
    recipe = from_dict(Recipe, storage.read_json(str(DATA / request.param / "recipe.json")))
    return recipe, str(tmp_path / "moved")


def artifacts(root: str) -> dict[str, Artifact]:
    """The artifacts of a store by step."""
    return {path.parent.parent.name: Artifact.open(str(path.parent)) for path in Path(root).glob("*/*/manifest.json")}


class Found(Plan):
    """Gives the next step the old artifact, whatever the version of this one."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.missed: list[str] = []
        self.risen: list[str] = []

    def step(self, work: Step, config, *inputs: Artifact) -> Artifact:
        old = artifacts(self.root)[work.name]
        made = super().step(work, config, *inputs)
        if work.version > old.manifest["version"]:
            self.risen.append(work.name)
        elif made.id != old.id:
            self.missed.append(work.name)
        return old


def test_steps_whose_version_has_not_risen_are_found(old):
    recipe, root = old
    plan = Found(root)
    text_to_image.run(recipe, plan)
    assert [line[0] for line in plan.lines] == [work.name for work in STEPS]
    assert plan.missed == []
    done = [name for name, _, reason in plan.lines if reason == "done"]
    assert sorted(done + plan.risen) == sorted(BY_NAME)


def test_of_one_store_all_is_done():
    """Whoever raises a version adds a store."""
    open_ = {}
    for name in OLD:
        plan = Plan(str(DATA / name / "store"))
        text_to_image.run(from_dict(Recipe, storage.read_json(str(DATA / name / "recipe.json"))), plan)
        open_[name] = [f"{step}: {reason}" for step, _, reason in plan.lines if reason != "done"]
    assert [] in open_.values(), open_


def test_every_artifact_opens_by_path_and_verifies(old):
    _, root = old
    made = artifacts(root)
    assert set(made) == set(BY_NAME)
    for name, artifact in made.items():
        assert look.verify([artifact.path])["whole"]
        config = from_dict(BY_NAME[name].config_class, artifact.manifest["config"])
        assert isinstance(config, BY_NAME[name].config_class)
        assert all(each.path.startswith(root) for each in artifact.inputs)


def test_a_flipped_byte_is_seen(old):
    _, root = old
    path = next(Path(root).glob("train_prior/*/model/model.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SystemExit):
        look.verify([artifacts(root)["train_prior"].path])


def test_its_models_say_and_draw_what_they_did(old, tmp_path):
    """Sums come out a little different on another processor, and some code or word with them: nearly all are equal."""
    recipe, root = old
    made = artifacts(root)
    shard = shard_names(made["ingest"].path)[0]
    images, rows = ShardReader([made["ingest"].path], shard), np.arange(16)

    captions, tower = made["recaption"], Tower(made["train_captioner"].url("model"))
    config = from_dict(BY_NAME["recaption"].config_class, captions.manifest["config"])
    stage = Caption(tower, recipe.captioner.styles, detect=config.detect, words=config.words, retries=config.retries)
    stage.setup()
    seen = [tower.fit(decode(data)) for data in images.originals(rows)]
    said = stage({tower.view: seen, "caption_alt": images.rows(["caption_alt"], rows)["caption_alt"]})
    for style in captions.summary["styles"]:
        name = f"caption_{style['name']}"
        wanted = ShardReader([captions.path], shard).rows([name], rows)[name]
        assert any(wanted)
        assert np.mean([a == b for a, b in zip(said[name], wanted, strict=True)]) >= 0.8

    encoder = Encode(made["train_tokenizer"].url("model"))
    encoder.setup()
    codes = encoder({"pixels": list(images.pixels(rows))})["codes"]
    wanted = ShardReader([made["encode"].path], shard).rows(["codes"], rows)["codes"]
    assert np.mean(np.stack(codes) == np.stack(wanted)) >= 0.98

    config = from_dict(BY_NAME["sample"].config_class, made["sample"].manifest["config"])
    inputs = [made[name] for name in ("mix", "train_prior", "train_tokenizer")]
    sample.work(config, *inputs, out=str(tmp_path / "drawn"), cluster=CLUSTER, report=Progress("drawing"))
    drawn = [json.loads(Path(at, "samples.json").read_text()) for at in (tmp_path / "drawn", made["sample"].path)]
    told = [[{name: row[name] for name in ("prompt", "image", "scene", "sample_id")} for row in rows] for rows in drawn]
    assert told[0] == told[1]
    for row in drawn[0]:
        new, was = (decode(Path(at, row["image"]).read_bytes()) for at in (tmp_path / "drawn", made["sample"].path))
        assert np.mean(np.abs(new.astype(int) - was) <= 2) >= 0.9


def test_it_is_exported(old, tmp_path, monkeypatch):
    _, root = old
    work_here(monkeypatch, export_module)
    made = artifacts(root)
    options = ExportOptions(
        images=made["ingest"].path,
        captions=made["recaption"].path,
        mixture=made["mix"].path,
        out=str(tmp_path / "export"),
        format="parquet",
        with_images=True,
        cluster=CLUSTER,
    )
    summary = export(options)["summary"]
    tables = [pq.read_table(path) for path in sorted(tmp_path.glob("export/data/*.parquet"))]
    assert sum(table.num_rows for table in tables) == summary["exported"] == made["mix"].summary["kept"]
    assert look.verify([options.out])["whole"]
