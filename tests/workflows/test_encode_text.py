"""Features of every caption as a step: what is written and counted, refused and told, and what a prior takes of it."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from infra import storage
from infra.config import from_dict, to_dict
from infra.data import wide
from infra.data.ledger import Ledger, commit, tally
from infra.data.shards import ShardReader, count_rows, joined_names
from infra.data.verify import verify_shards
from infra.data.work import StageWork
from infra.store import Artifact, Plan, Store, step
from infra.train.feed import Feed
from infra.train.plan import BatchPlan
from infra.train.prepare import Prepare
from t2i.conditions.encoders import TextEncoder, TextEncoderConfig
from t2i.conditions.text_features import TextFeaturesConfig, load_null
from t2i.conditions.words import WordsConfig
from t2i.stages import EncodeText
from tests.t2i.conditions import tiny
from tests.workflows import test_export as plain  # its steps need no Ray
from tests.workflows.test_side_facts import index
from workflows import encode_text as module
from workflows import look as looks
from workflows import recipes, text_to_image, train_prior, verbs
from workflows.encode_text import NULL, EncodeTextConfig, encode_text, look
from workflows.mix import MixConfig
from workflows.text_to_image import Recipe

ROWS = {
    "0": (["a red circle", tiny.LONG, "the dot"], "train"),
    "1": ([], "train"),
    "2": (["a small green dot"], "train"),
    "3": (["a dot", "two dots left"], "train"),
    "4": (["the left"], "train"),
    "5": (["a circle"], "test"),
}
SHORT = {"0": tiny.LONG, "1": "a red dot", "2": None, "3": "blue", "4": "green", "5": "circle"}


@step(version=1)
def recaption(config: dict, images: Artifact, *, out, cluster, report):
    """Captions of one style."""
    for name in joined_names([images.path]):
        reader = ShardReader([images.path], name, every=True)
        said = [config["short"][key] for key in reader.columns(["key"])["key"]]
        columns = {"sample_id": reader.sample_ids, "state": reader.states}
        columns |= {"reason": pa.array(reader.reasons, pa.string()), "caption_short": pa.array(said, pa.string())}
        commit(out, name, pa.table(columns))
    Ledger(out).close()
    return tally(out) | {"styles": [{"name": "short"}]}


@step(version=1)
def encode(config: dict, images: Artifact, tokenizer: Artifact, *, out, cluster, report):
    """Codes that are a function of the row."""
    for name in joined_names([images.path]):
        reader = ShardReader([images.path], name, every=True)
        codes = [np.full(4, int(key), np.int32) for key in reader.columns(["key"])["key"]]
        columns = {"sample_id": reader.sample_ids, "state": reader.states}
        commit(out, name, pa.table(columns | {"reason": pa.array(reader.reasons, pa.string()), "codes": codes}))
    Ledger(out).close()
    return tally(out) | {"grid": [2, 2], "codebook_size": 8}


@step(version=1)
def train_tokenizer(config: dict, images: Artifact, *, out, cluster, report):
    """Nothing."""
    return {}


def stages_here(stages, inputs, out, *, batch_size, actors, report):
    """As `run_stages`, without Ray."""
    work = StageWork(tuple(stages), tuple(inputs), batch_size)
    work.setup()
    for name in joined_names(inputs):
        if not storage.exists(storage.join(out, "shards", f"{name}.parquet")):
            commit(out, name, work(name))
    Ledger(out).close()
    return tally(out)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(module, "run_stages", stages_here)
    monkeypatch.setattr(module, "connect", lambda cluster: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {"clip": tiny.clip, "t5": tiny.t5}
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in made.items()}


@pytest.fixture
def store(tmp_path):
    return Store(f"{tmp_path}/store", plain.CLUSTER)


@pytest.fixture
def made(store, tmp_path):
    """An index and its captions."""
    images = index(str(tmp_path), ROWS)
    return images, store.step(recaption, {"short": SHORT}, images)


def config_of(folder, **fields):
    chosen = {"name": "told", "cut_captions": True, "batch": 2, **fields}
    return EncodeTextConfig(encoder=TextEncoderConfig(model=folder, precision="fp32"), **chosen)


def columns_of(artifact):
    """By key, all that stands in the artifact's rows."""
    rows = {}
    for name in joined_names([artifact.path]):
        keys = ShardReader([artifact.inputs[0].path], name, every=True).columns(["key"])["key"]
        reader = ShardReader([artifact.path], name)
        table = reader.rows(sorted(reader.names), range(len(keys)))
        rows |= {key: {column: values[row] for column, values in table.items()} for row, key in enumerate(keys)}
    return rows


def floats(bits):
    return torch.from_numpy(np.array(bits)).view(torch.bfloat16).float()


@pytest.mark.parametrize("family", ["clip", "t5"])
def test_every_caption_is_there_as_the_encoder_has_it(here, store, made, folders, family):
    config = config_of(folders[family])
    artifact = store.step(encode_text, config, *made)
    encoder, rows = TextEncoder(config.encoder), columns_of(artifact)
    for key, row in rows.items():
        alts = ROWS[key][0]
        texts = {"told_alt": alts[:1], "told_alt_1": alts[1:2], "told_alt_2": alts[2:3], "told_short": [SHORT[key]]}
        for column, text in texts.items():
            if not text or not text[0]:
                assert row.get(column) is None
                continue
            read = encoder.read(text)
            torch.testing.assert_close(
                floats(row[column]), read.tokens.float().flatten(), rtol=2**-7, atol=2**-7
            )  # of its true length, where there is a mask
    null = load_null(storage.join(artifact.path, NULL))
    assert torch.equal(null.tokens, encoder.read([""]).tokens)
    summary = artifact.summary
    assert (summary["styles"], summary["alts"], summary["name"]) == (["alt", "short"], 3, "told")
    assert summary["cut"] == {"alt": {"rows": 5, "cut": 1}, "short": {"rows": 5, "cut": 1}}
    assert len(summary["weights"]["weights_sha256"]) == 64
    assert not list(verify_shards(artifact.path, [each.path for each in made], summary))
    assert not looks._verify(artifact)["faults"]


def test_a_cut_step_goes_on(here, store, made, folders, monkeypatch, place):
    """In a store of its own, local or on S3: shards that are there stay, and the whole is as it would have been."""
    config, encoded, calls = config_of(folders["t5"]), EncodeText.__call__, []

    def dies(stage, batch):
        if len(calls) == 2:  # of three batches, the last of which is of the second shard
            raise KeyboardInterrupt
        calls.append(batch)
        return encoded(stage, batch)

    other = Store(storage.join(place, "other"), plain.CLUSTER)
    monkeypatch.setattr(EncodeText, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        other.step(encode_text, config, *made)
    monkeypatch.setattr(EncodeText, "__call__", encoded)
    path = storage.join(other.root, "encode_text", encode_text.identity(config, made))
    there = [file for file in storage.listing(path) if "/shards/" in file.url]
    assert len(there) == 1
    artifact, whole = other.step(encode_text, config, *made), store.step(encode_text, config, *made)
    assert there[0] in storage.listing(path)
    assert artifact.records() == whole.records()
    assert artifact.manifest["files"][NULL] == whole.manifest["files"][NULL]


def test_an_encoder_lies_on_s3(here, store, made, folders, s3):
    config = config_of(folders["clip"])
    storage.upload(folders["clip"], f"{s3}/clip")
    away = replace(config, encoder=replace(config.encoder, model=f"{s3}/clip"))
    artifact, whole = store.step(encode_text, away, *made), store.step(encode_text, config, *made)
    assert artifact.records() == whole.records()
    assert artifact.summary["weights"] == whole.summary["weights"] | {"model": f"{s3}/clip"}
    with pytest.raises(FileNotFoundError):
        look(replace(away, encoder=replace(away.encoder, model=f"{s3}/none")), *made)


@pytest.mark.long
def test_actors_encode(ray_cluster, store, made, folders, tmp_path):
    artifact = store.step(encode_text, config_of(folders["clip"]), *made)
    here = Store(f"{tmp_path}/here", plain.CLUSTER)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "run_stages", stages_here)
        patched.setattr(module, "connect", lambda cluster: None)
        assert artifact.records() == here.step(encode_text, config_of(folders["clip"]), *made).records()


def test_captions_that_would_lose_their_end_are_refused(here, store, made, folders):
    config = config_of(folders["clip"], cut_captions=False)
    with pytest.raises(ValueError, match=r"12 tokens, and so cuts 20.0% of 5 captions of 'short': .*--cut-captions"):
        store.step(encode_text, config, *made)
    alone = replace(config, styles=("alt",))
    assert look(alone, *made)["alt"].share == 0  # of rows with several the first is looked at
    assert store.step(encode_text, alone, *made).summary["styles"] == ["alt"]
    with pytest.raises(ValueError, match="no captions of the style 'long': there are alt, short"):
        store.step(encode_text, replace(config, styles=("long",)), *made)
    with pytest.raises(ValueError, match="column caption_alt already"):
        store.step(encode_text, replace(alone, name="caption"), *made)
    with pytest.raises(ValueError, match="named by a word"):
        replace(config, name="a b")


def test_a_plan_tells_what_is_cut(here, store, made, folders, capsys):
    config = config_of(folders["clip"])
    plan = Plan(store.root)
    plan.step(encode_text, config, *made)
    ((_, identity, reason),) = plan.lines
    assert (reason, plan.told[identity]) == (
        "first time",
        [
            "alt: 0 of 5 rows of those that were looked at (0.0%) are cut",
            "short: 1 of 5 rows of those that were looked at (20.0%) are cut",
        ],
    )
    store.step(encode_text, config, *made)
    plan = Plan(store.root)
    plan.step(encode_text, config, *made)
    assert plan.lines[0][2] == "done"
    assert plan.told[identity] == ["alt: 1 of 5 rows (20.0%) are cut", "short: 1 of 5 rows (20.0%) are cut"]
    gone = replace(config, encoder=replace(config.encoder, model="/nowhere/at/all"))
    plan.step(encode_text, gone, *made)
    assert plan.told[plan.lines[-1][1]] == []


def test_a_recipe_with_features_has_a_tenth_step(folders, tmp_path, capsys):
    recipe = recipes.debug()
    heard = replace(
        recipe,
        text_features=(config_of(folders["t5"], name="t5"), config_of(folders["clip"], name="clip")),
        prior=replace(recipe.prior, conditions=(TextFeaturesConfig(name="t5"), TextFeaturesConfig(name="clip"))),
    )
    (tmp_path / "heard.json").write_text(json.dumps(to_dict(heard)))
    told = verbs.plan([f"{tmp_path}/heard.json", "--store", f"{tmp_path}/store"])
    assert [each["step"] for each in told["steps"]][6:9] == ["encode_text", "encode_text", "train_prior"]
    before = Plan(f"{tmp_path}/store")
    text_to_image.run(from_dict(Recipe, to_dict(recipe)), before)
    assert [line[:2] for line in before.lines][:6] == [(each["step"], each["id"]) for each in told["steps"]][:6]
    changed = verbs.plan([f"{tmp_path}/heard.json", "--text-features.1.cut-captions", "--store", f"{tmp_path}/store"])
    assert changed["steps"] == told["steps"]  # it was said already


def prior_config(*conditions):
    recipe = recipes.debug()
    model = replace(recipe.prior.model, width=16, layers=1, heads=2)
    return replace(recipe.prior, model=model, conditions=conditions)


@pytest.fixture
def trained(here, store, made, folders, monkeypatch):
    """What a training of a prior is given, without the training."""
    images, captions = made
    mixture = store.step(plain.mix, MixConfig(weights={"alt": 0.5, "short": 0.5}), images, captions)
    tokenizer = store.step(train_tokenizer, {}, images)
    codes = store.step(encode, {}, images, tokenizer)

    def train(config, *more, features=None):
        seen = []
        monkeypatch.setattr(train_prior, "fit", lambda trainings, *_: seen.extend(trainings) or {"step": 1, "rows": 2})
        artifact = store.step(train_prior.train_prior, config, mixture, codes, tokenizer, *more)
        return artifact, seen[0]

    return train


def test_a_prior_takes_what_was_cached(store, made, folders, trained):
    features = store.step(encode_text, config_of(folders["t5"], name="t5"), *made)
    words = WordsConfig(vocabulary_size=64, length=8)
    artifact, training = trained(prior_config(words, TextFeaturesConfig(name="t5")), features)
    assert training.inputs[-1] == features.path
    assert training.task.cached == ("t5",)
    condition = training.task.shape.conditions[1]
    assert condition.encoder == config_of(folders["t5"]).encoder
    assert condition.sizes.masked
    assert storage.exists(artifact.url("vocabulary/null_t5.safetensors"))
    named = replace(condition, sizes=None)
    assert trained(prior_config(words, named), features)[1].task.shape == training.task.shape
    _, through = trained(prior_config(words, named))
    assert through.task.cached == ()
    assert replace(through.task.shape) == training.task.shape


def batches(training):
    """What a worker is fed in three epochs, without Ray."""
    task, inputs = training.task, training.inputs
    counts = count_rows(inputs, task.where, task.where_reads)
    plan = BatchPlan(list(counts.values()), 4, 0, 2)
    feed = Feed(task, inputs, list(counts), plan, 3, 0, 1, 4, 1)
    work = Prepare(task, inputs, 0, feed.rows, 0, feed.key)
    for chunk in feed.chunks(0, 3, 3):
        for batch in work.batches(chunk):
            yield {name: torch.from_numpy(np.array(array)) for name, array in batch.items()}


@pytest.mark.parametrize("least", [0, wide.LEAST])
@pytest.mark.parametrize("family", ["clip", "t5"])
def test_a_feed_reads_the_features_of_the_caption_that_is_heard(
    store, made, folders, trained, monkeypatch, family, least
):
    """In side files, of which no more is read, or in columns of a shard."""
    monkeypatch.setattr(wide, "LEAST", least)
    features = store.step(encode_text, config_of(folders[family]), *made)
    assert storage.exists(features.url("wide")) == (least == 0)
    config = prior_config(TextFeaturesConfig(name="told", encoder=config_of(folders[family]).encoder))
    _, cached = trained(config, features)
    _, through = trained(config)
    encoder, seen = TextEncoder(config_of(folders[family]).encoder), 0
    pairs = zip(batches(cached), batches(through), strict=True)
    for batch, computed in pairs:
        assert torch.equal(batch["id"], computed["id"])
        assert torch.equal(batch["dropped_told"], computed["dropped_told"])
        read = encoder(computed["told"], computed.get("told_seen"))
        torch.testing.assert_close(
            batch["told"].view(torch.bfloat16).float(), read.tokens.float(), rtol=2**-7, atol=2**-7
        )
        if read.seen is not None:
            assert torch.equal(batch["told_seen"], read.seen)
        seen += len(batch["id"])
    assert seen == 12


def test_what_does_not_fit_is_refused(store, made, folders, trained, tmp_path):
    images, captions = made
    config, t5 = config_of(folders["t5"], name="t5"), TextFeaturesConfig(name="t5")
    features = store.step(encode_text, config, *made)
    others = store.step(recaption, {"short": SHORT | {"1": "another"}}, images)
    with pytest.raises(ValueError, match="features of other captions"):
        trained(prior_config(t5), store.step(encode_text, config, images, others))
    with pytest.raises(ValueError, match="No condition of the prior hears the features 't5'"):
        trained(prior_config(WordsConfig()), features)
    with pytest.raises(ValueError, match="both called 't5'"):
        trained(prior_config(t5), features, store.step(encode_text, replace(config, batch=3), *made))
    with pytest.raises(ValueError, match="made by recaption"):
        trained(prior_config(t5), captions)
    with pytest.raises(ValueError, match="whose features the condition 't5' hears"):
        trained(prior_config(t5))
    with pytest.raises(ValueError, match="name two encoders"):
        trained(prior_config(replace(t5, encoder=TextEncoderConfig(model=folders["clip"]))), features)
    with pytest.raises(ValueError, match=r"of the style 'short', but .* has no features"):
        trained(prior_config(t5), store.step(encode_text, replace(config, styles=("alt",)), *made))
