"""Wide columns lie in side files: what is read is what was written, by range, and whatever is done to them is found."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from infra import storage
from infra.cluster import Cluster
from infra.data import wide
from infra.data.actor import Actor
from infra.data.growth import take_over
from infra.data.ledger import Ledger, commit, inspect, pending, side_files, tally
from infra.data.revision import Redo
from infra.data.shards import ShardReader, joined_names
from infra.data.sidecar import shard_url
from infra.data.verify import verify_files, verify_shards
from infra.data.work import StageWork
from infra.store import Artifact, Store, by_shard, step

NEVER = 2**62


def write(artifact, columns, least=0, name="000000", ids=None, states=None):
    """A shard whose columns are wide from `least` bytes a value on; its record."""
    count = len(next(iter(columns.values())))
    rows = {
        "sample_id": ids or [f"{row:024x}" for row in range(count)],
        "state": states or ["accepted"] * count,
        "reason": pa.nulls(count, pa.string()),
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(wide, "LEAST", least)
        return commit(artifact, name, pa.table(rows | columns))


def same(found, wanted):
    """Whether two values are equal, and of one type."""
    if isinstance(wanted, np.ndarray):
        return isinstance(found, np.ndarray) and found.dtype == wanted.dtype and np.array_equal(found, wanted)
    return type(found) is type(wanted) and found == wanted


def equal(found, wanted):
    return len(found) == len(wanted) and all(same(a, b) for a, b in zip(found, wanted, strict=True))


def holds(column):
    return any(value is not None and len(value) for value in column.to_pylist())


DTYPES = [np.uint8, np.uint16, np.int64, np.float16, np.float32, np.float64]


@st.composite
def columns(draw):
    """Some columns of one length, each of bytes or lists of numbers, in one or two chunks, cut out of longer ones."""
    count = draw(st.integers(1, 12))
    made = {}
    for name in draw(st.lists(st.sampled_from(["image", "features", "a b/c"]), min_size=1, unique=True)):
        dtype = draw(st.sampled_from([None, *DTYPES]))
        if dtype is None:
            values, kind = st.binary(max_size=40), st.sampled_from([pa.binary(), pa.large_binary()])
        else:
            finite = {"elements": {"allow_nan": False}} if np.dtype(dtype).kind == "f" else {}
            values = arrays.arrays(dtype, st.integers(0, 20), **finite)
            inner = pa.from_numpy_dtype(np.dtype(dtype))
            kind = st.sampled_from([pa.list_(inner), pa.large_list(inner)])
        kind = draw(kind)
        drawn = draw(st.lists(st.none() | values, min_size=count + 2, max_size=count + 2))
        cut = draw(st.integers(1, count))
        chunks = [drawn[1 : cut + 1], drawn[cut + 1 : count + 1]]
        made[name] = pa.chunked_array([pa.array([None, *chunk, None], kind)[1 : len(chunk) + 1] for chunk in chunks])
    return made


@given(columns(), st.data())
def test_what_is_read_is_what_was_written_wherever_it_lies(made, data):
    """The same table with side files and without: rows in any order, whole columns, tables, joined in another order."""
    count = len(next(iter(made.values())))
    order = data.draw(st.permutations(range(count)))
    rows = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=20)), np.int64)
    names = [name for name in made if name != "image"]
    with tempfile.TemporaryDirectory() as place:
        first = {"caption": [f"c{row}" for row in range(count)]}
        write(f"{place}/index", {name: [values[row] for row in order] for name, values in first.items()},
              ids=[f"{row:024x}" for row in order])  # fmt: skip
        readers = []
        for artifact, least in ((f"{place}/apart", 0), (f"{place}/inside", NEVER)):
            record = write(artifact, made, least)
            assert record == inspect(artifact, "000000")
            assert side_files([record]) == set(storage.list_names(f"{artifact}/wide"))
            readers.append(ShardReader([f"{place}/index", artifact], "000000"))
        apart, inside = readers
        assert apart.sample_ids == inside.sample_ids
        assert all((apart.ask(name, rows) is not None) == holds(made[name]) for name in names)
        assert all(inside.ask(name, rows) is None for name in names)
        for method in ("stored", "rows"):
            found, wanted = (getattr(reader, method)(names, rows) for reader in readers)
            assert list(found) == list(wanted) == names
            assert all(equal(found[name], wanted[name]) for name in names)
        found, wanted = (reader.columns([*names, "caption"]) for reader in readers)
        assert all(equal(found[name], wanted[name]) for name in [*names, "caption"])
        found, wanted = (reader.table(names, rows) for reader in readers)
        assert found.to_pylist() == wanted.to_pylist()
        Ledger(f"{place}/apart").close()
        assert list(verify_shards(f"{place}/apart", [], {})) == []


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=60), st.data())
def test_requests_cover_what_is_wanted_and_a_fifth_more_at_most(sizes, data):
    sizes = np.array(sizes)
    places = pa.StructArray.from_arrays(
        [pa.array(each) for each in (np.cumsum(sizes) - sizes, sizes, np.zeros(len(sizes), int))],
        fields=list(wide.PLACE),
    )
    column = wide.Column("somewhere", "features", wide.Side("features-0", "uint8", int(sizes.sum()), ""), places)
    rows = np.array(data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=80)), np.int64)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(wide, "SPAN_BYTES", data.draw(st.sampled_from([1, 4000, 2**20])))
        spans = list(column.spans(rows))
        assert all(len(span.rows) == 1 or span.stop - span.start <= wide.SPAN_BYTES for span in spans)
    needed = np.unique(rows[sizes[rows] > 0])
    assert sorted(row for span in spans for row in span.rows.tolist()) == needed.tolist()
    assert all(span.start < span.stop for span in spans)
    assert sum(span.stop - span.start for span in spans) <= 1.2 * sizes[needed].sum()
    assert len(list(column.spans(np.arange(len(sizes))))) == int(sizes.any())  # neighbours are one request


def features(count, size=4096, seed=0):
    """Numbers of two bytes, as bfloat16 lies."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 2**16, size, dtype=np.uint16) for _ in range(count)]


def faults(artifact):
    return " ".join(verify_shards(artifact, [], {}))


def test_a_side_file_that_is_missing_cut_or_changed_is_named(place):
    """By `verify`, and where its rows are read: by all readers, and in no other shard's."""
    artifact, values = storage.join(place, "a"), features(6)
    write(artifact, {"features": values}, 4096)
    write(artifact, {"features": features(6, seed=1)}, 4096, "000001", ids=[f"{row:024x}" for row in range(6, 12)])
    Ledger(artifact).close()
    reader = ShardReader([artifact], "000000")
    assert equal(reader.stored(["features"], np.array([5, 0, 5]))["features"], [values[5], values[0], values[5]])
    assert faults(artifact) == ""
    (file,) = inspect(artifact, "000000")["wide"]
    url = storage.join(artifact, "wide", file)
    data = storage.read_bytes(url)

    def met(error, match):
        with pytest.raises(error, match=match):
            reader.stored(["features"], np.array([4, 5]))
        with pytest.raises(error, match=match):
            ShardReader([artifact], "000000").columns(["features"])
        assert len(ShardReader([artifact], "000001").columns(["features"])["features"]) == 6
        return faults(artifact)

    storage.write_bytes(url, data[:-1])
    told = met(OSError, f"{file} was cut: it ends before byte {len(data)} of the {len(data)} .* 'features' was")
    assert told == f"shard 000000 has {len(data) - 1} bytes in wide/{file}, and not {len(data)}"
    assert equal(reader.stored(["features"], np.array([0, 1]))["features"], values[:2])  # these are there
    storage.write_bytes(url, data[:1000])
    met(OSError, f"{file} was cut")
    storage.write_bytes(url, data[:-1] + bytes([data[-1] ^ 1]))
    told = met(OSError, f"{file} has changed since it was written: row 5 of 'features'")
    assert told == f"shard 000000 has other bytes in wide/{file} than were written"
    storage.write_bytes(url, bytes(len(data)))  # as after a power cut
    met(OSError, "has changed since it was written")
    storage.remove(url)
    told = met(FileNotFoundError, f"{file} is missing, in which values of 'features' lie")
    assert told == f"shard 000000 lacks wide/{file}, in which values of it lie"
    storage.write_bytes(url, data)
    assert faults(artifact) == ""


def test_a_shard_that_names_a_file_elsewhere_is_not_read(tmp_path):
    write(str(tmp_path), {"features": features(2)}, 4096)
    url = shard_url(str(tmp_path), "000000")
    table = pq.read_table(url)
    field = table.schema.field("features")
    side = json.loads(field.metadata[wide.MARK]) | {"file": "../../secret"}
    table = table.cast(pa.schema([*list(table.schema)[:-1], field.with_metadata({wide.MARK: json.dumps(side)})]))
    pq.write_table(table, url)
    with pytest.raises(ValueError, match=r"'features' names '../../secret' as its side file"):
        ShardReader([str(tmp_path)], "000000")


def test_any_changed_byte_is_found_and_its_shard_named(tmp_path):
    """Also one of what a column says of its side file."""
    artifact = str(tmp_path)
    record = write(artifact, {"features": features(3), "image": [bytes(5000), None, b"x"]}, wide.LEAST)
    Ledger(artifact).close()
    generator = np.random.default_rng(0)
    urls = [shard_url(artifact, "000000"), *(f"{artifact}/wide/{file}" for file in record["wide"])]
    assert len(urls) == 2, "two values of a byte and of 5,000 are small on average"
    for url in urls:
        data = storage.read_bytes(url)
        for place in generator.choice(len(data), 400, replace=False).tolist():
            Path(url).write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
            found = list(verify_shards(artifact, [], {}))
            assert found, place
            assert all(told.startswith("shard 000000 ") for told in found)
        Path(url).write_bytes(data)
    assert faults(artifact) == ""


@pytest.mark.parametrize("changed", [{"dtype": "imt64"}, {"dtype": "O"}, {"sise": 1}])
def test_a_column_that_does_not_say_where_its_values_lie_is_a_sentence(changed):
    told = json.dumps({"file": "features-0", "dtype": "uint8", "size": 1, "sha256": ""} | changed)
    with pytest.raises(ValueError, match="'features' does not say where its values lie"):
        wide.side_of(pa.field("features", wide.PLACE, metadata={wide.MARK: told}))


def test_a_shard_is_there_only_with_its_side_files(tmp_path, monkeypatch):
    """Who dies in between leaves no shard; whoever comes second changes nothing, and what is no shard's goes."""
    artifact, written = str(tmp_path), []

    def dies(url, data, overwrite=True):
        written.append(url)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(storage, "write_bytes", dies)
        with pytest.raises(KeyboardInterrupt):
            write(artifact, {"features": features(3)}, 4096)
    assert written == [shard_url(artifact, "000000")]
    assert len(storage.list_names(f"{artifact}/wide")) == 1
    first = write(artifact, {"features": features(3, seed=1)}, 4096)
    assert write(artifact, {"features": features(3, seed=2)}, 4096) == first
    assert len(storage.list_names(f"{artifact}/wide")) == 3
    assert Ledger(artifact).close() == {"000000": first}
    assert faults(artifact) == ""
    wide.sweep(artifact, side_files([first]))
    assert storage.list_names(f"{artifact}/wide") == first["wide"]
    assert equal(ShardReader([artifact], "000000").columns(["features"])["features"], features(3, seed=1))


def test_shards_of_both_layouts_are_one_artifact(tmp_path):
    """As where an artifact has grown: old shards were taken over. Small values stay in the Parquet file."""
    artifact, values = str(tmp_path), features(3)
    write(artifact, {"features": values, "codes": [[1, 2], None, [3]]}, NEVER)
    write(artifact, {"features": [*values[:2], None], "codes": [[1], [2], [3]]}, wide.LEAST, "000001")
    assert "wide" not in inspect(artifact, "000000")
    Ledger(artifact).close()
    assert faults(artifact) == ""
    readers = [ShardReader([artifact], name) for name in ("000000", "000001")]
    assert [reader.ask("features", np.arange(1)) is None for reader in readers] == [True, False]
    assert readers[1].ask("codes", np.arange(1)) is None
    assert readers[1].ask("lacking?", np.arange(1)) is None
    assert equal(readers[1].rows(["features?", "codes"], [2, 0])["features?"], [None, values[0]])
    first, second = (reader.table(["features"], np.arange(3)) for reader in readers)
    assert first.slice(0, 2).to_pylist() == second.slice(0, 2).to_pylist()


def test_what_lies_under_a_null_is_no_value(tmp_path):
    values = pa.array(np.arange(6, dtype=np.uint16))
    column = pa.ListArray.from_arrays(pa.array([0, 2, 4, 6], pa.int32()), values, mask=pa.array([False, True, False]))
    record = write(str(tmp_path), {"features": column})
    found = ShardReader([str(tmp_path)], "000000").columns(["features"])["features"]
    assert equal(found, [np.array([0, 1], np.uint16), None, np.array([4, 5], np.uint16)])
    assert storage.digest(f"{tmp_path}/wide/{record['wide'][0]}")["size"] == 8


def test_columns_that_32_bits_do_not_count_have_64(monkeypatch):
    values = [np.arange(3, dtype=np.uint16), None, np.arange(2, dtype=np.uint16)]
    assert wide.array(values).type == pa.list_(pa.uint16())
    monkeypatch.setattr(wide, "LARGE", 4)
    assert wide.array(values).type == wide.array(values, pa.list_(pa.uint16())).type == pa.large_list(pa.uint16())
    assert wide.array([b"abc", None, b"def"], pa.binary()).type == pa.large_binary()
    assert wide.array(["abc", "def"]).type == pa.string()
    small = pa.table({"a": pa.array(values[:1])})
    joined = pa.concat_tables([small, pa.table({"a": wide.array(values)})], promote_options="permissive")
    assert joined["a"].type == pa.large_list(pa.uint16())


BROKEN: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class Config:
    rows: int = 8


@dataclass
class Describe:
    """Features of a text, of a length of its own."""

    reads: tuple[str, ...] = ("text",)
    writes: tuple[str, ...] = ("features", "image")
    cpus: float = 1
    gpus: float = 0

    def setup(self):
        pass

    def __call__(self, batch):
        if BROKEN & {*batch["text"]}:
            raise MemoryError(batch["text"])
        made = [described(text) for text in batch["text"]]
        return {"features": made, "image": [each.tobytes() for each in made]}


def described(text):
    return np.full(4000 + len(text), int(text), np.uint16)


@step(version=1)
def index(config: Config, *, out, cluster, report):
    for shard in range(2):
        name, rows = f"{shard:06d}", range(config.rows)
        texts, ids = [str(10**shard * (row + 1)) for row in rows], [f"{shard}{row:023x}" for row in rows]
        if pending(out, [name]):
            write(out, {"text": texts}, wide.LEAST, name, ids)
    Ledger(out).close()
    return tally(out)


def made_of(rows, out):
    """As `run_shards` makes it of stages, without Ray; a part is committed after each batch of three."""
    actor = Actor(StageWork((Describe(),), (rows.path,), 3, Redo.of_folder(out)), out, 1000, 0.0)
    for name in pending(out, joined_names([rows.path])):
        assert actor._run(name)["error"] == ""
    storage.remove(storage.join(out, "attempts"))
    Ledger(out).close()
    return tally(out)


@step(version=1, shards=by_shard)
def describe(config: Config, rows: Artifact, *, out, cluster, report):
    return made_of(rows, out)


def whole(artifact):
    found = list(verify_files(artifact.path, artifact.manifest["files"]))
    found += verify_shards(artifact.path, [each.path for each in artifact.inputs], artifact.summary)
    records = Ledger(artifact.path).complete().values()
    assert found == []
    assert side_files(records) == set(storage.list_names(artifact.url("wide")))
    assert not any(name.startswith("wide") for name in artifact.manifest["files"])
    for name in joined_names([artifact.path]):
        reader = ShardReader([each.path for each in artifact.inputs] + [artifact.path], name)
        columns = reader.columns(["text", "features"])
        assert equal(columns["features"], [described(text) for text in columns["text"]])
        assert reader.ask("features", np.arange(1)) is not None
    return True


def test_shards_done_in_parts_and_retried_have_their_side_files(place):
    """A retry makes those of the shards that it does again, and leaves out what they were."""
    BROKEN.clear()
    store = Store(storage.join(place, "store"), Cluster(name="test"))
    rows = store.step(index, Config())
    BROKEN.add("3")
    first = store.step(describe, Config(), rows)
    assert first.summary["failed"] == 1
    assert whole(first)
    BROKEN.clear()
    renewed = store.retry(first, describe, Config(), ["oom"])
    assert (renewed.id, renewed.summary["failed"]) == (f"{first.id}.1", 0)
    assert whole(renewed)
    assert whole(first)  # it stays as it was
    files = [set(storage.list_names(artifact.url("wide"))) for artifact in (first, renewed)]
    assert len(files[0] & files[1]) == 2  # features and images of the shard that had no fault
    assert len(files[1]) == 4


def test_shards_that_are_taken_over_bring_their_side_files(place):
    store = Store(storage.join(place, "store"), Cluster(name="test"))
    first = store.step(describe, Config(), store.step(index, Config()))
    other = Store(storage.join(place, "other"), Cluster(name="test"))
    rows = other.step(index, Config())
    older = [storage.join(place, "store", "describe", first.id), storage.join(place, "other", "describe", "new")]
    records = Ledger(older[0]).complete()
    take_over(older[1], older[0], {"000001": "000001"}, records)
    assert set(storage.list_names(storage.join(older[1], "wide"))) == side_files([records["000001"]])
    made_of(rows, older[1])
    assert list(verify_shards(older[1], [rows.path], tally(older[1]))) == []
    assert {name: record["sha256"] for name, record in Ledger(older[1]).complete().items()} == {
        name: record["sha256"] for name, record in records.items()
    }
