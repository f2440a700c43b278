"""Several Ray nodes on this machine, each a process group: a head without CPUs, and nodes that do the work."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
START_SECONDS = 150  # of a node, on a machine that is busy


class Nodes:
    """A context: the head runs within it, and what `add` starts. `environment` is what a driver needs to join.

    Head and driver, whose command is to begin with `pinned(0)`, and the first node share core 0, so that a second node
    on core 1 adds a core and nothing else changes.
    """

    def __init__(self) -> None:
        self.address = ""
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_raylet_start_wait_time_s": str(START_SECONDS),
            "RAY_BACKEND_LOG_LEVEL": "fatal",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),  # of workers, which the nodes start
            "PYTHONWARNINGS": "ignore",
        }
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Nodes":
        self._folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: a socket's path has at most 107 letters
        self.address = f"127.0.0.1:{free_port()}"
        try:
            self._start(0, "--head", f"--port={self.address.split(':')[1]}", "--num-cpus=0",
                        "--include-dashboard=false", "--no-monitor", f"--temp-dir={self._folder}")  # fmt: skip
        except BaseException:
            self.__exit__()
            raise
        return self

    def add(self, core: int, cpus: int = 1) -> subprocess.Popen[bytes]:
        """Start a node on a core, and wait until it has joined; nodes are started one after another.

        Its process leads a group of its own, in which all of the node runs.
        """
        self._start(core, f"--address={self.address}", f"--num-cpus={cpus}")
        return self._started[-1]

    def drain(self, node: subprocess.Popen[bytes], seconds: int = 60) -> None:
        """Tell the cluster that a node will be taken away in so many seconds, as a spot machine's notice does."""
        listed = "{node['NodeID']: node['NodeManagerPort'] for node in ray.nodes() if node['Alive']}"
        told = self._ray(
            f"import json, ray; ray.init('{self.address}', logging_level='error', log_to_driver=False); "
            f"print(json.dumps({listed}))"
        )
        family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        mine = {each.laddr.port for one in family for each in one.net_connections("tcp") if each.status == "LISTEN"}
        (identity,) = [identity for identity, port in json.loads(told).items() if port in mine]
        self._ray(f"from ray.scripts.scripts import cli; cli(['drain-node', '--address={self.address}', "
                  f"'--node-id={identity}', '--reason=DRAIN_NODE_REASON_PREEMPTION', '--reason-message=spot', "
                  f"'--deadline-remaining-seconds={seconds}'])")  # fmt: skip

    def _ray(self, program: str) -> str:
        """The last line that a Python program prints which joins this cluster."""
        command = [sys.executable, "-W", "ignore", "-c", program]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=True)
        return (done.stdout.strip().splitlines() or [""])[-1]

    def __exit__(self, *_: object) -> None:
        for node in reversed(self._started):
            for sent in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(node.pid, sent)
                    node.wait(10 if sent == signal.SIGTERM else None)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, core: int, *options: str) -> None:
        before = self._joined()
        log = open(f"{self._folder}/node-{len(self._started)}.log", "wb")  # noqa: SIM115 - the node's, until it ends
        command = [*pinned(core), sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--block",
                   "--node-ip-address=127.0.0.1", f"--object-store-memory={128 * 2**20}", "--disable-usage-stats",
                   "--include-log-monitor=false", f"--dashboard-agent-listen-port={free_port()}"]  # fmt: skip
        with log:
            node = subprocess.Popen(
                command, env=self.environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
        self._started.append(node)
        deadline = time.monotonic() + START_SECONDS
        while self._joined() <= before:
            if node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"A node did not start: {Path(log.name).read_text()[-2000:]}")
            time.sleep(0.2)

    def _joined(self) -> int:
        """How many raylets of this cluster listen."""
        return len(list(Path(self._folder).glob("session_2*/sockets/raylet*")))


def pinned(core: int) -> list[str]:
    """What a command begins with to stay on one core, where the machine has it."""
    cores = sorted(os.sched_getaffinity(0))
    return ["taskset", "--cpu-list", str(cores[core % len(cores)])]


def free_port() -> int:
    """One of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
