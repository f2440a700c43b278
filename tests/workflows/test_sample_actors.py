"""Pictures are the same whoever draws them: in this process, by actors, over other cuts, after a death and a resume."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from infra import storage
from infra.cluster import Cluster
from infra.data.run import run_here
from infra.data.shards import ShardReader, shard_names
from infra.store import Artifact, Store
from t2i.priors.sampling import SamplingConfig
from t2i.stages import Paint
from workflows import look, prompt_rows, samples
from workflows import sample as module
from workflows.sample import SampleConfig, links_of, sample

DATA = Path(__file__).parents[1] / "data" / "d3c69f4" / "store"
CONFIG = SampleConfig(
    prompts=tuple(f"a {size} {colour} circle" for size in ("large", "small") for colour in ("red", "blue")) * 12,
    sampling=SamplingConfig(temperature=1.0),
    batch=4,
    seed=3,
)


@dataclass
class Dies(Paint):
    """Once, with its process, at the second batch that is drawn."""

    mark: str = ""

    def __call__(self, batch):
        if os.path.exists(self.mark + ".1"):
            with_it = f"{self.mark}.2"
            if not os.path.exists(with_it):
                Path(with_it).touch()
                os._exit(1)
        Path(self.mark + ".1").touch()
        return super().__call__(batch)


@pytest.fixture(scope="module")
def models():
    return [Artifact.open(str(next(DATA.glob(f"{step}/*")))) for step in ("train_prior", "train_tokenizer")]


@pytest.fixture(scope="module")
def wanted(models, tmp_path_factory):
    """The pictures, drawn here, of prompts in three shards."""
    rows, out = (str(tmp_path_factory.mktemp(name)) for name in ("rows", "out"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_rows, "SHARD_ROWS", 19)
        prompts = (prompt_rows.Prompt(text) for text in CONFIG.prompts)
        prompt_rows.write_rows(prompts, rows, seed=CONFIG.seed, batch=CONFIG.batch)
    assert len(shard_names(rows)) == 3
    run_here([Paint(links_of(CONFIG, *models))], [rows], out, batch_size=CONFIG.batch)
    return images_of(rows, out)


def images_of(rows, out):
    readers = [ShardReader([rows, out], name) for name in shard_names(out)]
    return [image for reader in readers for image in reader.stored(["image"], np.arange(len(reader)))["image"]]


def test_by_two_actors_of_whom_one_dies_over_one_shard(models, wanted, ray_cluster, tmp_path, monkeypatch):
    """PNGs are equal to the bit, with all that stands in them."""
    monkeypatch.setattr(module, "Paint", lambda *fields: Dies(*fields, mark=str(tmp_path / "mark")))
    made = Store(str(tmp_path), Cluster(name="two", actors=(2, 2))).step(sample, CONFIG, None, *models)
    assert (tmp_path / "mark.2").exists()
    assert shard_names(made.path) == ["000000"], "the actors had runs of its rows"
    assert [row["image"] for row in samples.read_samples(made)] == wanted
    assert made.summary["failed"] == 0
    assert look.verify([made.path])["whole"]


def test_a_resume_draws_what_is_left(models, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_rows, "SHARD_ROWS", 19)
    monkeypatch.setattr(module, "run_stages", lambda *arguments, actors, **options: run_here(*arguments, **options))
    monkeypatch.setattr(module, "connect", lambda cluster: None)
    store = Store(str(tmp_path), Cluster(name="one"))
    made = store.step(sample, CONFIG, None, *models)
    kept = storage.digest(made.url("shards/000000.parquet"))
    for name in ("manifest.json", "ledger.json", "shards/000001.parquet", "samples.json"):
        os.unlink(made.url(name))
    shutil.rmtree(made.url("images"))
    monkeypatch.setattr(module, "Paint", Counted)
    again = store.step(sample, CONFIG, None, *models)
    assert again.path == made.path
    assert Counted.batches == 4, "of one shard of three"
    assert storage.digest(made.url("shards/000000.parquet")) == kept
    assert [row["image"] for row in samples.read_samples(again)] == wanted
    assert look.verify([again.path])["whole"]


class Counted(Paint):
    """Counts its batches."""

    batches = 0

    def __call__(self, batch):
        Counted.batches += 1
        return super().__call__(batch)
