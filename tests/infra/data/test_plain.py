"""A Parquet file in which a stranger put code is read as data, or refused: nothing in it runs."""

import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data  # noqa: F401 -- which registers its types with Arrow, as in every worker

from infra.data.encoded import read_rows
from infra.data.ledger import inspect
from infra.data.parquet import read_parquet
from infra.data.plain import is_plain
from infra.data.revision import Redo
from infra.data.samples import Source
from infra.data.shards import ShardReader, shard_url
from infra.data.verify import _check
from tests.bomb import Bomb
from tests.infra.data.zoo import encode, picture

PNG = encode(picture(0))


@pytest.fixture
def bomb(tmp_path):
    """A pickle that leaves a mark when it is loaded; the test fails if it was."""
    pickled = pickle.dumps(Bomb(tmp_path / "ran"))
    yield pickled
    assert not (tmp_path / "ran").exists()


def pickled(name):
    """A field that says, as Ray's files do, that its bytes are pickled objects."""
    said = {"ARROW:extension:name": "ray.data.arrow_pickled_object", "ARROW:extension:metadata": ""}
    return pa.field(name, pa.large_binary(), metadata=said)


def within(field):
    return [
        field,
        pa.field(field.name, pa.list_(field)),
        pa.field(field.name, pa.large_list(field)),
        pa.field(field.name, pa.list_(field, 1)),
        pa.field(field.name, pa.struct([pa.field("plain", pa.int8()), field])),
        pa.field(field.name, pa.map_(pa.string(), field)),
        pa.field(field.name, pa.list_(pa.struct([field]))),
    ]


def holding(field, value):
    """The value where the field has it."""
    if isinstance(field.type, pa.StructType):
        return {"plain": 1, "bad": value} if field.type.num_fields == 2 else {"bad": value}
    if isinstance(field.type, pa.MapType):
        return [("a", value)]
    if isinstance(field.type, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        return [holding(field.type.value_field, value)]
    return value


def source(url, **options):
    return Source(kind="parquet", name="a", url=url, size=0, tag="", **options)


def test_a_pickle_would_run_if_it_were_shown(tmp_path):
    """The danger is there: without this, the tests below could not fail."""
    field = pickled("bad")
    table = pa.table({"bad": [pickle.dumps(Bomb(tmp_path / "ran"))]}, schema=pa.schema([field]))
    pq.write_table(table, tmp_path / "a.parquet")
    pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", range(7))
def test_a_corpus_is_read_without_such_columns(tmp_path, bomb, place):
    field = within(pickled("bad"))[place]
    schema = pa.schema([pa.field("key", pa.string()), pa.field("image", pa.binary()), field])
    table = pa.table({"key": ["one"], "image": [PNG], "bad": [holding(field, bomb)]}, schema=schema)
    pq.write_table(table, tmp_path / "a.parquet")
    assert not is_plain(pq.read_schema(tmp_path / "a.parquet").field("bad").type)
    (sample,) = read_parquet(source(str(tmp_path / "a.parquet")))
    assert (sample.key, sample.image, sample.meta) == ("one", PNG, {"key": "one"})


def test_an_image_that_is_a_pickle_is_a_lost_file(tmp_path, bomb):
    url = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [bomb]}, schema=pa.schema([pickled("image")])), url)
    (sample,) = read_parquet(source(url, column="image"))
    assert sample.state == "failed"
    assert "without running code: image" in sample.reason
    with pytest.raises(ValueError, match="without running code"):
        list(read_rows(url, "image", [0]))


@pytest.mark.parametrize("column", ["sample_id", "state", "reason", "caption_alt"])
def test_a_shard_of_a_store_is_refused(tmp_path, bomb, column):
    fields = {name: pa.field(name, pa.string()) for name in ("sample_id", "state", "reason", "caption_alt")}
    values = {"sample_id": ["a"], "state": ["accepted"], "reason": [None], "caption_alt": ["a dog"]}
    fields[column], values[column] = pickled(column), [bomb]
    url = shard_url(str(tmp_path), "000000")
    os.makedirs(os.path.dirname(url))
    pq.write_table(pa.table(values, schema=pa.schema(list(fields.values()))), url)
    for read in (
        lambda: ShardReader([str(tmp_path)], "000000"),
        lambda: inspect(str(tmp_path), "000000"),
        lambda: Redo(str(tmp_path), ()).table("000000", ["a"]),
    ):
        with pytest.raises(ValueError, match=f"without running code: {column}"):
            read()
    (fault,), _ = _check(str(tmp_path), "000000", {}, [])
    assert "without running code" in fault


def test_what_arrow_itself_defines_is_data():
    for kind in (
        pa.uuid(),
        pa.json_(),
        pa.bool8(),
        pa.fixed_shape_tensor(pa.int8(), [2]),
        pa.dictionary(pa.int8(), pa.string()),
    ):
        assert is_plain(kind)
    assert is_plain(pa.run_end_encoded(pa.int32(), pa.string()))
    assert not is_plain(pa.dictionary(pa.int8(), pickled_type()))


def pickled_type():
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    return ArrowPythonObjectType()
