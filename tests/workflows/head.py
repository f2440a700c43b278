"""A Ray cluster of two nodes on this machine: a head, where drivers run, and a node beside it."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

from tests import apart

TOKEN = "5e" * 32
WORKER_CPUS = 8


class Cluster:
    """Started on entry, one node after the other; `secrets`, of one node and the other, are in their environment only.

    With `hidden` folders the nodes are machines: they share nothing but the network, as far as this machine lets
    processes be apart, and have next to no environment. Node n then has the address 127.0.0.(n + 2).
    """

    def __init__(self, secrets, cpus=(0, WORKER_CPUS), hidden=None):
        self._options = (secrets, cpus, hidden)
        self._secrets, self._cpus, self._hidden = self._options
        self.folder = tempfile.mkdtemp(prefix="rs-")  # short: sockets lie in it
        self.ports = iter(_free_ports(16))
        self.gcs, self.dashboard = next(self.ports), next(self.ports)
        self.url = f"http://127.0.0.1:{self.dashboard}"
        self._started: list[subprocess.Popen] = []
        self._environment = {
            **{name: value for name, value in os.environ.items() if self._inherits(name)},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_prestart_worker_first_driver": "0",
            "PYTHONPATH": "",
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self):
        try:
            return self._begin()
        except RuntimeError:  # Ray gives a node thirty seconds to start, however much the machine has to do
            self.__init__(*self._options)
            return self._begin()

    def _begin(self):
        try:
            where = ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}", "--include-dashboard=true"]
            client = f"--ray-client-server-port={next(self.ports)}"
            self._start("--head", f"--port={self.gcs}", *where, client)
            self._wait_for(1)
            self._start(f"--address={'127.0.0.1' if self._hidden is None else '127.0.0.2'}:{self.gcs}")
            self._wait_for(2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        tree = []
        for process in self._started:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                tree += [parent, *parent.children(recursive=True)]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self._started:
            process.wait()
        psutil.wait_procs(tree, timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def files_that_hold(self, secret):
        """Names of the files of Ray's sessions that hold this text."""
        found = []
        for path in Path(self.folder).rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_file() and secret.encode() in path.read_bytes():
                    found.append(str(path))
        return found

    def scratch(self, node):
        """The temporary folder of a node."""
        return Path(self.folder, str(node))

    def _inherits(self, name):
        if self._hidden is not None:
            return name == "PATH"
        return not name.startswith(("AWS_", "HF_", "RAY_"))

    def _start(self, *options):
        node = len(self._started)
        names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
        ports = [f"--{name}={next(self.ports)}" for name in (*names, "metrics-export-port")]
        line = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-gpus=0", *options, *ports]
        line += ["--object-store-memory=150000000", "--disable-usage-stats", f"--num-cpus={self._cpus[node]}"]
        # A folder each: nodes that share one delete each other's copy of the code.
        environment, sessions = self._environment | self._secrets[node], self.scratch(node)
        if self._hidden is not None:
            line.append(f"--node-ip-address=127.0.0.{node + 2}")
            Path(sessions, "home").mkdir(parents=True)
            if not apart.refused():
                line = [*apart.alone(f"node-{node}", sessions, self._hidden), *line]
                sessions = Path("/tmp")  # as it is called there
            environment |= {"HOME": f"{sessions}/home", "TMPDIR": str(sessions), "GLOO_SOCKET_IFNAME": "lo"}
            sessions /= "ray"
        line += [f"--temp-dir={sessions}"]
        with open(Path(self.folder, "start.txt"), "ab") as output:
            self._started.append(
                subprocess.Popen(
                    line, cwd=self.folder, env=environment, stdout=output, stderr=output, start_new_session=True
                )
            )

    def _wait_for(self, nodes):
        """Until so many nodes have reported to the job server."""
        request = urllib.request.Request(f"{self.url}/nodes?view=summary", headers={"Authorization": f"Bearer {TOKEN}"})
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=10) as answer:
                if answer.read().decode().count('"hostname"') >= nodes:
                    return
            if any(process.poll() is not None for process in self._started):
                break
            time.sleep(0.5)
        raise RuntimeError(Path(self.folder, "start.txt").read_text()[-3000:])


def _free_ports(count):
    """Not of those that the system gives to whoever asks for any: Ray's own processes ask for many."""
    with contextlib.ExitStack() as stack:
        ports = []
        while len(ports) < count:
            port = random.SystemRandom().randrange(20_000, 32_000)  # below, Ray's workers have theirs
            one = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("0.0.0.0", port))
                ports.append(port)
        return ports
