"""The whole path by the command: it runs, runs again as a no-op, and a killed run continues to the same result."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from infra import storage
from infra.config import to_dict
from t2i.conditions.codes import CodesConfig
from t2i.conditions.labels import LabelConfig
from t2i.conditions.layout import LayoutConfig
from t2i.conditions.pictures import EdgesConfig
from t2i.conditions.words import WordsConfig
from t2i.priors.sampling import SamplingConfig
from tests import apart, kills
from tests.proxy import Proxy
from tests.workflows.head import TOKEN, Cluster
from workflows.conditions import ConditionsConfig
from workflows.recipes import debug as debug_recipe

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.long]


def run(*arguments):
    code, results, errors = kills.here(*arguments)
    assert code == 0, errors
    return results, errors


def only(folder: Path) -> Path:
    """The one artifact of a step."""
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def debug(ray_cluster, tmp_path_factory):
    """The store of an undisturbed run of the debug recipe, and what it printed."""
    store = tmp_path_factory.mktemp("store")
    results, errors = run("run", "debug", "--store", str(store), "--json")
    return store, results, errors


@pytest.mark.timeout(480)
def test_it_runs_and_reports(debug):
    store, results, errors = debug
    for name in ("caption_f1", "alt_text_f1", "scene_score", "object_score", "seconds", "peak_memory_gb"):
        assert isinstance(results[name], float), name
    for name in ("report", "captioner", "tokenizer", "prior"):
        assert Path(results[name]).exists(), name
    assert Path(results["report"]).read_text().startswith("<!doctype html>")
    for step in ("ingest", "train_captioner", "recaption", "mix", "train_prior", "evaluate"):
        assert step in errors
    assert not list(store.rglob("lease.json"))


@pytest.mark.timeout(120)
def test_again_all_is_done(debug):
    store, results, _ = debug
    started = time.monotonic()
    again, errors = run("run", "debug", "--store", str(store), "--json")
    assert time.monotonic() - started < 30
    assert "All was done already." in errors
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in results.items() if k != "seconds"}


@pytest.mark.timeout(120)
def test_a_changed_threshold_runs_the_mixture_and_what_follows(debug):
    store, _, _ = debug
    plan, _ = run("plan", "debug", "--store", str(store), "--mix.min-words", "2", "--json")
    reasons = {step["step"]: step["reason"] for step in plan["steps"]}
    assert reasons.pop("mix") == "min_words 1 -> 2"
    again = {step for step, reason in reasons.items() if reason != "done"}
    assert again == {"train_prior", "sample", "evaluate"}


@pytest.mark.timeout(60)
def test_list_and_show(debug):
    store, results, _ = debug
    listed, _ = run("list", "--store", str(store), "--json")
    assert len(listed["artifacts"]) == 9
    shown, _ = run("show", results["prior"], "--json")
    assert shown["step"] == "train_prior"


@pytest.mark.timeout(180)
def test_verify_proves_each_artifact_and_names_what_was_changed(debug, tmp_path):
    store, _, _ = debug
    listed, _ = run("list", "--store", str(store), "--json")
    assert len(listed["artifacts"]) >= 9
    captions = only(store / "recaption")
    for step in ("ingest", "recaption", "train_prior"):
        proved, _ = run("verify", str(only(store / step)), "--json")
        assert proved["whole"]
        assert not proved["faults"]
    shutil.copytree(store, tmp_path / "store")
    harmed = tmp_path / "store" / "recaption" / captions.name
    shard = harmed / "shards" / "000002.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.unlink()  # it may share its bytes with the original
    shard.write_bytes(data)
    code, found, errors = kills.here("verify", str(harmed), "--json")
    assert code == 1
    assert "shard 000002" in errors
    assert not found["whole"]


@pytest.mark.timeout(60)
def test_a_gallery_of_the_captions(debug, tmp_path):
    store, _, _ = debug
    page = tmp_path / "rows.html"
    drawn, _ = run("gallery", str(only(store / "mix")), "--out", str(page), "--count", "30", "--json")
    assert drawn["rows"] == drawn["pictures"] == 30
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.timeout(60)
def test_retry_says_when_there_is_nothing_to_mend(debug):
    store, _, _ = debug
    code, _, errors = kills.here("retry", str(only(store / "recaption")), "--only", "oom")
    assert code == 1
    assert "No row of" in errors
    assert only(store / "recaption")  # and nothing is left of the try


@pytest.mark.timeout(240)
def test_a_corpus_is_captioned_as_it_lies(debug, tmp_path):
    _, results, _ = debug
    run(
        "shapes",
        "--out",
        str(tmp_path / "corpus"),
        "--samples",
        "40",
        "--shard-size",
        "20",
        "--labelled",
        "8",
        "--json",
    )
    torn = tmp_path / "corpus" / "00001.tar"
    data = torn.read_bytes()
    torn.write_bytes(data[: len(data) // 2])
    pattern = str(tmp_path / "corpus" / "{00000..00001}.tar")
    line = ("recaption", "--corpus", pattern, "--captioner", results["captioner"], "--out", str(tmp_path / "out"))
    counts, _ = run(*line, "--styles", "short", "--json")
    assert counts["rows_in"] == counts["accepted"] + counts["rejected"] + counts["failed"]
    assert counts["shards"] == 2
    assert counts["failed"] == 2  # the row that was cut, and the archive's lost end
    assert counts["images_per_second"] > 0
    tables = [pq.read_table(path) for path in sorted(Path(counts["captions"], "shards").iterdir())]
    assert {"caption_short", "logp_short"} <= set(tables[0].column_names)
    assert "caption_descriptive" not in tables[0].column_names
    proved, _ = run("verify", counts["captions"], "--json")
    assert proved["rows_in"] == counts["rows_in"]
    again, errors = run(*line, "--styles", "short", "--json")
    assert again["captions"] == counts["captions"]
    assert errors.count("done already") == 2
    code, _, errors = kills.here(*line, "--styles", "shrt")
    assert code == 1
    assert "There is no style 'shrt'" in errors


def kill_when(condition, *arguments):
    """Start the command, SIGKILL it as soon as `condition()` holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "workflows", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not condition():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()


def same(a: Path, b: Path) -> bool:
    """Tables by their rows, other files by their bytes."""
    if a.suffix == ".parquet":
        return pq.read_table(a).equals(pq.read_table(b))
    return a.read_bytes() == b.read_bytes()


@pytest.mark.timeout(900)
def test_killed_in_recaption_and_in_train_prior_it_ends_the_same(debug, tmp_path):
    line = ("run", "debug", "--store", str(tmp_path), "--json")
    kill_when(lambda: list(tmp_path.glob("recaption/*/shards/*.parquet")), *line)
    assert not list(tmp_path.glob("recaption/*/manifest.json"))
    kill_when(lambda: list(tmp_path.glob("train_prior/*/checkpoints/*/commit.json")), *line)
    assert not list(tmp_path.glob("train_prior/*/manifest.json"))
    results, errors = run(*line)
    assert errors.count("done already") >= 6
    store, undisturbed, _ = debug
    measured = ("seconds", "peak_memory_gb", "report", "captioner", "tokenizer", "prior")
    assert {k: v for k, v in results.items() if k not in measured} == {
        k: v for k, v in undisturbed.items() if k not in measured
    }
    for pattern in ("recaption/*/shards/*", "mix/*/shards/*", "train_prior/*/model/*", "sample/*/images/*"):
        ours, theirs = sorted(tmp_path.glob(pattern)), sorted(store.glob(pattern))
        assert [path.name for path in ours] == [path.name for path in theirs]
        assert ours
        assert all(same(a, b) for a, b in zip(ours, theirs, strict=True)), pattern


MACHINES = {
    "LC_ALL": "C",  # and Python is not to help itself
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONUTF8": "0",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "RAY_DATA_DEFAULT_WAIT_FOR_MIN_ACTORS_S": "120",  # an actor that starts late finds work, too
}
# A machine of four CPUs has room for one training worker or one actor that holds a model, and not for two.
SPREAD = ("workers 2 2", "rows-per-worker 1", "cpus-per-worker 3", "actors 2 2", "cpus-per-actor 3")


@pytest.mark.timeout(480)
def test_two_machines_that_share_nothing_but_a_store_on_s3(debug, s3, s3_server, tmp_path):
    """Submitted to a real cluster; what a node does, the store's server knows by the key that only this node has."""
    here, wanted, _ = debug
    client = tmp_path / "client"
    client.mkdir()
    storage.upload(str(only(here / "ingest") / "corpus"), f"{s3}/corpus")
    line = ["debug", "--corpus.corpus", f"{s3}/corpus/{{00000..00003}}.tar", "--store", f"{s3}/store", "--json"]
    spread = [word for option in SPREAD for word in f"--cluster.{option}".split()]
    with Proxy(s3_server) as proxy:
        keys = [{"AWS_ACCESS_KEY_ID": f"node-{n}", "AWS_SECRET_ACCESS_KEY": f"secret-of-{n}"} for n in range(2)]
        secrets = [MACHINES | key | {"AWS_ENDPOINT_URL": proxy.url} for key in keys]
        with Cluster(secrets, cpus=(4, 4), hidden=[*apart.project(), client]) as cluster:
            submit = ["submit", "--address", cluster.url, "--follow", "--", "run", *line, *spread]
            environment = {
                "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(client), "TMPDIR": str(client),
                "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
            }  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "workflows", *submit],
                env=environment, cwd=client, capture_output=True, text=True, timeout=400, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            homes = [cluster.scratch(node) / "home" for node in range(2)]
            left = [path for node in range(2) for path in files_below(cluster.scratch(node))]
    assert list(client.iterdir()) == []
    caches = [home / ".cache" / "rescribe" for home in homes]
    assert [path for path in left if not any(path.is_relative_to(cache) for cache in caches)] == []
    entries = [path.relative_to(cache).parts for path in left for cache in caches if path.is_relative_to(cache)]
    assert {parts[1] for parts in entries if len(parts) > 1} == {"model"}  # what a node keeps: models whole, no half
    assert all(path.suffix == ".lock" for path in left if path.parent in caches)
    signed = [(key, path) for key, method, path in proxy.signed if method in ("PUT", "POST")]
    assert {key for key, _, _ in proxy.signed} == {"node-0", "node-1"}
    for made in (
        "train_captioner/*/base/checkpoints/*/part*",
        "train_captioner/*/finetune/checkpoints/*/part*",
        "recaption/*/shards/*",
        "train_tokenizer/*/checkpoints/*/part*",
        "encode/*/shards/*",
        "train_prior/*/checkpoints/*/part*",
    ):
        writers = {key for key, path in signed if fnmatch(path, f"*/store/{made}")}
        assert writers == {"node-0", "node-1"}, made

    results = next(json.loads(text) for text in done.stdout.splitlines() if text.startswith('{"') and "report" in text)
    assert results["report"].startswith(f"{s3}/store/evaluate/")
    assert results["alt_text_f1"] == wanted["alt_text_f1"]  # no training has a part in it
    # Two workers add up in another order than one, and six steps of Adam make the most of small differences.
    assert results["reconstruction_mse"] == pytest.approx(wanted["reconstruction_mse"], rel=0.02)
    for name in ("caption_f1", "scene_score", "object_score"):
        assert results[name] == pytest.approx(wanted[name], abs=0.05), name
    plan, _ = run("plan", *line)
    assert {step["reason"] for step in plan["steps"]} == {"done"}
    assert not [file.url for file in storage.listing(f"{s3}/store") if "lease" in file.url]


def files_below(scratch):
    """What a machine has written to its own disk, but for what is Ray's."""
    below = [path for path in scratch.iterdir() if path.name not in ("ray", "python")]
    return [path for folder in below for path in folder.rglob("*") if path.is_file()]


@pytest.mark.timeout(480)
def test_a_prior_is_told_more_than_captions(ray_cluster, tmp_path):
    """Words, a class, a layout, codes in another column; held-out rows tell theirs, and a prompt alone is refused."""
    recipe = debug_recipe()
    told = (
        WordsConfig(vocabulary_size=2000, length=24),
        LabelConfig(drop=0.2),
        LayoutConfig(boxes=3, drop=0.0),
    )
    fields = ConditionsConfig(class_field="class", boxes_field="boxes")
    recipe = replace(
        recipe,
        name="told",
        corpus=replace(recipe.corpus, corpus=replace(recipe.corpus.corpus, conditions=True), conditions=fields),
        codes=replace(recipe.codes, column="shape_codes"),
        prior=replace(recipe.prior, conditions=told),
        sample=replace(recipe.sample, count=8, negative="a gray background", sampling=SamplingConfig(guidance=2.0)),
    )
    (tmp_path / "told.json").write_text(json.dumps(to_dict(recipe)))
    store = str(tmp_path / "store")
    results, _ = run("run", str(tmp_path / "told.json"), "--store", store, "--json")
    shape = storage.read_json(storage.join(results["prior"], "model", "config.json"))
    words, label, layout = shape["conditions"]
    assert words["vocabulary_size"] < 2000
    assert len(label["labels"]) > 3
    assert set(label["labels"]) <= set(layout["classes"])
    assert results["scene_score"] >= 0
    paths = {name: str(only(Path(store, step))) for name, step in
             (("mixture", "mix"), ("prior", "train_prior"), ("tokenizer", "train_tokenizer"))}  # fmt: skip
    line = ["sample", *(word for name, path in paths.items() for word in (f"--{name}", path))]
    line += ["--prompts", "a red circle", "--store", store, "--json"]
    code, _, errors = kills.here(*line)
    assert code
    assert "hears of 'class_label', which nobody told: there is caption" in errors
    again = replace(recipe, prior=replace(recipe.prior, conditions=(*told, EdgesConfig(size=(32, 32)))))
    (tmp_path / "told.json").write_text(json.dumps(to_dict(again)))
    code, _, errors = kills.here("run", str(tmp_path / "told.json"), "--store", store, "--json")
    assert code
    assert "'edges' says planes, which this network does not hear" in errors
    own = CodesConfig(column="shape_codes", codes=4096, places=16)
    again = replace(recipe, prior=replace(recipe.prior, conditions=(*told, own)))
    (tmp_path / "told.json").write_text(json.dumps(to_dict(again)))
    code, _, errors = kills.here("run", str(tmp_path / "told.json"), "--store", store, "--json")
    assert code
    assert "hears the column 'shape_codes', which the prior is to draw" in errors
