"""What we write as JSON other programs read: no NaN, no infinities, in no file that the product writes."""

import ast
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import storage, strict
from infra.metrics import ScalarLog, read_scalars
from infra.train.checkpoint import read_commit, write_commit

ROOT = Path(__file__).parents[2]
PACKAGES = ("infra", "captioner", "t2i", "workflows")
# Where JSON is compared, hashed, shown or read, and not written.
FREE = {("infra/config.py", "same"), ("captioner/backends/http.py", "_message"), ("infra/train/spare.py", "ask")}
FREE |= {("infra/data/parquet.py", "_plain"), ("infra/data/growth.py", "_hash"), ("infra/data/readers.py", "_digest")}
FREE |= {("infra/config.py", "_words"), ("infra/config.py", "_shown")}
FREE |= {("infra/older.py", "_choices"), ("workflows/judge.py", "read_meta"), ("workflows/judge.py", "read_split")}


def never(name):
    raise ValueError(f"{name} is no JSON")


def read(text):
    return json.loads(text, parse_constant=never)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def emptied(value):
    """With None for what is no finite number."""
    if isinstance(value, list):
        return [emptied(each) for each in value]
    if isinstance(value, dict):
        return {key: emptied(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@given(plain)
def test_what_is_written_is_strict_and_says_the_same(value):
    assert read(strict.dumps(value)) == emptied(value)
    assert read(strict.restated(json.dumps(value))) == emptied(value)


def test_other_ways_to_hold_a_number():
    assert strict.dumps((1.0, math.nan)) == "[1.0, null]"
    assert read(strict.dumps({math.nan: 1, math.inf: {"a": -math.inf}})) == {"nan": 1, "inf": {"a": None}}
    assert strict.dumps({"b": math.nan, "a": 1}, sort_keys=True, indent=1) == '{\n "a": 1,\n "b": null\n}'
    with pytest.raises(TypeError):
        strict.dumps({"a": {1}})


@pytest.mark.parametrize(
    "text", ['{ "a" : 1.50 }', '{"a": "NaN"}', "NaN but no JSON", "{'a': NaN}", '["\\ud800Infinity"]']
)
def test_a_text_that_is_strict_or_none_is_left_alone(text):
    assert strict.restated(text) == text


def test_files_are_strict(tmp_path):
    storage.write_json(str(tmp_path / "a.json"), {"psnr": math.inf, "deep": [math.nan]})
    assert read((tmp_path / "a.json").read_text()) == {"psnr": None, "deep": [None]}
    log = ScalarLog(str(tmp_path / "log"), 0)
    log(1, {"net/loss": math.nan, "net/lr": 0.5})
    log.close()
    assert read((tmp_path / "log" / "metrics.jsonl").read_text())["net/loss"] is None
    (row,) = read_scalars(str(tmp_path / "log"))
    assert (math.isnan(row["net/loss"]), row["net/lr"]) == (True, 0.5)


def test_a_checkpoint_with_a_nan_in_its_record_is_whole(tmp_path):
    write_commit(str(tmp_path), {"step": 1, "score": None, "parts": [], "seen": math.nan})
    assert read_commit(str(tmp_path)) == {"step": 1, "score": None, "parts": [], "seen": None}


def calls():
    """Every `json.dump` and `json.dumps` of the product: file, function, whether NaN is forbidden there."""
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text())
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            for call in [node for node in ast.walk(function) if isinstance(node, ast.Call)]:
                if ast.unparse(call.func) in ("json.dumps", "json.dump"):
                    forbids = any(ast.unparse(each) == "allow_nan=False" for each in call.keywords)
                    yield path.relative_to(ROOT).as_posix(), function.name, forbids


def test_nothing_is_written_another_way():
    found = list(calls())
    assert ("infra/strict.py", "dumps", True) in found
    assert {(file, name) for file, name, forbids in found if not forbids} == FREE
