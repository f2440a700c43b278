"""What tests of faults share: a corpus, a captioner of random weights, the command, and what kills its processes."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import torch

from captioner.model import Captioner, CaptionerConfig, TextConfig, VisionConfig
from captioner.vocabulary import train_vocabulary
from infra import storage
from workflows.__main__ import main
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


@contextlib.contextmanager
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


def here(*arguments):
    """Likewise, in this process, on the Ray that is up in it: a process of its own takes seconds to start."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(list(arguments))
    except SystemExit as ended:
        code = ended.code
    said = err.getvalue()
    assert "Traceback" not in said, said
    lines = out.getvalue().strip().splitlines()
    return code, json.loads(lines[-1]) if lines and "--json" in arguments else None, said


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


def strike(process, seen, kind, seconds, out, timeout=180):
    """Wait till a shard is under way and `seconds` more, then SIGKILL a process of the kind; False if it ended before.

    `seen` learns of the driver's family, which loses its parent.
    """
    deadline, begun = time.monotonic() + timeout, None
    while process.poll() is None:
        assert time.monotonic() < deadline, f"no {kind} was killed in {timeout} seconds"
        if begun is None and any(Path(out).glob("recaption/*/attempts/*")) and find(process, "actor"):
            begun = time.monotonic()
        if begun is not None and time.monotonic() - begun >= seconds and (victim := find(process, kind)):
            seen |= {each.pid: each for each in family(process)}
            victim.send_signal(signal.SIGKILL)
            return True
        time.sleep(0.02)
    return False


def kill(arguments, kind, seconds, out, timeout=180):
    """Start the command, `strike` once, and see how it ends: the exit code and standard error.

    AssertionError if it ended before it could be killed, hangs, or leaves processes behind.
    """
    with started(*arguments) as (process, seen):
        assert strike(process, seen, kind, seconds, out, timeout), process.communicate()
        _, err = process.communicate(timeout=timeout)
        assert not (left := survivors(seen)), left
        return process.returncode, err


def survivors(seen, timeout=60):
    """Which of the processes still live after a while.

    A zombie is dead, though nobody has asked how it died; Ray's two agents look for their dead server for a minute.
    """
    deadline = time.monotonic() + timeout
    while (left := [told for each in seen.values() if (told := _living(each))]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def _living(process):
    try:
        title = " ".join(process.cmdline())
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE and "Agent" not in title:
            return f"{process.pid} {process.name()} {title[:200]}"
    except psutil.Error:
        pass
    return None


def verified(out):
    """What `rescribe verify` says of a store's captions."""
    (artifact,) = Path(out).glob("recaption/*")
    code, said, err = here("verify", str(artifact), "--json")
    assert code == 0, err
    return said


def rows(out, step="recaption"):
    """All rows of a step's artifact in a local store, by shard and in order."""
    return {path.name: pq.read_table(path).to_pylist() for path in shards(out, step)}


def draw(seed):
    """Random times, and the seed told, so that a failure can be had again."""
    print(f"seed {seed}")
    return random.Random(seed)
