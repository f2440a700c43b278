"""What makes a process see no more of this machine than another machine would: namespaces of its own (Linux)."""

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = """
set -e
hostname "$1"; scratch=$2; python=$3; shift 3
mkdir -p "$scratch/python"
mount --bind "$python" "$scratch/python"
mount --rbind "$scratch" /tmp
while [ "$1" != -- ]; do [ ! -d "$1" ] || mount -t tmpfs -o size=1m none "$1"; shift; done; shift
mount -t tmpfs none /dev/shm
[ -d "$python/lib" ] || { mkdir -p "$python"; mount --bind /tmp/python "$python"; }
cd /tmp; exec "$@"
"""


def alone(name, scratch, hidden):
    """What a command begins with to run on "another machine".

    It is called `name`, `scratch` is its /tmp, nobody else's temporary files are there, `hidden` folders are empty, and
    it has shared memory and processes of its own. Python and its packages are there, and so is the network.
    """
    mapped = [] if os.geteuid() == 0 else ["--map-root-user"]
    line = ["unshare", *mapped, "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    empty = [str(folder) for folder in hidden if str(folder) != "/tmp"]
    return [*line, "sh", "-c", SCRIPT, "alone", name, str(scratch), sys.prefix, *empty, "--"]


def project():
    """The folders where Python finds this project, from here or wherever it was installed from."""
    code = "import infra; print(infra.__file__)"
    there = subprocess.run([sys.executable, "-c", code], cwd="/", env={}, capture_output=True, text=True, check=False)
    return {ROOT, *(Path(line).parents[1] for line in there.stdout.split())}


@cache
def refused():
    """Why this machine does not let processes be apart; nothing where it does."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run([*alone("probe", folder, []), "true"], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return "there is no unshare"
        return done.stderr.strip() if done.returncode else ""
