import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import storage
from infra.cluster import Cluster
from infra.data.ledger import Ledger, commit, tally
from infra.data.shards import ShardReader, shard_names
from infra.data.verify import verify_files, verify_shards
from infra.store import Artifact, Store, step
from tests.infra.data.here import work_here
from tests.infra.data.zoo import encode, picture, tar
from workflows import mix as module
from workflows.__main__ import main
from workflows.deduplicate import DeduplicateConfig, HashConfig, deduplicate, hash_images
from workflows.examine import ExamineConfig, examine
from workflows.ingest import IngestConfig, ingest
from workflows.mix import MISSING, TOO_LONG, TOO_SHORT, UNLIKELY, UNMATCHED, MixConfig, MixWork, judge, mix, told

INDEX = {
    "sample_id": ["00", "01", "02", "03", "04", "05"],
    "state": ["accepted", "accepted", "accepted", "accepted", "rejected", "accepted"],
    "reason": [None, None, None, None, "no image", None],
    "caption_alt": ["a cat on a mat", "IMG_1.jpg", "a dog", "big", "lost", "one two three four five six seven"],
}
CAPTIONS = {
    "sample_id": INDEX["sample_id"],
    "state": ["accepted", "accepted", "accepted", "accepted", "rejected", "failed"],
    "reason": [None, None, None, None, "no image", "Caption: OSError: gone"],
    "caption_short": ["a cat", "boat", "a dog", "a", None, None],
    "logp_short": [-0.1, -0.2, -3.0, -4.0, None, None],
    "caption_descriptive": ["a black cat on a red mat", "a boat at sea", "", "a very very long one", None, None],
    "logp_descriptive": [-0.1, -9.0, -0.1, -0.1, None, None],
    "logp_alt": [-1.0, -8.0, -2.0, -5.0, None, None],
}
CONFIG = MixConfig(
    weights={"alt": 0.25, "short": 0.25, "descriptive": 0.5},
    min_logp={"alt": -4.0, "short": -2.0, "descriptive": -5.0},
    min_words=2,
    max_words=4,
)


def write(folder, name, columns):
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "shards" / f"{name}.parquet")


@pytest.fixture
def inputs(tmp_path):
    for name in ("000000", "000001"):
        write(tmp_path / "images", name, INDEX)
        write(tmp_path / "captions", name, CAPTIONS)
    return str(tmp_path / "images"), str(tmp_path / "captions")


def test_judge():
    assert judge("two words", "repetition", CONFIG) == "repetition"
    assert judge("two words", "cut off", CONFIG) is None
    assert judge("two words", None, CONFIG) is None
    assert judge(None, None, CONFIG) == MISSING
    assert judge("  ", None, CONFIG) == MISSING
    assert judge("word", None, CONFIG) == TOO_SHORT
    assert judge("one two three four five", None, CONFIG) == TOO_LONG


def test_a_score_below_its_bound_or_none_is_unfit(tmp_path):
    scores = [-1.0, -2.1, None, float("nan"), -2.0]
    ids = [f"{n}" for n in range(5)]
    columns = {"sample_id": ids, "state": ["accepted"] * 5, "reason": pa.nulls(5, pa.string())}
    columns |= {"caption_short": ["two words"] * 5, "logp_short": scores, "match_short": [0.9, 0.9, 0.9, 0.9, 0.4]}
    columns |= {"flag_short": pa.array([None] * 5, pa.string())}
    write(tmp_path / "captions", "000000", columns)
    config = MixConfig(weights={"short": 1.0}, min_logp={"short": -2.0}, min_match={"short": 0.5})
    table = MixWork(config, (str(tmp_path / "captions"),))("000000").to_pydict()
    assert table["keep_reason"] == [None, *(f"short {UNLIKELY}" for _ in range(3)), f"short {UNMATCHED}"]


def test_each_row_has_a_verdict(inputs):
    table = MixWork(CONFIG, inputs)("000000").to_pydict()
    assert table["sample_id"] == INDEX["sample_id"]
    assert table["state"] == CAPTIONS["state"]
    assert table["keep"] == [True, False, True, False, None, None]
    assert table["keep_reason"][1] == "alt too short, short too short, descriptive unlikely"
    assert table["keep_reason"][3] == "alt too short, short too short, descriptive too long"
    assert table["keep_reason"][0] is None
    assert table["keep_reason"][4] is None
    # Row 0: its alt text of five words and its long caption are too long. Row 2: only the alt text is left.
    assert [table[f"weight_{style}"][0] for style in CONFIG.weights] == [0, 1, 0]
    assert [table[f"weight_{style}"][2] for style in CONFIG.weights] == [1, 0, 0]


@pytest.mark.parametrize("before", [False, True])
def test_the_summary_is_of_the_records(inputs, tmp_path, monkeypatch, before):
    """Of shards whose records do not say it, as before, they are read."""
    out = str(tmp_path / "out")
    for name in ("000000", "000001"):
        made = MixWork(CONFIG, inputs)(name)
        commit(out, name, made.replace_schema_metadata(None) if before else made)
    Ledger(out).close()
    opened, read = [], storage.open_read
    monkeypatch.setattr(storage, "open_read", lambda url, *more: opened.append(url) or read(url, *more))
    reasons = [
        "alt too short, short too short, descriptive unlikely",
        "alt too short, short too short, descriptive too long",
    ]
    assert module._summary(CONFIG, out) == {
        "kept": 4,
        "dropped": 4,
        "dropped_by_reason": dict.fromkeys(reasons, 2),
        "read": {"alt": 0.5, "short": 0.5, "descriptive": 0},
    }
    assert len([url for url in opened if "/shards/" in url]) == (2 if before else 0)


def test_weights_are_shared_among_what_is_fit(inputs):
    config = MixConfig(weights={"alt": 0.25, "short": 0.25, "descriptive": 0.5})
    table = MixWork(config, inputs)("000000").to_pydict()
    assert [table[f"weight_{style}"][0] for style in config.weights] == [0.25, 0.25, 0.5]
    assert [table[f"weight_{style}"][2] for style in config.weights] == [0.5, 0.5, 0]
    assert table["keep"][:4] == [True] * 4


def test_columns_have_the_same_types_in_every_shard(inputs):
    kept = MixWork(MixConfig(), inputs)("000000").schema
    assert kept.equals(MixWork(CONFIG, inputs)("000001").schema)
    assert kept.field("keep_reason").type == pa.string()
    assert kept.field("weight_alt").type == pa.float32()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": {"alt": 0.5, "short": 0.4}}, "sum to 1"),
        ({"weights": {"alt": -0.5, "short": 1.5}}, "negative"),
        ({"min_logp": {"long": -1.0}}, "long"),
        ({"min_words": 5, "max_words": 4}, "in order"),
    ],
)
def test_the_config_checks_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        MixConfig(**fields)


def test_mix_needs_no_torch():
    code = "import sys, workflows.mix; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_step(ray_cluster, inputs, tmp_path):
    def folder_of(columns):
        def work(config: dict, *, out, cluster, report):
            from pathlib import Path

            for name in ("000000", "000001"):
                write(Path(out), name, columns)
            return {}

        return work

    images, captions = folder_of(INDEX), folder_of(CAPTIONS)
    images.__name__, captions.__name__ = "ingest", "recaption"
    store = Store(str(tmp_path / "store"), Cluster(name="test", actors=(1, 1)))
    made = [store.step(step(version=1)(work), {}) for work in (images, captions)]
    mixture = store.step(mix, CONFIG, *made)
    summary = mixture.summary
    assert (summary["rows_in"], summary["accepted"], summary["rejected"], summary["failed"]) == (12, 8, 2, 2)
    assert summary["kept"] + summary["dropped"] == 8
    assert summary["kept"] == 4
    assert sum(summary["dropped_by_reason"].values()) == summary["dropped"]
    assert sum(summary["read"].values()) == pytest.approx(1)
    again = ShardReader([mixture.path], "000001").columns(["keep", "weight_short"])
    assert np.array_equal(again["keep"], [True, False, True, False])
    with pytest.raises(ValueError, match="caption_long"):
        store.step(mix, MixConfig(weights={"long": 1.0}), *made)


MARKED = {
    "sample_id": ["03", "02", "01", "00", "04", "05"],  # not in the order of the others
    "state": ["accepted", "accepted", "accepted", "accepted", "rejected", "accepted"],
    "reason": [None, None, None, None, "no image", None],
    "duplicate_of": pa.array([None, "00", None, None, None, None], pa.string()),
    "duplicate_kind": pa.array([None, "near", None, None, None, None], pa.string()),
    "unfit_language": pa.array([None, "other language: fr", None, None, None, None], pa.string()),
    "unfit_size": pa.array([None, None, "too small: 1x1", None, None, None], pa.string()),
}


def test_marked_rows_are_not_kept_whatever_their_captions(inputs, tmp_path):
    for name in ("000000", "000001"):
        write(tmp_path / "marked", name, MARKED)
    plain = MixWork(CONFIG, inputs)("000000").to_pydict()
    table = MixWork(CONFIG, (*inputs, str(tmp_path / "marked")))("000000").to_pydict()
    assert table["keep"] == [True, False, False, False, None, None]
    assert table["keep_reason"][1] == "too small: 1x1"
    assert table["keep_reason"][2] == "near duplicate: 00, other language: fr"
    assert table["keep_reason"][3] == plain["keep_reason"][3]
    assert [table[f"weight_{style}"][2] for style in CONFIG.weights] == [0, 0, 0]
    for column, values in table.items():
        assert values[0] == plain[column][0]
        assert values[3:] == plain[column][3:]


@step(version=1)
def spoken(config: dict, images: Artifact, *, out, cluster, report):
    """One caption for every row."""
    for name in shard_names(images.path):
        reader = ShardReader([images.path], name)
        said = [config["says"] if state == "accepted" else None for state in reader.states]
        columns = {"sample_id": reader.sample_ids, "state": reader.states, "reason": reader.reasons}
        commit(out, name, pa.table({**columns, "caption_short": pa.array(said, pa.string())}))
    Ledger(out).close()
    return tally(out)


@pytest.mark.timeout(240)
def test_planted_duplicates_and_unfit_rows_from_corpus_to_mixture(monkeypatch, tmp_path, capsys):
    work_here(monkeypatch, ingest, deduplicate, examine, mix)
    first, other = encode(picture(0, 64, 64)), encode(picture(1, 64, 64))
    shards = [
        [("a", first), ("b", other), ("tiny", encode(picture(2, 8, 64)))],
        [("same", first), ("again", encode(picture(1, 64, 64), "JPEG", quality=80)), ("torn", first[:50])],
    ]
    for number, rows in enumerate(shards):
        members = [member for key, image in rows for member in ((f"{key}.png", image), (f"{key}.txt", b"an alt text"))]
        storage.write_bytes(str(tmp_path / "corpus" / f"{number}.tar"), tar(members))
    store = Store(str(tmp_path / "store"), Cluster(name="test", actors=(1, 1)))
    images = store.step(ingest, IngestConfig(corpus=str(tmp_path / "corpus")))
    copies = store.step(deduplicate, DeduplicateConfig(), images, store.step(hash_images, HashConfig(), images))
    looked = store.step(examine, ExamineConfig(max_aspect=100), images)
    captions = store.step(spoken, {"says": "a caption"}, images)
    config = MixConfig(weights={"alt": 0.0, "short": 1.0, "descriptive": 0.0})

    plain = [
        MixWork(config, (images.path, captions.path))(name)["keep"].to_pylist() for name in shard_names(images.path)
    ]
    assert plain == [[True] * 3, [True, True, None]]
    mixture = store.step(mix, config, images, captions, copies, looked)
    assert mixture.id != mix.identity(config, (images, captions))
    assert mixture.summary["kept"] == 2
    assert mixture.summary["dropped_by_reason"] == {"too small": 1, "exact duplicate": 1, "near duplicate": 1}
    assert mixture.summary["read"] == {"short": 1.0}
    kept = {}
    for name in shard_names(mixture.path):
        columns = ShardReader([images.path, mixture.path], name).columns(["key", "keep"])
        kept |= dict(zip(columns["key"], columns["keep"], strict=True))
    assert kept == {"a": True, "b": True, "tiny": False, "same": False, "again": False}
    faults = list(verify_files(mixture.path, mixture.manifest["files"]))
    assert faults + list(verify_shards(mixture.path, [a.path for a in mixture.inputs], mixture.summary)) == []

    line = ["mix", "--images", images.path, "--captions", captions.path, "--verdicts", copies.path, looked.path]
    line += [word for style, weight in config.weights.items() for word in (f"--weights.{style}", str(weight))]
    main([*line, "--store", store.root, "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["artifact"] == mixture.path
    with pytest.raises(ValueError, match="was made by spoken and marks no rows"):
        store.step(mix, config, images, captions, captions)


def test_pictures_without_texts_are_said_before_work_starts():
    def index(**faults):
        return Artifact("/i", {"step": "ingest", "id": "i", "summary": {"accepted": 4, "alt_faults": faults}})

    alone, bare = MixConfig(weights={"alt": 1.0, "short": 0.0}), index(**{"no caption": 3, "empty caption": 1})
    with pytest.raises(ValueError, match=r"None of the 4 pictures has a text to learn from.*--captioner WHO"):
        mix.work(alone, bare, bare, out="/nowhere", cluster=None, report=None)
    assert [line[:24] for line in told(alone, [bare, bare], None)] == ["None of the 4 pictures h"]
    unknown = Artifact("/i", {"step": "ingest", "id": "i", "summary": {}})
    for images in (index(**{"no caption": 3}), index(), unknown):
        assert told(alone, [images, images], None) == []
    assert told(MixConfig(), [bare, bare], None) == [], "the columns of other styles are asked for by themselves"
