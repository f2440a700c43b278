"""What tests of faults share: a corpus, a captioner of random weights, the command, and what kills its processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import torch

from captioner.model import Captioner, CaptionerConfig, TextConfig, VisionConfig
from captioner.vocabulary import train_vocabulary
from infra import storage
from workflows.corpora.shapes import ShapesConfig, write_shards

ROOT = Path(__file__).parents[1]
KINDS = ("driver", "actor", "raylet")


def write_captioner(folder, seed=0):
    """An artifact that holds a small captioner whose words are as random as its weights; loud, so that they differ."""
    captions = [
        "a large red circle at the top left",
        "a small blue square, on a white background",
        "two green triangles",
    ]
    vocabulary = train_vocabulary(captions * 3, 300)
    sizes = {"hidden": 64, "layers": 2, "heads": 4, "mlp": 128}
    vision = VisionConfig(image_size=(32, 32), patch_size=8, **sizes)
    config = CaptionerConfig(vision=vision, text=TextConfig(max_length=24, **sizes), init_std=0.4)
    torch.manual_seed(seed)
    Path(folder, "model").mkdir(parents=True)
    Captioner(config.blip(vocabulary), vocabulary).save(str(Path(folder, "model")))
    manifest = {"step": "train_captioner", "id": f"{seed:016x}", "config": {}, "inputs": [], "summary": {}, "files": {}}
    storage.write_json(storage.join(str(folder), "manifest.json"), manifest)
    return str(folder)


def write_corpus(folder, shards, rows):
    """A corpus of small tars; returns the pattern that names them."""
    write_shards(ShapesConfig(samples=shards * rows, shard_size=rows, labelled=0), str(folder))
    return str(Path(folder, f"{{00000..{shards - 1:05d}}}.tar"))


def line_of(corpus, captioner, out):
    """The command that captions a corpus; batches are small, so that a shard takes a while."""
    return ("recaption", "--corpus", corpus, "--captioner", captioner, "--out", out, "--batch", "4", "--json")


@contextmanager
def started(*arguments, **environment):
    """The command in a process group of its own, of which nothing is left afterwards."""
    paths = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "-m", "workflows", *arguments],
        env={**os.environ, **paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    seen = {}
    try:
        yield process, seen
    finally:
        seen |= {each.pid: each for each in family(process)}
        process.kill()
        process.communicate()
        for each in seen.values():
            if each.is_running():  # psutil knows a process that took over the number of a dead one
                each.kill()
        psutil.wait_procs(list(seen.values()), timeout=20)


def run(*arguments, timeout=120, **environment):
    """The command to its end: exit code, the object that it printed (None where there is none), standard error."""
    with started(*arguments, **environment) as (process, _):
        out, err = process.communicate(timeout=timeout)
        code = process.returncode
    assert "Traceback" not in err, err
    return code, json.loads(out.strip().splitlines()[-1]) if code == 0 else None, err


def family(process):
    """All that a process started, and what that started."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        return []


def find(process, kind):
    """The process of a kind under a driver: the driver itself, one that captions, or the raylet; or None."""
    if kind == "driver":
        return psutil.Process(process.pid)
    for each in family(process):
        try:
            title, name = " ".join(each.cmdline()), each.name()
        except psutil.Error:
            continue
        if (kind == "raylet" and name == "raylet") or (kind == "actor" and "MapWorker" in title):
            return each
    return None


def shards(out, step="recaption"):
    """The committed shards of a step's one artifact in a local store."""
    return sorted(Path(out).glob(f"{step}/*/shards/*.parquet"))


def kill(arguments, kind, seconds, out, timeout=120, **environment):
    """Start the command; when captioning has begun, wait `seconds`, SIGKILL a process of the kind, and see how it ends.

    Returns whether it was killed before the end, the exit code, standard error, and the seconds from the kill to the
    end of the driver.
    """
    with started(*arguments, **environment) as (process, seen):
        deadline = time.monotonic() + timeout
        begun, victim, before = None, None, len(shards(out))
        while process.poll() is None:
            assert time.monotonic() < deadline, f"nothing was killed in {timeout} seconds"
            if begun is None and (find(process, "actor") and list(Path(out).glob("recaption/*/*"))):
                begun = time.monotonic()
            if begun is not None and time.monotonic() - begun >= seconds and (victim := find(process, kind)):
                break
            time.sleep(0.02)
        if victim is None:
            return False, process.returncode, process.communicate()[1], 0.0, len(shards(out)) - before
        seen |= {each.pid: each for each in family(process)}
        victim.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, err = process.communicate(timeout=timeout)
        return True, process.returncode, err, time.monotonic() - killed, len(shards(out)) - before


def rows(out, step="recaption"):
    """All rows of a step's artifact, by shard and in order."""
    return {path.name: pq.read_table(path).to_pylist() for path in shards(out, step)}


def draw(seed):
    """Random times, and the seed told, so that a failure can be had again."""
    print(f"seed {seed}")
    return random.Random(seed)
