"""What an index lacks costs no picture: alt texts that are not there, splits that nobody knows, several captions."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.filters import Language, Size
from captioner.model import CaptionerConfig, TextConfig, VisionConfig
from captioner.stages import Caption
from captioner.styles import Style
from captioner.task import BaseTask, FilterTask
from captioner.tower import Tower
from captioner.vocabulary import train_vocabulary
from infra import storage
from infra.data.ledger import Ledger, commit, tally
from infra.data.parts import Part, merge
from infra.data.shards import OPTIONAL, ShardReader, joined_names, shard_names
from infra.data.work import StageWork
from infra.store import Artifact, Store
from infra.train.draw import pick, uniforms
from infra.train.optim import OptimConfig
from t2i.conditions.words import WordsConfig
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.priors.task import PriorShape, PriorTask, save_vocabulary
from t2i.protocol import Space
from t2i.vocabulary import TextVocabulary
from tests.infra.data.zoo import encode, picture, tar
from tests.workflows import test_export as plain  # its steps need no Ray
from workflows import evaluate, examine, held_out, look, mix, train_captioner, train_prior, verbs
from workflows.corpora import scoring
from workflows.export import export
from workflows.mix import MixConfig, MixWork
from workflows.splits import demand_rows
from workflows.train_captioner import TrainCaptionerConfig

here = plain.here
# By key: the texts of a picture and its split, as an index may have them.
ROWS = {
    "0": (["a red boat", "a boat", "boat at sea"], "train"),
    "1": ([], "train"),
    "2": (["a black cat"], "restval"),
    "3": (["x", "two dogs run"], "train"),
    "4": ([], "hidden"),
    "5": (["a tree"], "test"),
}


def ingest(config, out):
    """An index whose rows have the texts and splits of `config`, three in a shard."""
    made = plain.IngestWork(plain.IngestConfig(corpus=config["corpus"]), config["sources"], out)
    for name in config["sources"]:
        table = made(name)
        keys = table["key"].to_pylist()
        texts = [config["rows"][key][0] for key in keys]
        columns = {
            "caption_alt": pa.array([each[0] if each else None for each in texts], pa.string()),
            "alt_fault": pa.array([None if each else "no caption" for each in texts], pa.string()),
            "split": pa.array([config["rows"][key][1] for key in keys], pa.string()),
        }
        for column, values in columns.items():
            table = table.drop([column]) if column in table.column_names else table
            table = table.append_column(column, values)
        if any(len(each) > 1 for each in texts):
            field = pa.field("captions_alt", pa.list_(pa.string()), metadata=OPTIONAL)
            table = table.append_column(field, pa.array([e if len(e) > 1 else None for e in texts], field.type))
        commit(out, name, table)
    plain.write_sources(plain.find_corpus(config["corpus"]), out)
    Ledger(out).close()
    return tally(out)


def index(place, rows=None):
    """The artifact of such an index."""
    rows = ROWS if rows is None else rows
    keys = list(rows)
    for shard, first in enumerate(range(0, len(keys), 3)):
        part = keys[first : first + 3]
        members = [(f"{key}.{end}", encode(picture(int(key))) if end == "png" else b"x") for key in part for end in
                   ("png", "txt")]  # fmt: skip
        storage.write_bytes(f"{place}/corpus/{shard}.tar", tar(members))
    sources = plain.find_corpus(f"{place}/corpus").sources
    config = {"corpus": f"{place}/corpus", "rows": rows, "sources": sources}
    out = f"{place}/store/ingest/{'0' * 16}"
    summary = ingest(config, out)
    files = {file.url.removeprefix(out).lstrip("/"): storage.digest(file.url) for file in storage.listing(out)}
    files = {name: each for name, each in files.items() if not name.startswith("shards/")}
    told = {"step": "ingest", "id": "0" * 16, "config": {"corpus": config["corpus"]}, "inputs": [], "files": files}
    storage.write_json(f"{out}/manifest.json", told | {"summary": summary, "started": "2026-11-30T00:00:00Z"})
    return Artifact.open(out)


def captioned(place, images):
    store = Store(f"{place}/store", plain.CLUSTER)
    return store.step(plain.recaption, {"fails": [], "flagged": []}, images)


def mixed(images, captions, *verdicts, **config):
    """The mixture of every row, by key."""
    work = MixWork(MixConfig(**config), (images.path, captions.path, *(each.path for each in verdicts)))
    rows = {}
    for name in joined_names([images.path, captions.path]):
        table = work(name).to_pylist()
        keys = ShardReader([images.path], name, every=True).columns(["key"])["key"]
        rows |= dict(zip(keys, table, strict=True))
    return rows


def test_an_index_with_a_column_in_some_shards_is_whole(tmp_path):
    """And a column that a shard lacks is null where it was asked for as one that may lack."""
    images = index(str(tmp_path))
    assert look.verify([images.path])["whole"]
    first, second = (ShardReader([images.path], name) for name in shard_names(images.path))
    assert first.stored(["captions_alt?"], np.arange(3))["captions_alt?"] == [ROWS["0"][0], None, None]
    rows = {key: row for key, row in ROWS.items() if key != "3"} | {"3": (["one"], "train")}
    images = index(str(tmp_path / "other"), dict(sorted(rows.items())))
    second = ShardReader([images.path], "000001")
    assert second.columns(["captions_alt?", "split"])["captions_alt?"].tolist() == [None] * 3
    assert second.stored(["captions_alt?"], np.arange(2)) == {"captions_alt?": [None, None]}
    with pytest.raises(ValueError, match="no column 'captions_alt'"):
        second.columns(["captions_alt"])
    assert look.verify([images.path])["whole"]


def test_another_column_in_some_shards_is_a_fault_still(tmp_path, capsys):
    images = index(str(tmp_path))
    shard = f"{images.path}/shards/000001.parquet"
    table = pq.read_table(shard)
    pq.write_table(table.append_column("more", pa.array([1] * table.num_rows)), shard)
    with pytest.raises(SystemExit):
        look.verify([images.path])
    assert "other columns" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A captioner with loud weights."""
    from captioner.model import Captioner

    words = train_vocabulary(["a red boat and a black cat at sea", "its file says", "draw it"] * 9, 200)
    vision = VisionConfig(image_size=(16, 16), patch_size=8, hidden=32, layers=1, heads=2, mlp=32)
    text = TextConfig(hidden=32, layers=1, heads=2, mlp=32, max_length=40)
    config = CaptionerConfig(vision=vision, text=text, init_std=0.4)
    folder = str(tmp_path_factory.mktemp("model"))
    Captioner(config.blip(words), words, ("alt",)).eval().save(folder)
    return folder, words, config


@pytest.mark.parametrize("rows", [ROWS, {str(n): ([], "test") for n in range(4)}], ids=["mixed", "pictures alone"])
def test_every_picture_is_captioned(tmp_path, model, rows):
    images = index(str(tmp_path), rows)
    styles = (
        Style(name="short", max_tokens=5),
        Style(name="told", prompt="draw it[, its file says {alt}]", max_tokens=5, decoder="alt"),
    )
    out = []
    work = StageWork((Caption(Tower(model[0]), styles), Language(("en",))), (images.path,), 2)
    work.setup()
    for name in shard_names(images.path):
        out += work(name).to_pylist()
    assert [row["state"] for row in out] == ["accepted"] * len(rows)
    for row, (texts, _) in zip(out, rows.values(), strict=True):
        scores = row.get("logps_alt")
        assert (scores is None) == (len(texts) < 2)
        assert scores is None or (len(scores), scores[0]) == (len(texts), row["logp_alt"])
    for row, (texts, _) in zip(out, rows.values(), strict=True):
        assert all(isinstance(row[f"caption_{style.name}"], str) for style in styles)
        assert (row["logp_alt"] is None) == (not texts)
        assert (row["language_alt"], row["unfit_language"]) == (None, None) or texts


def test_a_prompt_loses_its_brackets_where_there_is_no_text(tmp_path, model):
    """So a picture without a text says what it would say of the prompt without the brackets."""
    tower = Tower(model[0])
    asked = Style(name="a", prompt="draw it[, its file says {alt}]", max_tokens=9, decoder="alt")
    bare = replace(asked, name="b", prompt="draw it")
    stage = Caption(tower, (asked, bare))
    stage.setup()
    batch = {tower.view: [tower.fit(picture(n)) for n in range(3)], "caption_alt": [None, "", "a black cat"]}
    said = stage(batch)
    assert said["caption_a"][:2] == said["caption_b"][:2]
    assert said["logp_a"][2] != said["logp_b"][2]


def test_the_share_of_alt_goes_to_others_where_there_is_none(tmp_path):
    images = index(str(tmp_path))
    rows = mixed(images, captioned(str(tmp_path), images), weights={"alt": 0.4, "short": 0.6}, min_words=2)
    assert all(rows[key]["keep"] for key in ROWS)
    assert [round(rows[key]["weight_alt"], 4) for key in ROWS] == [0.4, 0.0, 0.4, 0.4, 0.0, 0.4]
    assert [round(rows[key]["weight_short"], 4) for key in ROWS] == [0.6, 1.0, 0.6, 0.6, 1.0, 0.6]
    parts = {key: rows[key]["weights_alt"] for key in ROWS}
    assert np.allclose(parts["0"], [2 / 15] * 3)
    assert np.allclose(parts["3"], [0, 0.4])  # its first is one word, and its second is read
    assert (parts["1"], parts["4"]) == ([0.0], [0.0])
    assert np.allclose(parts["2"], [0.4])


def test_what_has_no_score_is_below_a_bound(tmp_path):
    images = index(str(tmp_path))
    captions = captioned(str(tmp_path), images)
    for name in shard_names(captions.path):
        shard = f"{captions.path}/shards/{name}.parquet"
        table = pq.read_table(shard)
        pq.write_table(table.append_column("logp_alt", pa.array([-1.0] * table.num_rows)), shard)
    rows = mixed(images, captions, weights={"alt": 0.5, "short": 0.5}, min_logp={"alt": -2.0})
    assert np.allclose(rows["0"]["weights_alt"], [0.5, 0, 0])
    rows = mixed(images, captions, weights={"alt": 1.0}, min_logp={"alt": -0.5})
    assert {row["keep"] for row in rows.values()} == {False}


def test_each_of_several_is_judged_by_its_own_score(tmp_path):
    images = index(str(tmp_path))
    captions = captioned(str(tmp_path), images)
    scores = {"000000": [[-1.0, -3.0, -1.5], None, None], "000001": [[-3.0, -1.0], None, None]}
    for name, several in scores.items():
        shard = f"{captions.path}/shards/{name}.parquet"
        table = pq.read_table(shard)
        first = pa.array([-1.0 if each is None else each[0] for each in several])
        field = pa.field("logps_alt", pa.list_(pa.float64()), metadata=OPTIONAL)
        pq.write_table(
            table.append_column("logp_alt", first).append_column(field, pa.array(several, field.type)), shard
        )
    rows = mixed(images, captions, weights={"alt": 1.0}, min_logp={"alt": -2.0})
    assert np.allclose(rows["0"]["weights_alt"], [0.5, 0, 0.5])
    assert np.allclose(rows["3"]["weights_alt"], [0, 1])
    assert rows["2"]["weight_alt"] == 1


SPOKEN = {
    "0": (["un chien court dans le parc au bord de la rivière", "a dog runs through the park near the water"], "train"),
    "1": (["un chien court dans le parc au bord de la rivière", "größer Hund auf der Straße"], "train"),
    "2": (["un chien court dans le parc au bord de la rivière"], "train"),
    "3": (["a dog runs through the park near the water"], "train"),
    "4": ([], "train"),
}


def examined(place, images):
    """The verdicts of `examine`, without Ray."""
    out = f"{place}/examined"
    work = StageWork((Size(1, 9), Language(("en",))), (images.path,), 2)
    work.setup()
    for name in shard_names(images.path):
        commit(out, name, work(name))
    return Artifact(out, {"step": "examine"})


def test_each_of_several_is_judged_by_its_own_language(tmp_path):
    pytest.importorskip("py3langid")
    images = index(str(tmp_path), SPOKEN)
    captions, looked = captioned(str(tmp_path), images), examined(tmp_path, images)
    assert examine.summary(looked.path)["unfit_language"] == {"other language": 2}
    held = ShardReader([looked.path], "000000").stored(["unfit_languages?", "languages_alt?"], np.arange(3))
    assert held["unfit_languages?"] == [
        ["other language: fr", None],
        [f"other language: {c}" for c in ("fr", "de")],
        None,
    ]
    assert held["languages_alt?"] == [["fr", "en"], ["fr", "de"], None]
    assert not any("languages" in name for name in ShardReader([looked.path], "000001").names)  # as before, to the byte

    rows = mixed(images, captions, looked, weights={"alt": 0.4, "short": 0.6})
    assert [row["keep"] for row in rows.values()] == [True, False, False, True, True]
    assert np.allclose(rows["0"]["weights_alt"], [0, 0.4])
    assert np.allclose(rows["1"]["weights_alt"], [0, 0])
    assert [rows[key]["keep_reason"] for key in "012"] == [None, *["other language: fr"] * 2]
    assert [round(rows[key]["weight_short"], 4) for key in rows] == [0.6, 0.0, 0.0, 0.6, 1.0]
    rows = mixed(images, captions, looked, weights={"alt": 1.0}, max_words=8)
    assert rows["0"]["keep_reason"] == "alt too long"
    rows = mixed(images, captions, looked, weights={"alt": 1.0}, min_words=10)
    assert rows["0"]["keep_reason"] == "alt other language"  # its first has words enough, its second has not
    assert mixed(images, captions, looked, weights={"short": 1.0})["0"]["keep"]


def test_scores_that_some_parts_lack_are_in_the_shard(tmp_path, model):
    rows = {"0": (["a red boat"], "train"), "1": ([], "train"), "2": (["a black cat", "a boat"], "train")}
    images = index(str(tmp_path), rows)
    work = StageWork((Caption(Tower(model[0]), (Style(name="short", max_tokens=5),)),), (images.path,), 1)
    work.setup()
    shard = work.open("000000")
    own = {Part.of(first, table): table for first, table in shard.tables((0, 3), lambda: True)}
    assert ["logps_alt" in table.column_names for table in own.values()] == [False, False, True]
    merge(str(tmp_path / "out"), "000000", shard.sample_ids, own)
    merged, whole = pq.read_table(tmp_path / "out" / "shards" / "000000.parquet"), work("000000")
    for field in whole.schema:
        assert merged.schema.field(field.name).metadata == field.metadata
        assert merged[field.name].to_pylist() == whole[field.name].to_pylist()
    assert whole.schema.field("logps_alt").metadata == {b"optional": b"true"}


def test_a_mixture_that_reads_no_alt_text_knows_nothing_of_several(tmp_path):
    images = index(str(tmp_path))
    rows = mixed(images, captioned(str(tmp_path), images), weights={"short": 1.0})
    assert "weights_alt" not in rows["0"]


def test_nothing_left_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(mix, "connect", lambda cluster: None)
    monkeypatch.setattr(mix, "run_shards", lambda work, names, out, **_: {n: commit(out, n, work(n)) for n in names})
    images = index(str(tmp_path), {str(n): ([], "train") for n in range(4)})
    captions = captioned(str(tmp_path), images)
    with pytest.raises(ValueError, match=r"No row keeps a caption to be read: alt missing \(4\)"):
        mix.mix.work(
            MixConfig(weights={"alt": 1.0}), images, captions, out=f"{tmp_path}/m", cluster=plain.CLUSTER, report=None
        )


@pytest.mark.parametrize(
    ("splits", "wanted"),
    [
        (["restval", "restval", "test"], r"its splits are restval \(2\) and test \(1\).*--corpus.splits restval=train"),
        (["test"] * 3, r"its splits are test \(3\).*--corpus.splits restval=train"),
        (["hidden"] * 3, r"--corpus.splits hidden=train"),
    ],
)
def test_no_row_to_train_on_names_the_splits(tmp_path, splits, wanted):
    images = index(str(tmp_path), {str(n): (["a boat"], split) for n, split in enumerate(splits)})
    for config in (TrainCaptionerConfig(), TrainCaptionerConfig(model="org/blip", base=None)):
        with pytest.raises(ValueError, match=wanted):
            train_captioner.train_captioner.work(
                config, images, out=f"{tmp_path}/c", cluster=plain.CLUSTER, report=None
            )
    assert not storage.exists(f"{tmp_path}/c")
    with pytest.raises(ValueError, match=wanted):
        demand_rows(images)


def test_a_base_wants_alt_texts_and_a_finetuning_none(tmp_path):
    images = index(str(tmp_path), {str(n): ([], "train") for n in range(4)})
    with pytest.raises(ValueError, match="its 4 training rows have no alt text"):
        train_captioner.train_captioner.work(
            TrainCaptionerConfig(), images, out=f"{tmp_path}/c", cluster=plain.CLUSTER, report=None
        )
    demand_rows(images)


def test_only_known_splits_are_trained_on_and_tested_with(tmp_path, model):
    images = index(str(tmp_path))
    captions = captioned(str(tmp_path), images)
    _, words, config = model
    task = BaseTask(source=config, vocabulary=words, image_size=(16, 16), max_length=40, optim=OptimConfig())
    chosen = [ShardReader([images.path], name).columns(["key", *task.where_reads]) for name in shard_names(images.path)]
    assert [key for each in chosen for key in each["key"][task.where(each)]] == ["0", "3"]
    assert [prompt.text for prompt in held_out.held_out(images, 9)] == ["a tree"]
    assert [row["caption_alt"] for row in evaluate.held_out(images, captions, 9)] == ["a tree"]
    found = list(train_captioner._captions(TrainCaptionerConfig(styles=()), images))
    assert sorted(found) == sorted([*ROWS["0"][0], *ROWS["3"][0]])


def test_scores_are_of_those_who_have_a_text():
    rows = [{"caption_alt": alt, "reference_short": "a red boat", "caption_short": "a red boat"} for alt in
            ("a red car", None)]  # fmt: skip
    with_one = scoring.caption_scores("words", rows)
    assert with_one["alt_text_f1"] == scoring.caption_scores("words", rows[:1])["alt_text_f1"] > 0
    assert "alt_text_f1" not in scoring.caption_scores("words", rows[1:])
    scene = json.dumps({"background": "white", "objects": []})
    drawn = [{"scene": scene, "caption_short": "", "caption_descriptive": "", "caption_alt": None}]
    assert "alt_text_f1" not in scoring.caption_scores("shapes", drawn)
    shown = evaluate._captioned(encode(picture(0)), rows[1] | {"scene": None, "reference_descriptive": None}, ["short"])
    assert [line.kind for line in shown.lines] == ["Short, rewritten"]


def test_the_page_shows_rows_without_a_text(tmp_path, capsys):
    captions = captioned(str(tmp_path), index(str(tmp_path)))
    verbs.gallery([captions.path, "--out", f"{tmp_path}/page.html"])
    page = storage.read_bytes(f"{tmp_path}/page.html").decode()
    assert all(f'"short":"this is {key}"' in page for key in ROWS)


GOLDEN = [0, 1, 2, 2, 2, 2, 1, 1, 1, 1]
# What was read in two epochs before a picture could have several alt texts: alt, short or long.
READ = ("lalllslallll", "aallasllslsl")


def test_which_caption_is_read_is_a_function_of_seed_epoch_and_id():
    """The draws of today: another number here is another training for everybody."""
    ids = np.arange(10, dtype=np.uint64)
    drawn = uniforms(0, np.zeros(10), ids, "alt")
    assert pick([["a", "b", "c"]] * 10, drawn) == GOLDEN
    assert pick([None, ["a"], ["a", "b"]], np.array([0.9, 0.9, 0.9])) == [0, 0, 1]
    rows = np.arange(30_000, dtype=np.uint64)
    shares = np.bincount(pick([[0, 0, 0]] * len(rows), uniforms(3, np.zeros(len(rows)), rows, "alt")), minlength=3)
    assert np.allclose(shares / len(rows), 1 / 3, atol=0.01)
    weighed = pick([[0] * 4] * len(rows), uniforms(3, np.zeros(len(rows)), rows, "alt"), [[0.3, 0, 0.1, 0]] * len(rows))
    assert np.allclose(np.bincount(weighed, minlength=4) / len(rows), [0.75, 0, 0.25, 0], atol=0.01)
    assert pick([[0, 0, 0]] * 2, np.array([np.nextafter(1, 0)] * 2), [[0.1, 0.7, 0.0], [0, 0, 0]]) == [1, 0]


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_corpus_of_one_text_a_picture_is_read_as_before(tmp_path, epoch):
    words = TextVocabulary.train(["alt short long " + " ".join(map(str, range(12)))] * 9, 64, 8)
    save_vocabulary(words, str(tmp_path / "words"))
    shape = PriorShape(
        model=AutoregressiveConfig(width=32, layers=1, heads=2), space=Space((2, 2), codes=4),
        conditions=(WordsConfig(vocabulary_size=len(words), length=8),),
    )  # fmt: skip
    styles = {"a": "alt", "s": "short", "l": "long"}
    task = PriorTask(
        shape=shape, folder=str(tmp_path / "words"), styles=(*styles.values(),), optim=OptimConfig(), drop=0
    )
    texts = {style: [f"{style} {n}" for n in range(12)] for style in styles.values()}
    texts["short"] = [text if n % 3 else None for n, text in enumerate(texts["short"])]
    rows = {"codes": [np.zeros(4, np.int32)] * 12, "captions_alt?": [None] * 12, "weights_alt?": [None] * 12}
    rows |= {f"caption_{style}": column for style, column in texts.items()}
    rows |= {f"weight_{style}": [weight] * 12 for style, weight in zip(texts, (0.3, 0.3, 0.4), strict=True)}

    def draw(salt):
        return uniforms(7, np.full(12, epoch), np.arange(12, dtype=np.uint64), salt)

    wanted = words.encode([f"{styles[letter]} {n}" for n, letter in enumerate(READ[epoch])])
    assert np.array_equal(task.collate(rows, draw)["text"], wanted)


def drawing(*allowed):
    """Draws by the salts that are allowed; any other is a fault."""

    def draw(salt):
        assert salt in allowed, salt
        return uniforms(7, np.zeros(3), np.arange(3, dtype=np.uint64), salt)

    return draw


def base_rows(several):
    rows = {"pixels": [picture(n) for n in range(3)], "caption_alt": ["a boat", "a black cat", "draw it"]}
    return rows | ({} if several is None else {"captions_alt?": several})


def test_a_base_reads_one_of_several_and_single_ones_as_before(model):
    _, words, config = model
    task = BaseTask(source=config, vocabulary=words, image_size=(16, 16), max_length=40, optim=OptimConfig())
    before = task.collate(base_rows(None), drawing())
    assert all(
        np.array_equal(before[name], each) for name, each in task.collate(base_rows([None] * 3), drawing()).items()
    )
    several = [["a boat", "a red boat at sea"], None, ["draw it"]]
    drawn = drawing("alt")
    after = task.collate(base_rows(several), drawn)
    place = pick(several, drawn("alt"))[0]
    said = words.sequences([several[0][place], "a black cat", "draw it"], "", 40)[0]
    assert np.array_equal(after["ids_alt"], said)


def test_a_filter_takes_none_of_a_rows_own_texts_for_wrong(model):
    _, words, _ = model
    from captioner.matching import MatchingConfig

    task = FilterTask(
        source="", styles=(), vocabulary=words, image_size=(16, 16), max_length=40, optim=OptimConfig(),
        matching=MatchingConfig(match=1, hard=0),
    )  # fmt: skip
    assert task.reads == ("pixels", "captions_alt?", "caption_alt")
    several = [["a boat", "a red boat at sea"], None, None]
    batch = task.collate(base_rows(several), drawing("alt", "text", "draw_text", "draw_image"))
    place = pick(several, drawing("alt")("alt"))[0]
    assert np.array_equal(batch["ids"], words.sequences([several[0][place], "a black cat", "draw it"], "", 40)[0])
    assert batch["known"].tolist() == [0, 0, 0]


def prior_task(tmp_path):
    words = TextVocabulary.train([text for texts, _ in ROWS.values() for text in texts], 64, 8)
    save_vocabulary(words, str(tmp_path / "words"))
    shape = PriorShape(
        model=AutoregressiveConfig(width=32, layers=1, heads=2), space=Space((2, 2), codes=4),
        conditions=(WordsConfig(vocabulary_size=len(words), length=8),),
    )  # fmt: skip
    folder = str(tmp_path / "words")
    return words, PriorTask(shape=shape, folder=folder, styles=("alt", "short"), optim=OptimConfig(), drop=0)


def test_a_prior_reads_one_of_several_by_its_weights(tmp_path):
    words, task = prior_task(tmp_path)
    rows = {"codes": [np.zeros(4, np.int32)] * 3, "caption_short": [None] * 3, "weight_short": [0.0] * 3}
    rows |= {"caption_alt": ["a red boat", "a black cat", "x"], "weight_alt": [1.0] * 3}
    before = task.collate(rows, drawing("caption", "noise"))
    none = rows | {"captions_alt?": [None] * 3, "weights_alt?": [None] * 3}
    assert np.array_equal(before["text"], task.collate(none, drawing("caption", "noise"))["text"])
    several = {"captions_alt?": [["a red boat", "boat at sea"], None, ["x", "two dogs run"]]}
    several["weights_alt?"] = [np.array([0.0, 1.0]), np.array([1.0]), np.array([0.0, 1.0])]
    after = task.collate(rows | several, drawing("alt", "caption", "noise"))
    assert np.array_equal(after["text"], words.encode(["boat at sea", "a black cat", "two dogs run"]))


def test_the_columns_of_a_mixture_are_those_that_a_prior_asks_for(tmp_path):
    images = index(str(tmp_path))
    captions = captioned(str(tmp_path), images)
    out = f"{tmp_path}/mixture"
    for name in shard_names(images.path):
        commit(out, name, MixWork(MixConfig(weights={"alt": 0.5, "short": 0.5}), (images.path, captions.path))(name))
    _, task = prior_task(tmp_path)
    wanted = [name for name in task.reads if name != "codes"]
    rows = ShardReader([images.path, captions.path, out], "000000").rows(wanted, [0, 1, 2])
    assert rows["captions_alt?"] == [ROWS["0"][0], None, None]
    assert [len(each) for each in rows["weights_alt?"]] == [3, 1, 1]
    told = list(train_prior.captions_of([images.path, captions.path, out], ("alt", "short"), 100))
    assert {"boat at sea", "two dogs run", "this is 0"} <= set(told)


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_an_export_writes_all_texts(here, tmp_path, form):
    place = str(tmp_path)
    rows = ROWS | {"3": (["one"], "train")}  # several in the first shard only
    images = index(place, rows)
    captions = captioned(place, images)
    every = {"0": [-1.0, -3.0, None], "1": [], "2": [-4.0], "3": [-5.0], "4": [], "5": [-6.0]}
    for name in shard_names(captions.path):
        shard = f"{captions.path}/shards/{name}.parquet"
        own = [every[key] for key in ShardReader([images.path], name).columns(["key"])["key"]]
        table = pq.read_table(shard).append_column("logp_alt", pa.array([next(iter(each), None) for each in own]))
        if name == "000000":
            field = pa.field("logps_alt", pa.list_(pa.float64()), metadata=OPTIONAL)
            table = table.append_column(field, pa.array([e if len(e) > 1 else None for e in own], field.type))
        pq.write_table(table, shard)
    mixture = Store(f"{place}/store", plain.CLUSTER).step(
        plain.mix, MixConfig(weights={"alt": 0.75, "short": 0.25}, min_logp={"alt": -5.5}), images, captions
    )
    export(plain.options(place, (images, captions, mixture), mixed=True, format=form))
    if form == "parquet":
        tables = [pq.read_table(file.url) for file in plain.found(place)]
        assert len({table.schema for table in tables}) == 1
        told = {row["key"]: row for table in tables for row in table.to_pylist()}
        assert told["1"]["alt_fault"] == "no caption"
        assert told["4"]["split"] == "hidden"
    else:
        files = plain.members(place) | plain.members(place, shard="000001")
        told = {key: json.loads(files[f"{key}.captions.json"]) for key in rows}
    assert {key: row["captions_alt"] for key, row in told.items()} == {key: texts for key, (texts, _) in rows.items()}
    assert {key: row["logps_alt"] for key, row in told.items()} == every
    weights = {"0": [0.375, 0.375, 0], "1": [], "2": [0.75], "3": [0.75], "4": [], "5": [0]}
    assert {key: row["weights_alt"] for key, row in told.items()} == weights
    assert not any(name.startswith(("matches", "clips")) for name in told["0"])
    card = " ".join(storage.read_bytes(f"{place}/out/README.md").decode().split())
    lists = "in `weights_alt`, `logps_alt`, those of the first in `weight_alt`, `logp_alt`."
    assert f"has all of an image's, in order; the scores of each stand, in that order, {lists}" in card
    images = index(f"{place}/single", {"0": (["one"], "train"), "1": ([], "test")})
    export(plain.options(f"{place}/single", (images, captioned(f"{place}/single", images), None), format=form))
    if form == "parquet":
        assert "captions_alt" not in pq.read_table(plain.found(f"{place}/single")[0].url).column_names
    else:
        assert "captions_alt" not in json.loads(plain.members(f"{place}/single")["0.captions.json"])
    assert "several" not in storage.read_bytes(f"{place}/single/out/README.md").decode()
