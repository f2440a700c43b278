import hashlib
import json
import os
import pickle
import subprocess
import sys
import tracemalloc

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.provenance import Author, Sign, identify, libraries, record
from captioner.retry import decodings
from captioner.styles import RETRIES, Style
from infra.data.ledger import commit
from infra.data.stage import ACCEPTED, Runner, Stage

STYLE = Style(name="short", prompt="a picture of", beams=3)
AUTHOR = Author(model="train_captioner/0123", backend="rescribe", dtype="bf16", weights_sha256="ab" * 32)
RECORDS = tuple(record(AUTHOR, STYLE, each) for each in decodings(STYLE))


def run(sign, batch):
    rows = len(next(iter(batch.values())))
    sign.setup()
    return Runner([sign])(batch | {"state": [ACCEPTED] * rows, "reason": [None] * rows})


def test_a_caption_leads_to_the_whole_truth_about_it():
    columns = run(Sign({"short": RECORDS}), {"caption_short": ["a", "b", None, "d"], "attempt_short": [1, 2, 1, 3]})
    found = [json.loads(line) if line else None for line in columns["provenance_short"]]
    assert found[2] is None
    assert found[0] == {
        "model": "train_captioner/0123",
        "revision": None,
        "weights_sha256": "ab" * 32,
        "backend": "rescribe",
        "style": "short",
        "prompt": "a picture of",
        "decoding": {"beams": 3, "no_repeat_ngram": 0, "repetition_penalty": 1.0, "min_tokens": 1, "max_tokens": 60},
        "seed": None,
        "dtype": "bf16",
        "libraries": libraries(),
    }
    for row, search in ((1, RETRIES[0]), (3, RETRIES[1])):  # decoded again: by the search that wrote what stands
        assert found[row]["decoding"]["no_repeat_ngram"] == search.no_repeat_ngram
        assert found[row]["decoding"]["repetition_penalty"] == search.repetition_penalty
    assert {"python", "rescribe", "torch", "transformers"} <= found[0]["libraries"].keys()


def test_it_is_a_stage_that_can_be_sent():
    sign = Sign({"short": RECORDS, "long": RECORDS[:1]})
    assert isinstance(sign, Stage)
    assert pickle.loads(pickle.dumps(sign)) == sign
    assert sign.reads == ("caption_short", "caption_long", "attempt_short")
    assert sign.writes == ("provenance_short", "provenance_long")


def test_it_costs_a_few_bytes_a_row_and_is_text_to_readers(tmp_path):
    def shard(name, signed):
        texts = [f"caption {row}" for row in range(5000)]
        columns = {"sample_id": [f"{row:024x}" for row in range(5000)], "state": [ACCEPTED] * 5000}
        columns |= {"reason": pa.nulls(5000, pa.string()), "caption_short": texts}
        if signed:
            values = run(Sign({"short": RECORDS[:1]}), {"caption_short": texts})["provenance_short"]
            columns["provenance_short"] = pa.array(values, pa.string())
        return commit(str(tmp_path), name, pa.table(columns))["size"]

    assert shard("signed", True) - shard("plain", False) < 6 * 5000
    path = tmp_path / "shards" / "signed.parquet"
    group = pq.ParquetFile(path).metadata.row_group(0)
    signed = next(group.column(n) for n in range(group.num_columns) if group.column(n).path_in_schema[:4] == "prov")
    assert "RLE_DICTIONARY" in signed.encodings
    assert pq.read_schema(path).field("provenance_short").type == pa.string()
    frame = pd.concat([pd.read_parquet(path).query("sample_id > '0'").head(3), pd.read_parquet(path).tail(1)])
    assert {json.loads(line)["model"] for line in frame["provenance_short"]} == {AUTHOR.model}


def test_weights_of_a_folder_are_known_by_their_hash(tmp_path):
    assert identify(str(tmp_path)) == {"model": tmp_path.name, "revision": None, "weights_sha256": None}
    (tmp_path / "pytorch_model.bin").write_bytes(b"old")
    assert identify(str(tmp_path))["weights_sha256"] == hashlib.sha256(b"old").hexdigest()
    (tmp_path / "model-1.safetensors").write_bytes(b"one")
    assert identify(str(tmp_path), "main")["weights_sha256"] == hashlib.sha256(b"one").hexdigest()
    (tmp_path / "model-2.safetensors").write_bytes(b"two")
    listed = subprocess.run("sha256sum *.safetensors | sha256sum", shell=True, cwd=tmp_path, capture_output=True)
    assert identify(str(tmp_path))["weights_sha256"] == listed.stdout.decode().split()[0]


def test_large_weights_are_not_read_into_memory(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2**26)
    tracemalloc.start()
    identify(str(tmp_path))
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


@pytest.mark.parametrize(("revision", "found"), [("", "c0ffee" * 6), ("v1", "decaf0" * 6), ("none", "none")])
def test_a_model_of_a_hub_is_known_by_its_commit(tmp_path, revision, found):
    cache = tmp_path / "hub" / "models--org--name"
    for ref, commit_id in (("main", "c0ffee" * 6), ("v1", "decaf0" * 6)):
        (cache / "snapshots" / commit_id).mkdir(parents=True)
        (cache / "snapshots" / commit_id / "config.json").write_text("{}")
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / ref).write_text(commit_id)
    code = f"from captioner.provenance import identify; print(identify('org/name', {revision!r})['revision'])"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found
