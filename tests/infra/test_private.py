"""A Ray that `connect` starts is its user's: nobody reaches it from elsewhere, nobody joins it without the token."""

import ipaddress
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from infra.private import ensure_token

DRIVER = """
import json, sys
from infra.cluster import Cluster, connect, laptop
from infra.data.run import run_shards  # as the command does, before there is Ray
from infra.train.fit import Training, fit
from infra.train.loop import TrainConfig
from tests.infra.train import toy
connect(laptop())
import ray
print(json.dumps({"address": ray.get_runtime_context().gcs_address, "nodes": ray.nodes()}), flush=True)
sys.stdin.readline()
place = sys.argv[1]
toy.write_rows(f"{place}/rows")
training = Training(toy.Toy(), [f"{place}/rows"], TrainConfig(steps=20, batch=10), f"{place}/out")
fit([training], Cluster(name="two", workers=(2, 2)), lambda *a, **k: None)
"""

CLIENT = """
import sys
import ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print(ray.get(ray.put("joined")))
"""


@dataclass
class Started:
    driver: subprocess.Popen[str]
    environment: dict[str, str]
    address: str
    home: Path


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Iterator[Started]:
    """A driver with a home of its own, whose Ray is as `connect` starts it; it trains when it is sent a line."""
    home = tmp_path_factory.mktemp("home")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "HOME": str(home),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, str(tmp_path_factory.mktemp("place"))]
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True) as driver:
        try:
            assert driver.stdout
            yield Started(driver, environment, json.loads(driver.stdout.readline())["address"], home)
        finally:
            driver.kill()


def listening(driver: subprocess.Popen[str]) -> set[tuple[str, str]]:
    """Which processes of a family listen, and where."""
    found = set()
    family = psutil.Process(driver.pid)
    for process in (family, *family.children(recursive=True)):
        try:
            connections = process.net_connections("inet")
            found |= {
                (process.name(), each.laddr.ip)
                for each in connections
                if each.laddr
                and (each.status == psutil.CONN_LISTEN or (each.type == socket.SOCK_DGRAM and not each.raddr))
            }
        except psutil.Error:
            continue  # it has ended meanwhile
    return found


def reachable(found: set[tuple[str, str]]) -> set[str]:
    """Those that other machines reach."""

    def is_loopback(text: str) -> bool:
        address = ipaddress.ip_address(text)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback

    return {name.split(".")[0] for name, ip in found if not is_loopback(ip)}


def join(started: Started, **settings: str) -> subprocess.CompletedProcess[str]:
    # By which a client takes 127.0.0.1 for what it says.
    environment = started.environment | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} | settings
    command = [sys.executable, "-c", CLIENT, started.address]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)


@pytest.mark.timeout(120)
def test_another_machine_finds_no_open_port(started):
    found = listening(started.driver)
    assert {"gcs_server", "raylet"} <= {name for name, _ in found}, found
    assert reachable(found) == set()


@pytest.mark.timeout(120)
def test_no_process_waits_for_work_before_there_is_any(started):
    """Ray would begin with one for each logical CPU, at a second of CPU each."""
    family = psutil.Process(started.driver.pid).children(recursive=True)
    titles = [" ".join(process.cmdline()) for process in family]
    assert [title for title in titles if "raylet" in title]
    begun = [title for title in titles if "default_worker.py" in title and "python_worker_command" not in title]
    assert begun + [title for title in titles if "ray::IDLE" in title] == []


@pytest.mark.timeout(120)
def test_who_has_the_token_joins(started):
    joined = join(started, RAY_AUTH_MODE="token")
    assert joined.stdout.strip() == "joined", joined.stderr


@pytest.mark.long
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "settings", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}]
)
def test_who_has_not_is_refused(started, settings):
    refused = join(started, **settings)
    assert refused.returncode != 0
    assert "joined" not in refused.stdout
    assert "auth" in refused.stderr.lower(), refused.stderr


def test_the_token_is_its_owners_alone(started):
    token = started.home / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64


@pytest.mark.long
@pytest.mark.timeout(180)
def test_training_opens_no_port_to_others(started):
    assert started.driver.stdin
    started.driver.stdin.write("\n")
    started.driver.stdin.flush()
    found: set[tuple[str, str]] = set()
    while started.driver.poll() is None:
        found |= listening(started.driver)
        time.sleep(0.5)
    assert started.driver.returncode == 0
    assert "ray::RayTrainWorker" in {name for name, _ in found}, found
    assert reachable(found) == set()


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_token_that_was_there_stays_and_is_closed_to_others(home):
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("1" * 64)
    token.chmod(0o644)
    ensure_token()
    assert token.read_text() == "1" * 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert [each.name for each in token.parent.iterdir()] == ["auth_token"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "1" * 64), ("RAY_AUTH_TOKEN_PATH", "/a/token")],
)
def test_a_token_from_elsewhere_is_left_to_who_gave_it(home, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    ensure_token()
    assert not (home / ".ray").exists()
