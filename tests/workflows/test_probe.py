"""A probe tells what a whole step takes by a piece of it, leaves nothing behind, and goes on where a step fails."""

import json
import signal
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.backends.endpoint import EndpointConfig
from infra import storage
from infra.cluster import Cluster
from infra.data import wide
from infra.data.ledger import Ledger, inspect
from infra.data.run import few, run_here
from infra.data.shards import ShardReader, joined_names, shard_names
from infra.store import Artifact, Store, step
from infra.train.loop import TrainConfig
from infra.train.optim import OptimConfig
from t2i.clip.model import TowerConfig
from t2i.evaluate.extractor import ExtractorConfig
from tests import kills
from tests.workflows import test_export as plain  # its steps need no Ray
from tests.workflows.test_cascade import NET
from workflows.__main__ import main
from workflows.cascade import cascade
from workflows.clip import clip
from workflows.corpora.shapes import ShapesConfig
from workflows.estimate import Estimate, Mark, lines, rate, segments, size, whole
from workflows.ingest import IngestConfig
from workflows.kinds import written
from workflows.mix import MixConfig
from workflows.piece import cut, rows_in
from workflows.probe import ProbeStore, Sizes, probe, shortened
from workflows.recaption import RecaptionConfig, recaption
from workflows.recipes import debug
from workflows.train_captioner import TrainCaptionerConfig, train_captioner
from workflows.yardstick import CalibrateConfig, yardstick

DATA = Path(__file__).parents[1] / "data"
CLUSTER = Cluster(name="test", actors=(1, 1))
SMALL = Sizes(steps=4, rows=30)


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Where temporary folders of a test lie."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


def own_captioner():
    found = debug().captioner
    assert isinstance(found, TrainCaptionerConfig)
    return found


def left(folder):
    return [path for path in Path(folder).rglob("*") if "rescribe-probe" in str(path)]


# What is reckoned


@given(st.floats(0, 100), st.floats(0.001, 10), st.floats(0.001, 10), st.integers(4, 50), st.integers(1, 1000))
def test_of_a_steady_step_all_is_known(start, seconds, spent, units, times):
    marks = [Mark(done, units, start + seconds * done, 2 * start + spent * done) for done in range(1, units)]
    marks.append(Mark(units, units, start + seconds * units + 7, 2 * start + spent * units + 7))  # it also ends
    pace = rate(marks, units / 4)
    assert pace == pytest.approx((seconds, spent), rel=1e-4, abs=1e-6)
    taken = marks[-1].cpu_seconds
    assert whole(taken, [(pace[1] * units, times)]) == pytest.approx(2 * start + 7 + spent * units * times, rel=1e-3)


def test_warm_up_does_not_count_and_one_mark_tells_nothing():
    marks = [Mark(0, 20, 0, 0), Mark(2, 20, 50, 50), *(Mark(n, 20, 50 + n, 50 + 3 * n) for n in range(5, 20, 5))]
    assert rate(marks, 5) == pytest.approx((1, 3))
    assert rate(marks[-1:], 0) is None
    assert rate([], 0) is None
    assert rate([Mark(1, 9, 5, 9), Mark(2, 9, 4, 3)], 0) == (0, 0)  # no time runs backwards


def test_trainings_in_turn_are_told_apart():
    first, second = [Mark(2, 6, 1, 1), Mark(6, 6, 2, 2)], [Mark(6, 8, 3, 3), Mark(8, 8, 4, 4)]
    third = [Mark(1, 8, 5, 5)]
    assert [*segments([*first, first[-1], *second, *third])] == [first, second, third]
    assert [*segments([])] == []


def test_what_is_left_may_be_less_than_the_piece():
    assert whole(10, [(8, 0.5)]) == 6
    assert whole(10, []) == 10
    assert whole(10, [(4, 3), (5, 1)]) == 18


def test_a_price_is_of_an_hour():
    known = Estimate(step="encode", id="0", seconds=5400, cpu_seconds=9000, cache_bytes=1500, notes=("4 of 8 shards",))
    told = lines([known, Estimate(step="mix", id="1", failed="No.")], price=3)
    assert "cost: 4.50, at 3 an hour of this machine" in told
    assert told[-2:] == ["encode: 4 of 8 shards.", "mix: not known. No."]
    assert told[2].split() == ["all", "0.00", "0.00", "1.5", "kB", "9,000", "0", "1.500"]
    assert not any("cost" in line for line in lines([known], price=0))
    assert [size(count) for count in (0, 999, 1000, 65_116_563, 10**15)] == ["0 B", "999 B", "1 kB", "65.1 MB", "1 PB"]


def test_a_training_is_shortened_and_nothing_else():
    recipe = debug()
    config = replace(
        own_captioner(), base=TrainConfig(steps=1000, batch=8, save_every_steps=7), finetune=TrainConfig(steps=3)
    )
    short = shortened(config, 16)
    assert short.base == TrainConfig(steps=16, batch=8, save_every_steps=16, log_every_steps=2)
    assert replace(short, base=config.base) == config
    assert shortened(recipe.corpus, 16) is recipe.corpus


# Pieces


def corpus(samples=80, rows=40):
    shapes = ShapesConfig(samples=samples, labelled=20, shard_size=rows, test_fraction=0.25)
    return IngestConfig(corpus=shapes, image_size=(32, 32))


def test_a_piece_has_the_first_rows_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(wide, "LEAST", 16)  # the pictures lie in side files
    store = Store(str(tmp_path / "store"), CLUSTER)
    images = store.step(plain.ingest, corpus())
    mixture = store.step(plain.mix, MixConfig(weights={"alt": 1.0}), images, images)
    piece = cut(mixture, str(tmp_path / "piece"), ["000000"], 7)
    assert (piece.step, piece.id, piece.summary) == (mixture.step, mixture.id, mixture.summary)
    for one, other in zip([*mixture.inputs, mixture], [*piece.inputs, piece], strict=True):
        assert other.path.startswith(str(tmp_path / "piece"))
        assert joined_names([other.path]) == ["000000"]
        assert rows_in(other.path)[0] == 7
        assert Ledger(other.path).complete() == {"000000": inspect(other.path, "000000")}
        whole_, few_ = (ShardReader([each.path], "000000", every=True) for each in (one, other))
        names = sorted(whole_.names)
        before, after = (each.table(names, np.arange(7)) for each in (whole_, few_))
        assert before.equals(after)
    pixels = [[*ShardReader([each.inputs[0].path], "000000").originals(np.arange(7))] for each in (mixture, piece)]
    assert pixels[0] == pixels[1]


def test_pieces_of_what_older_commits_made_are_read(tmp_path):
    for folder in sorted((DATA / "d3c69f4" / "store").iterdir()):
        (path,) = folder.iterdir()
        made = Artifact.open(str(path))
        if "ledger.json" in made.manifest["files"] and not made.has_own_rows:
            names = shard_names(made.path)[:1]
            piece = cut(made, str(tmp_path), names, 5)
            assert (
                len(
                    ShardReader(
                        [each.path for each in (*piece.inputs, piece) if shard_names(each.path)], names[0], every=True
                    )
                )
                == 5
            )


def test_few_shards_are_done_of_many(tmp_path):
    images = Store(str(tmp_path / "store"), CLUSTER).step(plain.ingest, corpus())

    class Nothing:
        reads, views, writes, cpus, gpus = (), {}, {"n": pa.int64()}, 1, 0

        def setup(self): ...

        def __call__(self, columns):
            return {"n": [1] * len(columns["sample_id"])}

    out = str(tmp_path / "out")
    stages: Any = [Nothing()]
    with few(1) as asked:
        counts = run_here(stages, [images.path], out, batch_size=8)
    assert (asked.names, counts["shards"], shard_names(out)) == (["000000", "000001"], 1, ["000000"])
    assert run_here(stages, [images.path], out, batch_size=8)["shards"] == 2  # outside of it, all


def test_texts_of_the_corpus_stand_for_captions_that_cost(tmp_path):
    images = Store(str(tmp_path / "store"), CLUSTER).step(plain.ingest, corpus())
    store = ProbeStore(str(tmp_path / "store"), CLUSTER, str(tmp_path / "scratch"), SMALL)
    served = TrainCaptionerConfig(
        model=EndpointConfig(base_url="http://127.0.0.1:9/v1", model="m"), base=None, styles=()
    )
    read = store.step(plain.ingest, corpus())
    captioner = store.step(train_captioner, served, read)
    captions = store.step(recaption, RecaptionConfig(), read, captioner)
    told = store.estimates[-1]
    assert (told.step, told.seconds) == ("recaption", 0)
    assert "m is not asked, since each answer costs: give --max-requests" in told.failed
    piece = store._pieces[captions.path].artifact
    texts = ShardReader([images.path], "000000").columns(["caption_alt"])["caption_alt"][:30]
    found = ShardReader([piece.inputs[0].path, piece.path], "000000").columns(["caption_short"])["caption_short"]
    assert found.tolist() == texts.tolist()


# Steps of somebody else's


@dataclass(frozen=True, kw_only=True)
class TossConfig:
    """How long a step takes, and whether it ends well."""

    seconds: float = 0.0
    rows: str = ""
    fault: str = ""


@step(version=1)
def toss(config: TossConfig, images: Artifact | None = None, *, out, cluster, report):
    """Take a while for each row."""
    if config.fault == "stop":
        raise KeyboardInterrupt
    if config.fault:
        raise ValueError(config.fault)
    rows = rows_in(images.path)[0] if images else 1
    end = time.process_time() + config.seconds * rows
    while time.process_time() < end:
        sum(range(999))
    storage.write_json(storage.join(out, "rows.json"), rows)
    return {"rows": rows}


@dataclass(frozen=True, kw_only=True)
class TossRecipe:
    """Of somebody else's kind."""

    name: str = "tosses"
    corpus: IngestConfig
    tosses: tuple[TossConfig, ...]

    def run(self, store):
        """Ingest, and toss."""
        images = store.step(plain.ingest, self.corpus)
        made = [store.step(toss, each, images) for each in self.tosses]
        return store.step(toss, TossConfig(rows="last"), *made[:1])


def test_a_step_that_fails_is_told_and_the_others_go_on(tmp_path, scratch):
    tosses = (TossConfig(fault="There is\nno coin."), TossConfig())
    found = probe(TossRecipe(corpus=corpus(), tosses=tosses), str(tmp_path / "store"), CLUSTER, SMALL)
    assert [each.failed for each in found] == [
        "", "There is no coin.", "", "It reads what `toss` makes, of which there is no piece."
    ]  # fmt: skip
    assert not (tmp_path / "store").exists()
    assert not left(scratch)


def test_nothing_is_left_where_somebody_stops_it(tmp_path, scratch):
    recipe = TossRecipe(corpus=corpus(), tosses=(TossConfig(fault="stop"),))
    with pytest.raises(KeyboardInterrupt):
        probe(recipe, str(tmp_path / "store"), CLUSTER, SMALL)
    assert not left(scratch)
    assert not (tmp_path / "store").exists()


def test_what_is_done_is_read_and_not_done_again(tmp_path, scratch):
    store = Store(str(tmp_path / "store"), CLUSTER)
    images = store.step(plain.ingest, corpus(samples=400))
    before = sorted(file.url for file in storage.listing(store.root))
    recipe = TossRecipe(corpus=corpus(samples=400), tosses=(TossConfig(seconds=0.01),))
    ones = probe(recipe, store.root, CLUSTER, Sizes(steps=4, rows=40))
    assert [each.step for each in ones] == ["toss", "toss"]
    assert ones[0].cpu_seconds == pytest.approx(0.01 * 400, abs=0.8)  # of 2 shards of 40 rows, five times as many
    assert sorted(file.url for file in storage.listing(store.root)) == before
    made = store.step(toss, recipe.tosses[0], images)
    assert ones[0].cpu_seconds == pytest.approx(made.manifest["cpu_seconds"], rel=0.2)
    store.step(toss, TossConfig(rows="last"), made)
    assert probe(recipe, store.root, CLUSTER, SMALL) == []
    assert lines([], 1) == ["All is done: nothing is left to be probed."]


def test_sizes_are_checked(capsys):
    with pytest.raises(ValueError, match="4 training steps"):
        Sizes(steps=3)
    for option, value in (("--probe-steps", "1"), ("--price", "-1")):
        with pytest.raises(SystemExit):
            main(["plan", "debug", "--probe", option, value, "--store", "/nowhere/store"])
    assert "must not be negative" in capsys.readouterr().err


# Real steps


def asked(recipe, tmp_path, capsys, *more):
    """What the command says of a recipe, as data and as text."""
    file = tmp_path / f"{recipe.name}.json"
    file.write_text(json.dumps(written(recipe)))
    main(["plan", str(file), "--probe", "--store", str(tmp_path / "store"), "--json", *more])
    text = capsys.readouterr().out
    assert not (tmp_path / "store").exists()
    return json.loads(text.splitlines()[-1])["probe"], text


def test_a_corpus_is_counted_by_some_of_its_shards(ray_cluster, tmp_path, scratch):
    @dataclass(frozen=True, kw_only=True)
    class Indexed:
        name: str = "indexed"

        def run(self, store):
            from workflows.ingest import ingest
            from workflows.mix import mix

            images = store.step(ingest, corpus(samples=400))
            return store.step(mix, MixConfig(weights={"alt": 1.0}), images, images)

    index, mixture = probe(Indexed(), str(tmp_path / "store"), CLUSTER, SMALL)
    assert index.notes[0] == "2 of 10 shards, as the corpus is listed; its rows are counted by them"
    assert mixture.notes[0] == "60 of 400 rows"  # two shards, of each of which 30 rows
    assert index.cpu_seconds > index.probe_cpu_seconds > index.fixed_cpu_seconds > 1
    assert index.images_per_second > 0
    assert index.cache_bytes > 10_000
    assert not left(scratch)


SHORT = TrainConfig(steps=12, batch=8, log_every_steps=2)
OPTIM = OptimConfig(warmup_steps=2)
MADE = corpus(samples=160)


def a_cascade():
    recipe = cascade()
    links = tuple(
        replace(link, prior=replace(link.prior, train=SHORT, model=replace(link.prior.model, network=NET)))
        for link in recipe.links
    )
    captioner = replace(own_captioner(), base=SHORT, finetune=SHORT)
    return replace(recipe, corpus=MADE, captioner=captioner, links=links, sample=replace(recipe.sample, count=8))


def a_clip():
    tower = TowerConfig(width=16, layers=1, heads=2)
    recipe = clip()
    model = replace(recipe.clip.model, vision=tower, text=tower, width=8, vocabulary_size=600)
    captioner = replace(own_captioner(), base=SHORT, finetune=SHORT)
    return replace(recipe, corpus=MADE, captioner=captioner, clip=replace(recipe.clip, model=model, train=SHORT))


def a_yardstick():
    recipe = yardstick()
    extractor = replace(recipe.extractor, model=ExtractorConfig(size=(32, 32)), train=SHORT)
    return replace(recipe, corpus=MADE, extractor=extractor, sets=CalibrateConfig(rows=40))


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("make", [debug, a_cascade, a_clip, a_yardstick], ids=lambda make: make.__name__)
def test_every_kind_is_probed(make, ray_cluster, tmp_path, scratch, capsys):
    recipe = make()
    told, text = asked(recipe, tmp_path, capsys, "--probe-steps", "8", "--probe-rows", "40", "--price", "2")
    assert [each["failed"] for each in told["steps"]] == [""] * len(told["steps"])
    assert told["cost"] == pytest.approx(2 * told["seconds"] / 3600, abs=1e-3)
    assert all(each["cpu_seconds"] > 0 and each["peak_memory_gb"] > 0 for each in told["steps"])
    assert "cost: " in text
    trained = [each for each in told["steps"] if each["step"].startswith("train_") and each["notes"]]
    assert all(each["notes"][0] == "8 of 12 steps" for each in trained)
    assert bool(trained) == (make is not debug)  # its 6 steps are run whole
    assert not left(scratch)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_ctrl_c_while_a_model_trains_leaves_nothing(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    line = ("plan", "debug", "--probe", "--store", str(tmp_path / "store"))
    with kills.started(*line, TMPDIR=str(folder), RAY_TMPDIR="/tmp") as (process, _):
        while "train_captioner" not in (said := str(process.stderr and process.stderr.readline())):
            assert said, "it ended"
        assert left(folder)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
        assert process.returncode == 130
    assert not left(folder)
    assert not (tmp_path / "store").exists()
