"""`rescribe recaption` under faults: killed processes, failing servers, full disks, refused credentials.

After each the same line is given again; then `verify` holds, no sample is there twice, and the captions are those of an
undisturbed run. Times are drawn from a seed that is printed; RESCRIBE_SEED repeats one.
"""

import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from infra import storage
from tests import kills
from tests.proxy import Proxy

SHARDS, ROWS, FEW = 24, 6, 6
SEED = int(os.environ.get("RESCRIBE_SEED") or random.randrange(10**6))
SECRET = "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY"
MIXED = {"500": 0.1, "503": 0.05, "cut": 0.05, "lost": 0.03, "slow": 0.03}


@pytest.fixture(scope="module")
def world(ray_cluster, tmp_path_factory):
    """A captioner, a folder of shards, and the rows of an undisturbed run."""
    folder = tmp_path_factory.mktemp("world")
    captioner = kills.write_captioner(folder / "captioner")
    corpus = kills.write_corpus(folder / "corpus", SHARDS, ROWS)
    code, counts, err = kills.here(*kills.line_of(corpus, captioner, str(folder / "plain")))
    assert code == 0, err
    assert counts["accepted"] == SHARDS * ROWS
    rows = kills.rows(folder / "plain")
    assert len({row["caption_short"] for shard in rows.values() for row in shard}) > SHARDS  # else nothing is compared
    return {"captioner": captioner, "corpus": corpus, "rows": rows, "folder": folder}


def check(out, world):
    """Nothing is lost, nothing twice, nothing different."""
    found = kills.rows(out)
    ids = [row["sample_id"] for shard in found.values() for row in shard]
    assert len(ids) == len(set(ids)) == SHARDS * ROWS
    assert found == world["rows"]
    assert kills.verified(out)["rows_in"] == SHARDS * ROWS


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", kills.KINDS)
def test_sigkill_at_a_random_time(world, tmp_path, kind):
    out = str(tmp_path / "out")
    line = kills.line_of(world["corpus"], world["captioner"], out)
    seconds = random.Random(f"{SEED} {kind}").uniform(0, 5)
    print(f"RESCRIBE_SEED={SEED}: the {kind} is killed after {seconds:.2f} seconds of captioning")
    code, err = kills.kill(line, kind, seconds, out)
    print(f"exit code {code}, {len(kills.shards(out))} shards\n{err}")
    assert "Traceback" not in err
    if kind == "actor":  # another takes its place
        assert code == 0
    if kind == "raylet":
        assert code == 1
        assert re.search(r"^rescribe: .*[Gg]ive the same command again", err, re.MULTILINE)
    code, counts, err = kills.here(*line)
    assert code == 0, err
    assert counts["accepted"] == SHARDS * ROWS
    check(out, world)


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_a_second_driver_on_the_same_output_is_refused(world, tmp_path):
    out = str(tmp_path / "out")
    line = kills.line_of(world["corpus"], world["captioner"], out)
    with kills.started(*line) as (first, _):
        while not any(Path(out).glob("recaption/*/shards/*")):
            assert first.poll() is None, first.communicate()
            time.sleep(0.02)
        code, _, err = kills.here(*line)
        assert code == 1
        assert f"Another driver (process {first.pid} on " in err
        assert first.communicate(timeout=280)[1].count("Another driver") == 0
        assert first.returncode == 0
    check(out, world)


@pytest.fixture
def bucket(world, s3, monkeypatch):
    """The first shards of the corpus on S3; the pattern that names them, and an output beside them."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for number in range(FEW):
        name = f"{number:05d}.tar"
        storage.upload(str(world["folder"] / "corpus" / name), f"{s3}/corpus/{name}")
    return f"{s3}/corpus/{{00000..{FEW - 1:05d}}}.tar", f"{s3}/out"


def check_few(captions, world):
    """The captions on S3 are those of the undisturbed run, and verify holds."""
    names = [f"{number:06d}.parquet" for number in range(FEW)]
    assert storage.list_names(f"{captions}/shards") == names
    for name in names:
        with storage.open_read(f"{captions}/shards/{name}") as file:
            assert pq.read_table(file).to_pylist() == world["rows"][name]
    code, said, err = kills.here("verify", captions, "--json")
    assert code == 0, err
    assert said["rows_in"] == said["accepted"] == FEW * ROWS


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_server_that_fails_now_and_then(world, bucket, s3_server):
    corpus, out = bucket
    line = kills.line_of(corpus, world["captioner"], out)
    with Proxy(s3_server, seed=SEED, **MIXED) as proxy:
        print(f"RESCRIBE_SEED={SEED}")
        code, counts, err = kills.run(*line, timeout=400, AWS_ENDPOINT_URL=proxy.url)
        print(proxy.met, err)
        assert sum(proxy.met[kind] for kind in MIXED) > 10
    if code:
        assert re.search(r"^rescribe: .*(failed again and again|does not answer)", err, re.MULTILINE)
    code, counts, err = kills.here(*line)
    assert code == 0, err
    check_few(counts["captions"], world)


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_a_credential_that_is_revoked_in_the_middle(world, bucket, s3_server):
    corpus, out = bucket
    line = kills.line_of(corpus, world["captioner"], out)
    revoked = []

    def script(method, path, _):
        if method == "PUT" and re.search(r"/recaption/\w+/shards/", path):
            revoked.append(path)
        return "key" if len(revoked) > 2 else None

    with Proxy(s3_server, script=script) as proxy:
        code, _, err = kills.run(*line, timeout=280, AWS_ENDPOINT_URL=proxy.url)
    assert code == 1
    assert re.search(r"^rescribe: .*Access to s3://\S+ was denied \(InvalidAccessKeyId\)", err, re.MULTILINE), err
    assert SECRET not in err
    code, counts, err = kills.here(*line)
    assert code == 0, err
    check_few(counts["captions"], world)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["key", "signature", "put", "none"])
def test_a_wrong_or_missing_credential_is_said_at_once(s3, s3_server, tmp_path, fault):
    kills.write_corpus(tmp_path / "corpus", 2, 4)
    captioner = kills.write_captioner(tmp_path / "captioner")
    storage.upload(str(tmp_path / "corpus"), f"{s3}/corpus")
    line = kills.line_of(f"{s3}/corpus", captioner, f"{s3}/out")
    environment = {"AWS_SECRET_ACCESS_KEY": SECRET}
    if fault == "none":
        environment = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SHARED_CREDENTIALS_FILE": "/none"}

    def script(method, path, _):
        return ("403" if method == "PUT" else None) if fault == "put" else fault

    with Proxy(s3_server, script=None if fault == "none" else script) as proxy:
        code, _, err = kills.run(*line, AWS_ENDPOINT_URL=proxy.url, **environment)
    assert code == 1
    said = "No credentials were found for" if fault == "none" else "Access to"
    assert re.fullmatch(rf"rescribe: {said} s3://[^\n]*\.\n", err), err
    assert SECRET not in err
    assert storage.list_names(s3) == ["corpus"]


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_a_disk_that_fills_up(world, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    kilobytes = _room(world["folder"] / "plain" / "ingest") + _room(world["folder"] / "plain" / "recaption") // 2
    options = f"size={kilobytes}k"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        out = str(disk / "out")
        line = kills.line_of(world["corpus"], world["captioner"], out)
        code, _, err = kills.run(*line, timeout=280)
        assert code == 1
        assert re.search(r"^rescribe: .*There is no room left for /\S+\. Free some space", err, re.MULTILINE), err
        assert not list(disk.rglob("*.tmp"))
        assert len(kills.shards(out)) < SHARDS
        for path in kills.shards(out):
            assert pq.read_table(path).to_pylist() == world["rows"][path.name]
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        code, _, err = kills.here(*line)
        assert code == 0, err
        check(out, world)
    finally:
        shutil.rmtree(disk, ignore_errors=True)
        subprocess.run(["umount", "-l", disk], check=True)


def _room(folder):
    """Kilobytes that a folder takes on a file system of 4 KB pages."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*") if path.is_file())
