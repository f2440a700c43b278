"""What stands for another machine in the tests sees nothing of this one; else their proofs would be none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import apart

LOOK = """
import importlib.util, json, os, pathlib, socket, sys
pathlib.Path("mine.txt").write_text("mine")
print(json.dumps({
    "there": [place for place in sys.argv[1:] if pathlib.Path(place).exists()],
    "project": [name for name in ("infra", "workflows", "captioner", "t2i") if importlib.util.find_spec(name)],
    "packages": [name for name in ("ray", "torch", "s3fs") if importlib.util.find_spec(name)],
    "shared": os.listdir("/dev/shm"), "host": socket.gethostname(), "home": os.getcwd(), "first": os.getpid() < 10,
}))
"""


def test_a_machine_of_its_own_sees_its_packages_and_its_scratch(tmp_path):
    if why := apart.refused():
        pytest.skip(f"processes cannot be apart here, and the nodes of a test share this machine's disk: {why}")
    mine, other, driver = (tmp_path / name for name in ("mine", "other", "driver"))
    for folder in (mine, other, driver):
        folder.mkdir()
        (folder / "secret.txt").write_text("secret")
    files = [str(folder / "secret.txt") for folder in (mine, other, driver)] + [str(Path(__file__)), apart.__file__]
    line = apart.alone("elsewhere", mine, [*apart.project(), driver, other])
    done = subprocess.run(
        [*line, sys.executable, "-c", LOOK, *files, "/tmp/secret.txt"],
        env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "there": ["/tmp/secret.txt"],  # its own
        "project": [],
        "packages": ["ray", "torch", "s3fs"],
        "shared": [],
        "host": "elsewhere",
        "home": "/tmp",
        "first": True,
    }
    assert (mine / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.rglob("*.txt")) == ["mine.txt", *["secret.txt"] * 3]
