"""A corpus is captioned as it lies: by published weights, and by a model that is served and fails on the way."""

import json

import pyarrow.parquet as pq
import pytest

from captioner.backends.endpoint import EndpointConfig
from captioner.backends.vllm import VLLMConfig
from infra.cluster import Cluster
from infra.config import from_dict
from infra.data.verify import verify_files, verify_shards
from infra.store import Store
from tests.captioner.backends import server, tiny
from tests.infra.data.here import work_here
from workflows import asked as asked_module
from workflows.asked import SHORT, captioner_of
from workflows.caption_with import CaptionWithConfig, caption_with
from workflows.corpora.shapes import ShapesConfig, write_shards
from workflows.direct import DirectOptions, direct
from workflows.ingest import IngestConfig, ingest
from workflows.recaption import RecaptionConfig, recaption
from workflows.train_captioner import TrainCaptionerConfig

ROWS = 12
CLUSTER = Cluster(name="test", actors=(1, 1))


@pytest.fixture
def corpus(tmp_path):
    write_shards(ShapesConfig(samples=ROWS, labelled=2, shard_size=6), str(tmp_path / "corpus"))
    return str(tmp_path / "corpus" / "{00000..00001}.tar")


def rows(artifact):
    shards = [pq.read_table(artifact.url("shards", f"{name:06d}.parquet")) for name in range(2)]
    return [row for table in shards for row in table.to_pylist()]


def faults(artifact):
    found = list(verify_files(artifact.path, artifact.manifest["files"]))
    return found + list(verify_shards(artifact.path, [each.path for each in artifact.inputs], artifact.summary))


@pytest.mark.timeout(120)
def test_published_weights(ray_cluster, corpus, tmp_path):
    folder = tiny.blip(tmp_path / "blip")
    options = DirectOptions(corpus=corpus, captioner=folder, out=str(tmp_path / "out"), cluster=CLUSTER)
    captions = direct(options)
    assert captions.step == "recaption"
    assert captions.summary["rows_in"] == captions.summary["accepted"] == ROWS
    assert {"caption_short", "flag_short", "tries_short", "logp_alt"} <= rows(captions)[0].keys()
    records = captions.summary["provenance"]["short"]
    for row in rows(captions):
        signed = json.loads(row["provenance_short"])
        assert signed.items() >= records[row["attempt_short"] - 1].items()
        assert (signed["base"], signed["decoder"]) == ("blip", "alt")
        assert signed["weights_sha256"] == captions.summary["weights_sha256"]
        assert 1 <= row["attempt_short"] <= row["tries_short"]
    assert faults(captions) == []
    assert direct(options).path == captions.path


@pytest.mark.timeout(120)
def test_a_served_model_whose_failures_are_retried(corpus, tmp_path, monkeypatch):
    work_here(monkeypatch, ingest, asked_module)
    refused = set()

    def answer(body, number):
        if not refused:
            refused.add(number)
        return server.status(400) if number in refused else server.completion(f"caption {number}", finish_reason="stop")

    endpoint = server.Endpoint(answer)
    try:
        out = str(tmp_path / "out")
        options = DirectOptions(
            corpus=corpus, captioner=endpoint.url, model="m", out=out, styles="short", cluster=CLUSTER
        )
        captions = direct(options)
        assert captions.step == "recaption"
        assert (captions.summary["accepted"], captions.summary["failed"]) == (ROWS - 1, 1)
        assert captions.summary["reasons"] == {"http_400": 1}
        asked = len(endpoint.bodies)
        store = Store(out, CLUSTER)
        config = from_dict(RecaptionConfig, captions.manifest["config"])
        renewed = store.retry(captions, recaption, config, ["http_400"])
        assert renewed.summary["accepted"] == ROWS
        assert len(endpoint.bodies) == asked + 1
        before, after = rows(captions), rows(renewed)
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
        assert faults(renewed) == faults(captions) == []
        for row in rows(renewed):
            signed = json.loads(row["provenance_short"])
            assert (signed["model"], signed["backend"], signed["endpoint"]) == ("m", "endpoint", endpoint.url)
            assert (
                signed["prompt"] == config.styles[0].prompt == endpoint.bodies[0]["messages"][0]["content"][1]["text"]
            )
            assert signed["decoding"] == {"temperature": 0.0, "max_tokens": endpoint.bodies[0]["max_tokens"]}
            assert (signed["seed"], signed["dtype"]) == (endpoint.bodies[0]["seed"], None)
        assert renewed.summary["provenance"]["short"].items() <= signed.items()
    finally:
        endpoint.close()


@pytest.mark.timeout(120)
def test_what_the_step_of_before_was_answered_is_not_asked_for_again(corpus, tmp_path, monkeypatch):
    work_here(monkeypatch, ingest, asked_module)
    endpoint = server.Endpoint(lambda body, number: server.completion(f"caption {number}", finish_reason="stop"))
    try:
        out = str(tmp_path / "out")
        store = Store(out, CLUSTER)
        backend = EndpointConfig(base_url=endpoint.url, model="m")
        images = store.step(ingest, IngestConfig(corpus=corpus))
        before = store.step(caption_with, CaptionWithConfig(backend=backend, styles=(SHORT,), batch=128), images)
        asked = len(endpoint.bodies)
        options = {"corpus": corpus, "captioner": endpoint.url, "model": "m", "out": out, "cluster": CLUSTER}
        assert direct(DirectOptions(styles="short", **options)).path == before.path
        assert len(endpoint.bodies) == asked
        other = direct(DirectOptions(prompt="Name it.", style="named", **options))
        assert other.step == "recaption"
        assert rows(other)[0]["caption_named"].startswith("caption ")
        assert endpoint.bodies[-1]["messages"][0]["content"][1]["text"] == "Name it."
    finally:
        endpoint.close()


def test_a_word_says_who_captions(tmp_path):
    served = captioner_of("http://localhost:8000/v1", "m", "KEY")
    assert served == TrainCaptionerConfig(
        model=EndpointConfig(base_url="http://localhost:8000/v1", model="m", key_variable="KEY"), base=None, styles=()
    )
    assert captioner_of("vllm:a/b").model == VLLMConfig(model="a/b")
    assert captioner_of(tiny.blip(tmp_path / "blip")).model == str(tmp_path / "blip")
    with pytest.raises(ValueError, match="Name the model"):
        captioner_of("http://localhost:8000/v1")
    with pytest.raises(ValueError, match="somebody else's model"):
        TrainCaptionerConfig(model=VLLMConfig(model="a/b"), base=None)
