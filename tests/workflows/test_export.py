"""What is exported is what came in, with the captions beside it, whole or named; other people's readers are asked."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.collapse import describe
from captioner.provenance import Author, Sign, record
from captioner.styles import Style
from infra import storage
from infra.cluster import Cluster
from infra.data.ledger import Ledger, commit, tally
from infra.data.readers import find_corpus, write_sources
from infra.data.shards import ShardReader, shard_names
from infra.store import Artifact, Store, step
from tests.corpora import make
from tests.infra.data.zoo import encode, picture, tar, write_folder, write_parquet, write_tars
from workflows.__main__ import main
from workflows.corpora.shapes import ShapesConfig
from workflows.export import ExportOptions, export
from workflows.ingest import IngestConfig, IngestWork, _rendered_sources
from workflows.mix import MixConfig, MixWork

CLUSTER = Cluster(name="test", actors=(1, 1))
RECORD = record(Author(model="org/name", backend="test", dtype="fp32", revision="c0ffee"), Style(name="short"), {})
PNG, JPEG = encode(picture(0)), encode(picture(1), "JPEG")
_buffer = io.BytesIO()
np.save(_buffer, np.arange(5))
NPY = _buffer.getvalue()
SHARDS = {
    "a.tar": [
        ("dir.x/one.JPG", JPEG),
        ("dir.x/one.txt", b"  an alt text \r\n"),
        ("dir.x/one.json", b'{ "b": 1,   "a" : [2]}'),
        ("dir.x/one.depth.npy", NPY),
        ("two.png", PNG),
        ("three.txt", b"there is no image"),
        ("two.txt", "größer".encode()),  # not beside its picture
        ("broken.png", PNG[:99]),
        ("broken.txt", b"x"),
    ],
    "b.tar": [("silent.webp", encode(picture(2), "WEBP")), ("long.png", encode(picture(3))), ("long.txt", b"w " * 300)],
    "c.tar": [("nothing.txt", b"no image in the whole shard")],
}


@step(version=1)
def ingest(config: IngestConfig, *, out, cluster, report):
    """As the step of that name, without Ray."""
    rendered = isinstance(config.corpus, ShapesConfig)
    sources = _rendered_sources(config.corpus) if rendered else find_corpus(config.corpus).sources
    if not rendered:
        write_sources(find_corpus(config.corpus), out)
    for name in sources:
        commit(out, name, IngestWork(config, sources, out)(name))
    if rendered:
        write_sources(find_corpus(storage.join(out, "corpus")), out)
    Ledger(out).close()
    return tally(out)


@step(version=1)
def recaption(config: dict, images: Artifact, *, out, cluster, report):
    """Captions that name their rows; where a row's key is in `fails`, it failed."""
    sign = Sign({"short": (RECORD,)})
    sign.setup()
    for name in shard_names(images.path):
        reader = ShardReader([images.path], name, every=True)
        keys = reader.columns(["key"])["key"].tolist()
        states, reasons = list(reader.states), list(reader.reasons)
        for row, key in enumerate(keys):
            if key in config["fails"]:
                states[row], reasons[row] = "failed", "oom: Caption: too much"
        said = [f"this is {k}" if s == "accepted" else None for k, s in zip(keys, states, strict=True)]
        columns = {"sample_id": reader.sample_ids, "state": states, "reason": pa.array(reasons, pa.string())}
        columns |= {"caption_short": pa.array(said, pa.string()), **sign({"caption_short": said})}
        columns["flag_short"] = pa.array(["cut off" if key in config["flagged"] else None for key in keys], pa.string())
        columns["logp_short"] = [None if text is None else -0.5 for text in said]  # of no type in a shard without any
        commit(out, name, pa.table(columns))
    Ledger(out).close()
    faults = {"short": {"faults": {"cut off": 0.25}, "decoded_again": 0.5, "worst": 1.0, "worst_shard": "000000"}}
    collapse = {"short": describe(["a red dog", "a red dog", "Two cats."])}
    return tally(out) | {"provenance": {"short": [RECORD]}, "faults": faults, "collapse": collapse}


@step(version=1)
def mix(config: MixConfig, images: Artifact, captions: Artifact, *, out, cluster, report):
    """As the step of that name, without Ray."""
    for name in shard_names(images.path):
        commit(out, name, MixWork(config, (images.path, captions.path))(name))
    Ledger(out).close()
    return tally(out) | {"kept": 2, "dropped": 1, "dropped_by_reason": {"alt too long": 1}}


@pytest.fixture
def here(monkeypatch):
    """Shards are worked on in this process."""
    make.export_here(monkeypatch)


def write_corpus(place):
    for name, members in SHARDS.items():
        storage.write_bytes(storage.join(place, "corpus", name), tar(members))
    return storage.join(place, "corpus")


def artifacts(place, corpus, fails=(), flagged=(), image_size=None):
    store = Store(storage.join(place, "store"), CLUSTER)
    images = store.step(ingest, IngestConfig(corpus=corpus, image_size=image_size))
    captions = store.step(recaption, {"fails": list(fails), "flagged": list(flagged)}, images)
    mixture = store.step(mix, MixConfig(weights={"alt": 0.5, "short": 0.5}, max_words=20), images, captions)
    return images, captions, mixture


def options(place, made, mixed=False, name="out", **more):
    images, captions, mixture = made
    given = {"images": images.path, "captions": captions.path, "mixture": mixture.path if mixed else ""}
    return ExportOptions(**given, out=storage.join(place, name), cluster=CLUSTER, **more)


def members(place, name="out", shard="000000"):
    data = storage.read_bytes(storage.join(place, name, "data", f"{shard}.tar"))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def files(place, name="out"):
    return {file.url.split("/data/")[1]: storage.read_bytes(file.url) for file in found(place, name)}


def found(place, name="out"):
    return storage.listing(storage.join(place, name, "data"))


def test_files_keys_and_endings_are_as_they_came(here, place):
    """Though the index has resized copies of its own."""
    made = artifacts(place, write_corpus(place), image_size=(8, 8))
    manifest = export(options(place, made))
    whole = members(place)
    came = {name: data for name, data in SHARDS["a.tar"] if name.startswith(("dir.x/one", "two"))}
    assert {name: data for name, data in whole.items() if name in came} == came
    new = {name: data for name, data in whole.items() if name not in came}
    assert new.keys() == {f"{key}.{end}" for key in ("dir.x/one", "two") for end in ("short.txt", "captions.json")}
    assert new["two.short.txt"] == b"this is two"
    told = json.loads(new["two.captions.json"])
    assert (told["state"], told["captions"]["alt"]["caption"]) == ("accepted", "größer")
    assert told["captions"]["short"].items() >= {"caption": "this is two", "logp": -0.5}.items()
    assert told["captions"]["short"]["provenance"].items() >= RECORD.items()
    keys = [name.split(".")[0] for name in whole]
    assert keys == sorted(keys), "the files of a sample are neighbours"
    assert manifest["summary"]["exported"] == manifest["summary"]["accepted"] == 4
    assert [file.url.rsplit("/", 1)[1] for file in found(place)] == ["000000.tar", "000001.tar"]  # none without a row
    assert storage.list_names(storage.join(place, "out")) == ["README.md", "data", "manifest.json", "names"]


def test_a_rendered_corpus_goes_out_though_its_store_was_moved(here, tmp_path):
    images, captions, _ = artifacts(str(tmp_path), ShapesConfig(samples=6, labelled=2, shard_size=3))
    (tmp_path / "store").rename(tmp_path / "moved")
    made = [Artifact.open(each.path.replace("/store/", "/moved/")) for each in (images, captions)]
    manifest = export(options(str(tmp_path), (*made, None)))
    assert (manifest["summary"]["exported"], manifest["summary"].get("lost")) == (6, None)
    with tarfile.open(tmp_path / "moved" / "ingest" / images.id / "corpus" / "00000.tar") as archive:
        for member in archive:
            assert members(str(tmp_path))[member.name] == archive.extractfile(member).read()


@pytest.mark.parametrize("cut", [700, 2000, 4096, 5000, 6500, 7700, 9999])
def test_of_a_torn_archive_what_is_accepted_goes_out(here, tmp_path, cut):
    place = str(tmp_path)
    whole = SHARDS["a.tar"] + [("last.png", PNG), ("last.txt", b"x")]
    storage.write_bytes(f"{place}/corpus/a.tar", tar(whole)[:cut])
    storage.write_bytes(f"{place}/corpus/b.tar", tar(SHARDS["b.tar"]))
    made = artifacts(place, f"{place}/corpus")
    summary = export(options(place, made))["summary"]
    assert summary["exported"] == summary["accepted"] == made[0].summary["accepted"]
    assert "lost" not in summary
    if storage.exists(f"{place}/out/data/000000.tar"):
        new = ("short.txt", "captions.json")
        assert {n: data for n, data in members(place).items() if not n.endswith(new)}.items() <= dict(whole).items()


def test_an_export_is_a_corpus_again(here, tmp_path):
    place = str(tmp_path)
    made = artifacts(place, write_corpus(place))
    export(options(place, made))
    again = Store(f"{place}/again", CLUSTER).step(
        ingest, IngestConfig(corpus=f"{place}/out/data/{{000000..000001}}.tar")
    )

    def rows(images):
        names = ["key", "sha256", "caption_alt", "meta", "width", "height"]
        tables = [ShardReader([images.path], shard).columns(names) for shard in shard_names(images.path)]
        return [row for table in tables for row in zip(*(table[name] for name in names), strict=True)]

    assert sorted(rows(again)) == sorted(rows(made[0]))
    captions = Store(f"{place}/again", CLUSTER).step(recaption, {"fails": [], "flagged": []}, again)
    mixture = Store(f"{place}/again", CLUSTER).step(mix, MixConfig(weights={"short": 1.0}), again, captions)
    with pytest.raises(ValueError, match=r"files \.captions.json of its own; give --prefix"):
        export(options(place, (again, captions, mixture), name="twice"))
    storage.remove(f"{place}/twice")
    export(options(place, (again, captions, mixture), name="twice", prefix="v2"))
    assert {"two.short.txt", "two.v2.short.txt"} <= members(place, "twice").keys()


def test_webdataset_reads_it(here, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    place = str(tmp_path)
    export(options(place, artifacts(place, write_corpus(place))))
    tars = [file.url for file in found(place)]
    rows = {row["__key__"]: row for row in webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8")}
    assert rows.keys() == {"dir.x/one", "two", "silent", "long"}
    assert rows["two"]["png"].tolist() == picture(0).tolist()
    assert rows["two"]["short.txt"] == "this is two"
    assert rows["two"]["captions.json"]["captions"]["short"]["provenance"]["model"] == "org/name"
    assert rows["dir.x/one"]["json"] == {"b": 1, "a": [2]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("form", ["webdataset", "parquet", "parquet with images"])
def test_datasets_reads_it(here, tmp_path, monkeypatch, form):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    place, kind = str(tmp_path), form.split()[0]
    corpus = write_corpus(place)
    if (
        kind == "webdataset"
    ):  # this reader wants samples of the same sorts of files, and takes types from the first five
        corpus = f"{place}/plain"
        write_tars(corpus, shards=2, rows=7)
    asked = {"format": kind, "with_images": True} if form.endswith("images") else {"format": kind, "only": "all"}
    export(options(place, artifacts(place, corpus, flagged=["two", "00006"]), **asked))
    by_hand = {"path": kind, "data_files": [file.url for file in found(place)]}
    for source in (by_hand, {"path": f"{place}/out"}):  # the other by its card, as from the Hub
        rows = datasets.load_dataset(**source, split="train", cache_dir=f"{place}/cache")
        names = ("__key__", "short.txt") if kind == "webdataset" else ("key", "caption_short")
        key = "00006" if kind == "webdataset" else "two"
        row = next(row for row in rows if row[names[0]] == key)
        assert row[names[1]] == f"this is {key}"
        told = row["captions.json"]["captions"]["short"] if kind == "webdataset" else {"flag": row["flag_short"]}
        assert told["flag"] == "cut off"
        if form != "parquet":
            assert row["png" if kind == "webdataset" else "image"].size == (40, 24)
    if kind == "parquet":
        joined = datasets.concatenate_datasets([rows, rows]).filter(lambda row: row["state"] == "accepted")
        assert {json.loads(line)["model"] for line in joined["provenance_short"]} == {"org/name"}


@pytest.mark.parametrize(("write", "ending"), [(write_parquet, "png"), (write_folder, "png")])
def test_other_corpora_become_webdatasets(here, tmp_path, write, ending):
    place = str(tmp_path)
    write(f"{place}/corpus")
    corpus = f"{place}/corpus"
    if write is write_folder:
        storage.write_bytes(f"{corpus}/0/v1.2.jpg", JPEG)
        storage.write_bytes(f"{corpus}/0/v1.2.txt", b" as it is \n")
    made = artifacts(place, corpus)
    assert export(options(place, made))["summary"]["exported"] == 12 + (write is write_folder)
    whole = {name: data for shard in shard_names(made[0].path) for name, data in members(place, shard=shard).items()}
    key = "0/00001" if write is write_folder else "00001"
    assert whole[f"{key}.png"] == encode(picture(1))
    assert whole[f"{key}.txt"].decode() == "picture number 1, größer"
    assert json.loads(whole[f"{key}.json"])["split"] == "train"
    assert whole[f"{key}.short.txt"].decode() == f"this is {key}"
    if write is write_folder:  # a key that ends at its first dot for every reader
        told = next(data for name, data in whole.items() if name.endswith(".short.txt") and data.endswith(b"v1.2"))
        name = next(name for name, data in whole.items() if data == told).split(".")[0]
        assert len(name) == 24
        assert (whole[f"{name}.jpg"], whole[f"{name}.txt"]) == (JPEG, b" as it is \n")


def test_which_rows_go_out(here, tmp_path):
    place = str(tmp_path)
    made = artifacts(place, write_corpus(place), fails=["two"])
    keys = {}
    for only, mixed in (("", False), ("", True), ("accepted", True), ("all", True)):
        name = f"out-{only}-{mixed}"
        export(options(place, made, mixed, name, only=only, format="parquet"))
        keys[only, mixed] = set(pd.read_parquet(f"{place}/{name}/data")["key"])
    assert keys["", False] == keys["", True] == keys["accepted", True] == {"dir.x/one", "silent", "long"}
    assert len(keys["all", True]) == made[0].summary["rows_in"] == 7
    frame = pd.read_parquet(f"{place}/out-all-True/data").set_index("key")
    assert frame.loc["two", ["state", "reason"]].tolist() == ["failed", "oom: Caption: too much"]
    assert frame.loc["long", "keep"] is True
    tars = export(options(place, made, True, "tars", only="all"))["summary"]
    assert tars["exported"] + tars["without_image"] == 7
    assert {"silent.webp", "broken.png", "two.png"} <= {
        n for s in ("000000", "000001") for n in members(place, "tars", s)
    }


def test_tables_are_whole_and_of_one_schema(here, place):
    made = artifacts(place, write_corpus(place))
    manifest = export(options(place, made, mixed=True, only="all", format="parquet"))
    tables = {name: pq.read_table(io.BytesIO(data)) for name, data in files(place).items()}
    assert len(tables) == 3
    assert len({table.schema for table in tables.values()}) == 1
    assert {name: table.num_rows for name, table in tables.items()} == {
        name.removeprefix("data/"): file["rows"] for name, file in manifest["files"].items() if "rows" in file
    }
    row = next(row for row in tables["000000.parquet"].to_pylist() if row["key"] == "two")
    assert (
        row.items()
        >= {
            "state": "accepted",
            "reason": None,
            "caption_alt": "größer",
            "caption_short": "this is two",
            "logp_short": -0.5,
            "weight_short": 0.5,
            "keep": True,
            "sha256": hashlib.sha256(PNG).hexdigest(),
        }.items()
    )
    assert json.loads(row["provenance_short"]).items() >= RECORD.items()
    assert "source" not in row, "paths of the machine that made it are nobody's affair"
    frame = pd.concat(pd.read_parquet(io.BytesIO(data)) for data in files(place).values())
    assert len(frame) == 7


def test_a_cut_export_continues_and_comes_out_the_same(here, place, monkeypatch):
    made = artifacts(place, write_corpus(place))
    export(options(place, made, name="whole"))
    upload, sent = storage.upload, []

    def cut(local, url):
        if any("/data/" in one for one in sent):
            raise KeyboardInterrupt
        sent.append(url)
        upload(local, url)

    monkeypatch.setattr(storage, "upload", cut)
    with pytest.raises(KeyboardInterrupt):
        export(options(place, made))
    monkeypatch.setattr(storage, "upload", upload)
    with pytest.raises(ValueError, match="holds another export"):
        export(options(place, made, format="parquet"))
    before = {file.url: file.tag for file in found(place)}
    assert len(before) == 1
    manifest = export(options(place, made))
    assert files(place) == files(place, "whole")
    assert {file.url: file.tag for file in found(place)}.items() >= before.items()
    assert export(options(place, made)) == manifest  # and is found done
    with pytest.raises(ValueError, match="holds another export"):
        export(options(place, made, only="all"))


def test_a_folder_with_other_things_is_left_alone(here, tmp_path):
    made = artifacts(str(tmp_path), write_corpus(str(tmp_path)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other things, such as thesis.doc"):
        export(options(str(tmp_path), made))


def test_verify_holds_or_names_the_file(here, tmp_path, capsys):
    place = str(tmp_path)
    export(options(place, artifacts(place, write_corpus(place))))
    main(["verify", f"{place}/out"])
    assert "is whole" in capsys.readouterr().err

    def faults():
        with pytest.raises(SystemExit):
            main(["verify", f"{place}/out", "--json"])
        return json.loads(capsys.readouterr().out)["faults"]

    path = tmp_path / "out" / "data" / "000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    assert [fault.split(":")[0] for fault in faults()] == ["data/000001.tar has changed"]
    path.unlink()
    assert faults() == ["data/000001.tar is missing"]
    path.write_bytes(data)
    (tmp_path / "out" / "data" / "000009.tar").write_bytes(data)
    (tmp_path / "out" / "README.md").write_text("license: mine")
    found = faults()
    assert found[0].startswith("README.md has changed")
    assert found[1] == "data/000009.tar is not in the manifest"


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_an_image_that_changed_since_is_not_exported_as_if_it_were_captioned(here, tmp_path, form):
    place = str(tmp_path)
    made = artifacts(place, write_corpus(place))
    other = [(n, PNG[:-1] + b"\0" if n == "two.png" else data) for n, data in SHARDS["a.tar"]]
    storage.write_bytes(f"{place}/corpus/a.tar", tar(other))
    images = {"with_images": True} if form == "parquet" else {}
    summary = export(options(place, made, format=form, **images))["summary"]
    assert (summary["exported"], summary["lost"], summary["failed"]) == (3, 1, 1)
    assert "1 are left out because their images" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_is_one_that_the_hub_takes(here, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    place = str(tmp_path)
    made = artifacts(place, write_corpus(place))
    export(options(place, made, mixed=True, license="cc-by-4.0", title='Say "cheese": a | b', format="parquet"))
    card = huggingface_hub.DatasetCard.load(tmp_path / "out" / "README.md")
    head = card.data.to_dict()
    assert (head["license"], head["pretty_name"]) == ("cc-by-4.0", 'Say "cheese": a | b')
    assert (head["size_categories"], head["task_categories"]) == (["n<1K"], ["text-to-image", "image-to-text"])
    assert head["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    for said in ("org/name", "c0ffee", "cut off 0.25", "alt too long", "fp32", "Known limits", "| short | 3 | 0.625 |"):
        assert said in card.text, said
    assert place not in card.text
    assert place not in (tmp_path / "out" / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"only": "kept"}, "give --mixture"),
        ({"with_images": True}, "has the images in any case"),
        ({"prefix": "a.b"}, "plain word"),
    ],
)
def test_options_check_themselves(more, message):
    with pytest.raises(ValueError, match=message):
        ExportOptions(images="a", captions="b", out="c", **more)


def test_artifacts_have_to_be_of_one_another(here, tmp_path):
    place = str(tmp_path)
    images, captions, mixture = artifacts(place, write_corpus(place))
    *_, other = artifacts(place, f"{place}/corpus", fails=["two"])
    with pytest.raises(ValueError, match="was not mixed of"):
        export(options(place, (images, captions, other), mixed=True))
    with pytest.raises(ValueError, match="give the folder of an ingest"):
        export(options(place, (captions, captions, mixture)))


@pytest.mark.timeout(120)
def test_the_command(ray_cluster, tmp_path, capsys):
    place = str(tmp_path)
    images, captions, mixture = artifacts(place, write_corpus(place))
    line = ["export", "--images", images.path, "--captions", captions.path, "--mixture", mixture.path]
    main([*line, "--out", f"{place}/out", "--format", "parquet", "--only", "all", "--json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["exported"], told["rows_in"]) == (7, 7)
    assert len(pd.read_parquet(f"{place}/out/data")) == 7


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_killed_export_continues_and_comes_out_the_same(here, monkeypatch, ray_cluster, tmp_path):
    place = str(tmp_path)
    write_tars(f"{place}/corpus", shards=24, rows=3)
    images, captions, _ = made = artifacts(place, f"{place}/corpus")
    export(options(place, made, name="whole"))
    line = [sys.executable, "-m", "workflows", "export", "--images", images.path, "--captions", captions.path]
    line += ["--out", f"{place}/out"]
    driver = subprocess.Popen(line, stderr=subprocess.DEVNULL, start_new_session=True)
    while len(storage.list_names(f"{place}/out/data")) < 4:
        assert driver.poll() is None
        time.sleep(0.01)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not storage.exists(f"{place}/out/manifest.json")
    done = {url.url: url.tag for url in found(place)}
    monkeypatch.undo()  # on Ray
    main(line[3:])
    assert files(place) == files(place, "whole")
    kept = [url for url, tag in done.items() if {file.url: file.tag for file in found(place)}[url] == tag]
    assert len(kept) >= len(done) - 2, "at most what was under way is written again"
