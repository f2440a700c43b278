"""What is exported for other trainers lies as they want it: a picture, a text of its name, a line of metadata."""

import io
import json
import tarfile

import pyarrow.parquet as pq
import pytest

from infra import storage
from infra.store import Store
from tests.infra.data.zoo import encode, picture, tar
from tests.workflows import test_export as plain  # its steps need no Ray
from workflows import look
from workflows.export import ExportOptions, export
from workflows.ingest import IngestConfig

here = plain.here
PNG, JPEG = encode(picture(0)), encode(picture(1), "JPEG")


def mixed(place):
    """JPEG and PNG by turns, with and without a text and metadata of their own."""
    members = []
    for n in range(12):
        kind = "JPEG" if n % 2 else "PNG"
        members.append((f"{n:03d}.{'jpg' if n % 2 else 'png'}", encode(picture(n), kind)))
        members += [(f"{n:03d}.txt", b"theirs")] if n % 3 else []
        members += [(f"{n:03d}.json", b'{"a": 1}')] if n % 4 == 0 else []
    for name, first in (("a.tar", True), ("b.tar", False)):
        part = [member for member in members if (member[0] < "006") == first]
        storage.write_bytes(f"{place}/corpus/{name}", tar(part))
    return f"{place}/corpus", {name.split(".")[0]: data for name, data in members if name.endswith(("jpg", "png"))}


def test_a_folder_lies_as_trainers_read_it(here, place):
    pictures = {"cats/1.png": PNG, "cats_1.png": JPEG, "CATS_1.png": encode(picture(2)), "v1.2.jpg": encode(picture(3))}
    for name, data in pictures.items():
        storage.write_bytes(f"{place}/corpus/{name}", data)
    manifest = export(plain.options(place, plain.artifacts(place, f"{place}/corpus"), format="folder"))
    files = plain.files(place)
    shards = {name.split("/")[0] for name in files}
    assert all(name.startswith("1_") for name in shards), "sd-scripts reads how often from the folder's name"
    rows = {}
    for shard in shards:
        for line in files[f"{shard}/metadata.jsonl"].decode().splitlines():
            row = json.loads(line)
            rows[row["source_name"]] = row | {"image": files[f"{shard}/{row['file_name']}"]}
            assert files[f"{shard}/{row['file_name'].rpartition('.')[0]}.txt"].decode() == row["text"]
    assert {name: row["image"] for name, row in rows.items()} == pictures
    assert {name: row["text"] for name, row in rows.items()} == {
        name: f"this is {name.rpartition('.')[0]}" for name in pictures
    }
    assert rows["cats/1.png"]["flag_short"] == "", "a text that is not there is empty, so that its type is known"
    assert json.loads(rows["cats/1.png"]["provenance_short"])["model"] == "org/name"
    assert len({row["file_name"].rpartition(".")[0].casefold() for row in rows.values()}) == 4
    assert rows["cats_1.png"]["file_name"].endswith(".jpg"), "by what it is"
    assert not any("alt_fault" in row for row in rows.values()), "beside a text that it is not said of"
    assert len(files) == 2 * 4 + len(shards)
    assert manifest["summary"]["exported"] == 4
    card = storage.read_bytes(f"{place}/out/README.md").decode()
    assert 'path:\n    - "data/*/*.jpg"\n    - "data/*/*.png"\n    - "data/*/metadata.jsonl"\n---' in card


def test_a_folder_is_proven_and_is_a_corpus_again(here, tmp_path):
    place = str(tmp_path)
    corpus, _ = mixed(place)
    export(plain.options(place, plain.artifacts(place, corpus), format="folder"))
    assert look.verify([f"{place}/out"])["whole"]
    again = Store(f"{place}/again", plain.CLUSTER).step(plain.ingest, IngestConfig(corpus=f"{place}/out/data"))
    assert again.summary["accepted"] == 12
    (tmp_path / "out" / "data" / "1_000000" / "stray.png").write_bytes(PNG)
    with pytest.raises(SystemExit):
        look.verify([f"{place}/out"])


@pytest.mark.parametrize("style", ["short", "alt"])
def test_one_text_beside_each_picture_of_a_tar(here, tmp_path, style):
    place = str(tmp_path)
    corpus, pictures = mixed(place)
    export(plain.options(place, plain.artifacts(place, corpus), as_text=style))
    found = plain.members(place) | plain.members(place, shard="000001")
    assert found.keys() == {f"{key}.{ending}" for key in pictures for ending in ("jpg", "txt")}
    for key, data in pictures.items():
        assert found[f"{key}.jpg"] == data
        text = f"this is {key}" if style == "short" else "theirs" if int(key) % 3 else ""
        assert found[f"{key}.txt"].decode() == text
    told = pq.read_table(io.BytesIO(storage.read_bytes(f"{place}/out/names/000000.parquet"))).to_pylist()
    assert told[0].items() >= {"exported_key": "000", "caption_short": "this is 000", "logp_short": -0.5}.items()
    assert json.loads(told[0]["provenance_short"])["model"] == "org/name"
    assert look.verify([f"{place}/out"])["whole"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("form", ["webdataset", "folder"])
def test_datasets_reads_jpeg_and_png_together(here, tmp_path, monkeypatch, form):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    place = str(tmp_path)
    corpus, pictures = mixed(place)
    export(plain.options(place, plain.artifacts(place, corpus), as_text="short", format=form))
    by_hand = {"path": "imagefolder", "data_dir": f"{place}/out/data"}
    if form == "webdataset":
        by_hand = {"path": form, "data_files": [file.url for file in plain.found(place)]}
    for source in (by_hand, {"path": f"{place}/out"}):  # the other by its card, as from the Hub
        rows = list(datasets.load_dataset(**source, split="train", cache_dir=f"{place}/cache"))
        names = ("jpg", "txt") if form == "webdataset" else ("image", "text")
        assert {row[names[1]] for row in rows} == {f"this is {key}" for key in pictures}
        assert {row[names[0]].format for row in rows} == {"JPEG", "PNG"}
        assert len(rows) == len(pictures)


def test_captions_alone_suffice(here, tmp_path):
    place = str(tmp_path)
    made = plain.artifacts(place, mixed(place)[0])
    alone = export(ExportOptions(captions=made[1].path, out=f"{place}/alone", cluster=plain.CLUSTER))
    both = export(plain.options(place, made))
    assert (alone["id"], alone["files"]) == (both["id"], both["files"])
    assert "as_text" not in alone["config"], "what was exported before is found done"


def test_a_text_that_nobody_wrote_is_told(here, tmp_path):
    place = str(tmp_path)
    made = plain.artifacts(place, mixed(place)[0])
    with pytest.raises(ValueError, match=r"which caption is the text of a picture: --as-text short\|alt"):
        export(plain.options(place, made, as_text="long"))
    with pytest.raises(ValueError, match="a column for each style"):
        plain.options(place, made, as_text="short", format="parquet")
    with pytest.raises(ValueError, match="A folder has the images in any case"):
        plain.options(place, made, with_images=True, format="folder")


def test_a_picture_that_changed_is_not_exported_as_if_it_were_captioned(here, tmp_path):
    place = str(tmp_path)
    corpus, _ = mixed(place)
    made = plain.artifacts(place, corpus)
    with tarfile.open(f"{corpus}/a.tar") as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]
    storage.write_bytes(f"{corpus}/a.tar", tar([(name, data[:-1] + b"\0") for name, data in members]))
    summary = export(plain.options(place, made, format="folder"))["summary"]
    assert summary["exported"] + summary["lost"] == 12
    assert summary["lost"] > 3
