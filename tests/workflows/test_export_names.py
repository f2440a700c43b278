"""An export never loses the link to its source, in any format, whatever its files are called; its JSON is strict."""

import hashlib
import io
import json
import tarfile

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra import storage
from tests.infra.data.zoo import encode, picture, tar
from tests.workflows import test_export as plain  # its steps need no Ray
from workflows import look
from workflows.export import export

here = plain.here
NAMES = ["plain", "shot.2024.00", "a b/c d (1)", "猫/ein Bär", "x" * 160, "a#b.v2", ".hidden/..b", "v1.2/one"]


def write_corpus(kind, place, names):
    """Pictures of these names and their texts; the pictures by the name of their file and their key in it."""
    pictures = {name: encode(picture(n)) for n, name in enumerate(names)}
    if kind == "folder":
        for name, data in pictures.items():
            storage.write_bytes(f"{place}/corpus/{name}.png", data)
            storage.write_bytes(f"{place}/corpus/{name}.txt", b"a text")
        return {(f"{name}.png", name): data for name, data in pictures.items()}
    if kind == "tar":
        found = {}
        for n, (name, data) in enumerate(pictures.items()):
            storage.write_bytes(f"{place}/corpus/sub/{n} ü.tar", tar([(f"{name}.png", data), (f"{name}.txt", b"x")]))
            found[f"sub/{n} ü.tar", name] = data
        return found
    rows = {"id": list(names), "image": list(pictures.values()), "text": ["a text"] * len(names)}
    sink = io.BytesIO()
    pq.write_table(plain.pa.table(rows), sink)
    storage.write_bytes(f"{place}/corpus/rows.1.parquet", sink.getvalue())
    return {("rows.1.parquet", name): data for name, data in pictures.items()}


def exported(place, corpus, name, **asked):
    """What an export says of each of its rows, by the hash of the picture; and its summary."""
    made = plain.artifacts(place, corpus)
    manifest = export(plain.options(place, made, name=name, **asked))
    assert look.verify([f"{place}/{name}"])["whole"]
    tables = [pq.read_table(io.BytesIO(data)) for _, data in sorted(plain.files(place, name).items())] if (
        asked["format"] == "parquet"
    ) else []  # fmt: skip
    if tables:
        return [row for table in tables for row in table.to_pylist()], manifest
    rows = []
    for file in plain.found(place, name):
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(file.url))) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive}
        whose = storage.read_bytes(file.url.replace("/data/", "/names/").replace(".tar", ".parquet"))
        listed = pq.read_table(io.BytesIO(whose)).to_pylist()
        for row in listed:
            told = json.loads(files[f"{row['exported_key']}.captions.json"], parse_constant=pytest.fail)
            assert {name: told[name] for name in ("sample_id", "source_name", "key")}.items() <= row.items()
            data = next(files[n] for n in files if n.startswith(row["exported_key"] + ".") and n.endswith("png"))
            rows.append(row | {"sha256": hashlib.sha256(data).hexdigest()})
        assert len(listed) == manifest["files"][f"data/{storage.name(file.url)}"]["rows"]
        assert len({row["exported_key"] for row in listed}) == len(listed)
    return rows, manifest


@pytest.mark.parametrize("form", ["webdataset", "parquet", "parquet with images"])
@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_every_row_leads_back_to_its_file(here, tmp_path, kind, form):
    place = str(tmp_path)
    # A key of a tar ends at its first dot, and what is hidden is no part of a folder.
    names = [name for name in NAMES if not (name.startswith(".") and kind == "folder")]
    names = [name for name in names if not ("." in name.rpartition("/")[2] and kind == "tar")]
    wanted = write_corpus(kind, place, names)
    asked = {"format": form.split()[0], "with_images": form.endswith("images")}
    rows, manifest = exported(place, f"{place}/corpus", "out", **asked)
    found = {(row["source_name"], row["key"]): row["sha256"] for row in rows}
    assert found == {name: hashlib.sha256(data).hexdigest() for name, data in wanted.items()}
    sources = [file["source"] for name, file in manifest["files"].items() if name.startswith("data/")]
    assert {source for shard in sources for source in shard.split(" to ")} <= {name for name, _ in wanted}
    card = storage.read_bytes(f"{place}/out/README.md").decode()
    assert "`corpus`" in card
    assert str(tmp_path) not in card + json.dumps(manifest)
    for source in sources:
        assert source in card
    if form == "webdataset":
        renamed = sum(row["key"] != row["exported_key"] for row in rows)
        assert manifest["summary"]["renamed"] == renamed
        assert f"sample's id: {renamed} of them were" in card
        assert renamed == {"folder": 3, "tar": 1, "parquet": 4}[kind]
    if form.endswith("images"):
        for row in rows:
            assert row["image"]["path"] == f"{row['key']}.png"


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40), min_size=1)
)
def test_keys_of_any_letters(here, tmp_path_factory, keys):
    """Of Parquet, whose keys may be any text and may come twice."""
    place = str(tmp_path_factory.mktemp("keys"))
    rows = {"id": keys, "image": [encode(picture(n)) for n in range(len(keys))], "text": ["x"] * len(keys)}
    sink = io.BytesIO()
    pq.write_table(plain.pa.table(rows), sink)
    storage.write_bytes(f"{place}/corpus/rows.parquet", sink.getvalue())
    wanted = sorted((hashlib.sha256(data).hexdigest(), key) for data, key in zip(rows["image"], keys, strict=True))
    for form in ("webdataset", "parquet"):
        told, _ = exported(place, f"{place}/corpus", form, format=form)
        assert sorted((row["sha256"], row["key"]) for row in told) == wanted


def test_a_name_that_is_taken_away_is_noticed(here, tmp_path):
    place = str(tmp_path)
    write_corpus("folder", place, ["a", "b"])
    export(plain.options(place, plain.artifacts(place, f"{place}/corpus")))
    (tmp_path / "out" / "names" / "000000.parquet").unlink()
    (tmp_path / "out" / "names" / "000001.parquet").write_bytes(b"x")
    with pytest.raises(SystemExit):
        look.verify([f"{place}/out"])


def test_numbers_that_are_none_are_null(here, tmp_path, monkeypatch):
    """As users wrote them into metadata, and as a captioner may score."""
    place = str(tmp_path)
    theirs = b'{"score": NaN, "most": [Infinity], "least": -Infinity, "is": 1.50}'
    members = [("a.png", encode(picture(0))), ("a.txt", b"x"), ("a.json", theirs)]
    storage.write_bytes(f"{place}/corpus/a.tar", tar(members))
    made = plain.artifacts(place, f"{place}/corpus")
    shard = f"{made[1].path}/shards/000000.parquet"
    table = pq.read_table(shard)
    place_of = table.schema.get_field_index("logp_short")
    pq.write_table(table.set_column(place_of, "logp_short", plain.pa.array([float("nan")])), shard)
    export(plain.options(place, made, name="tars"))
    files = plain.members(place, "tars")
    assert files["a.json"] == theirs  # theirs stays as it is, to the byte
    told = json.loads(files["a.captions.json"], parse_constant=pytest.fail)
    assert told["captions"]["short"]["logp"] is None
    export(plain.options(place, made, name="table", format="parquet"))
    (row,) = pq.read_table(f"{place}/table/data").to_pylist()
    meta = json.loads(row["meta"], parse_constant=pytest.fail)
    assert meta == {"score": None, "most": [None], "least": None, "is": 1.5}
    # A table of theirs, whose fields become a file: that we write.
    storage.write_bytes(f"{place}/other/a.png", encode(picture(0)))
    storage.write_bytes(f"{place}/other/metadata.jsonl", b'{"file_name": "a.png", "text": "x", "score": NaN}')
    export(plain.options(place, plain.artifacts(place, f"{place}/other"), name="fields"))
    assert json.loads(plain.members(place, "fields")["a.json"], parse_constant=pytest.fail)["score"] is None
