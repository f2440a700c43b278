"""Workers, nodes and the driver come and go, with notice and without; the numbers stay those of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.nodes import Nodes
from infra.metrics import read_scalars
from infra.train import checkpoint
from tests.infra.train import toy
from tests.infra.train.drive import Driver, groups

STEPS = 500
CONFIG = {"steps": STEPS, "batch": 10, "log_every_steps": 5, "save_every_steps": 20}
NODES = {"workers": (1, 2), "zero_stage": 2, "grow_seconds": 2}
pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]


@pytest.fixture
def place(tmp_path):
    toy.write_rows(f"{tmp_path}/rows")
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The logged losses of one plain process."""
    return toy.plain(str(tmp_path_factory.mktemp("plain")), steps=STEPS, save_every_steps=STEPS)[1][4::5]


def check(place, undisturbed):
    rows = read_scalars(f"{place}/out")
    assert [row["step"] for row in rows] == list(range(5, STEPS + 1, 5))
    assert [row["net/token"] for row in rows] == pytest.approx(undisturbed, rel=1e-3)


def kill_node(node, sent=signal.SIGKILL):
    os.killpg(node.pid, sent)


def test_a_node_dies_one_joins_and_one_is_drained(place, undisturbed):
    with Nodes() as nodes:
        stays, dies = nodes.add(0, cpus=2), nodes.add(1, cpus=2)
        with Driver(place, CONFIG, nodes.environment, "Slow", address=nodes.address, **NODES) as driver:
            driver.wait_for_step(30)
            kill_node(dies)
            driver.wait_for_group(1)
            joins = nodes.add(1, cpus=2)
            driver.wait_for_group(2)
            assert groups(place)[1]["why"] == "there is room for more workers"
            before = read_scalars(f"{place}/out")[-1]["step"]
            drain(nodes, joins)
            driver.wait(lambda: len(groups(place)) == 3)
            kill_node(joins)
            saved = checkpoint.newest(f"{place}/out/checkpoints")
            assert saved
            assert checkpoint.step_of(saved) >= before, "what was trained before the drain was saved"
            assert groups(place)[2]["why"] == "a node is taken away"
            code, said = driver.end()
            assert code == 0, said
        assert stays.poll() is None
    assert [group["workers"] for group in groups(place)] == [2, 1, 2, 1]
    check(place, undisturbed)


def drain(nodes, node):
    """Tell the cluster that a node will be taken away in a while, as a spot instance's notice does."""
    script = """
import json, sys, ray
ray.init(address=sys.argv[1], logging_level="error", log_to_driver=False)
print(json.dumps({n["NodeID"]: n["NodeManagerPort"] for n in ray.nodes() if n["Alive"]}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, nodes.address],
        env=nodes.environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    ports = json.loads(done.stdout.strip().splitlines()[-1])
    family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    mine = {c.laddr.port for process in family for c in process.net_connections("tcp") if c.status == "LISTEN"}
    (identity,) = [identity for identity, port in ports.items() if port in mine]
    command = [
        "drain-node", f"--address={nodes.address}", f"--node-id={identity}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=60",
    ]  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *command], env=nodes.environment, timeout=60, check=True,
        capture_output=True,
    )  # fmt: skip


def test_a_raylet_and_then_two_workers_one_after_another(place, undisturbed):
    with Nodes() as nodes:
        first = nodes.add(0, cpus=2)
        second = nodes.add(1, cpus=2)
        with Driver(place, CONFIG, nodes.environment, "Slow", address=nodes.address, **NODES) as driver:
            driver.wait_for_step(30)
            raylet = [p for p in psutil.Process(second.pid).children(recursive=True) if p.name() == "raylet"]
            raylet[0].kill()
            for number in (1, 2):
                driver.wait_for_group(number)
                trainers(first)[0].kill()
            code, said = driver.end()
            assert code == 0, said
            assert "goes on from what was saved last" in said
    assert [group["workers"] for group in groups(place)] == [2, 1, 1, 1]
    check(place, undisturbed)


def trainers(node):
    return [
        process
        for process in psutil.Process(node.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_is_told_to_go_saves_first(place, undisturbed, sent):
    with Driver(place, CONFIG, task="Slow", workers=(2, 2)) as driver:
        driver.wait_for_step(30)
        driver.process.send_signal(sent)
        begun = time.monotonic()
        code, said = driver.end(60)
        assert time.monotonic() - begun < 30
    if sent == signal.SIGTERM:
        assert code == 143, said
    else:
        assert code != 0
    assert "Saving what is trained" in said
    saved = checkpoint.newest(f"{place}/out/checkpoints")
    assert saved
    step = checkpoint.step_of(saved)
    assert step >= 30
    assert step == max(row["step"] for row in read_scalars(f"{place}/out")) // 5 * 5 + step % 5, "no step was lost"
    with Driver(place, CONFIG, task="Toy", workers=(2, 2)) as driver:
        code, said = driver.end()
        assert code == 0, said
    check(place, undisturbed)


def test_a_worker_that_hangs_is_told_of_and_replaced(place, undisturbed):
    with Driver(place, CONFIG, task="Slow", workers=(2, 2), stall_seconds=12) as driver:
        driver.wait_for_step(30)
        hung = driver.workers()[1]
        hung.suspend()
        stopped = time.time()
        driver.wait(lambda: len(groups(place)) == 1, 40)
        assert groups(place)[0]["at"] - stopped < 30
        code, said = driver.end()
        assert code == 0, said
    assert "says nothing for" in said
    assert f"process {hung.pid}" in said
    check(place, undisturbed)
