"""Nodes come and go, and so does a store, with notice and without; the numbers stay those of an undisturbed run."""

import os
import signal
import time

import psutil
import pytest

from benchmarks import recovery
from benchmarks.nodes import Nodes
from infra import storage
from infra.metrics import read_scalars
from infra.train import checkpoint
from tests.infra.train import toy
from tests.infra.train.drive import Driver, check, groups
from tests.proxy import Proxy

CONFIG = {"steps": 400, "batch": 10, "log_every_steps": 5, "save_every_steps": 20}
NODES = {"workers": (1, 2), "zero_stage": 2, "grow_seconds": 2, "log_ids": True}
PAIR = {"workers": (2, 2), "log_ids": True}
pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]


@pytest.fixture
def place(tmp_path):
    toy.write_rows(f"{tmp_path}/rows")
    return tmp_path


def kill_node(node, sent=signal.SIGKILL):
    os.killpg(node.pid, sent)


def test_a_node_dies_one_joins_and_one_is_drained(place):
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
            nodes.drain(joins)
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
    check(place, CONFIG)


def test_workers_that_die_while_their_group_starts_keep_no_places(place):
    """The one node has just the places that the next group needs."""
    config = CONFIG | {"steps": 200}
    with Nodes() as nodes:
        node = nodes.add(1, cpus=2)
        with Driver(place, config, nodes.environment, address=nodes.address, **NODES) as driver:
            for number in range(2):
                driver.wait(lambda number=number: len(groups(place, "begins")) > number)
                driver.wait(lambda: recovery.workers(node.pid))
                assert not groups(place, "first step")
                for worker in recovery.workers(node.pid):
                    worker.kill()
                driver.wait(lambda number=number: len(groups(place)) > number)
            code, said = driver.end()
            assert code == 0, said
    assert [group["workers"] for group in groups(place)] == [1, 1, 1]
    check(place, config)


def test_a_raylet_dies_and_its_node_is_done_without(place):
    with Nodes() as nodes:
        nodes.add(0, cpus=2)
        second = nodes.add(1, cpus=2)
        with Driver(place, CONFIG, nodes.environment, "Slow", address=nodes.address, **NODES) as driver:
            driver.wait_for_step(30)
            (raylet,) = [p for p in psutil.Process(second.pid).children(recursive=True) if p.name() == "raylet"]
            raylet.kill()
            code, said = driver.end()
            assert code == 0, said
            assert "goes on from what was saved last" in said
    assert [group["workers"] for group in groups(place)] == [2, 1]
    check(place, CONFIG)


def test_a_node_whose_device_fails_is_left_out_and_named(place):
    with Nodes() as nodes:
        nodes.environment["BAD_NODE"] = f"{place}/bad"
        for core in (0, 1):
            nodes.add(core, cpus=3)
        one = {"workers": (1, 1), "zero_stage": 2, "restarts": 0, "log_ids": True}
        with Driver(place, CONFIG, nodes.environment, "Sore", address=nodes.address, **one) as driver:
            code, said = driver.end(240)
            assert code == 0, said
    bad = (place / "bad").read_text()
    assert f"Node {bad} is left out for now, since groups of workers fell there." in said
    assert "CUDA error: an illegal memory access was encountered Training goes on" in said
    assert len(groups(place)) == 2
    assert bad not in groups(place)[1]["on"]
    check(place, CONFIG)


def test_a_store_on_s3_that_is_away_when_it_is_read_and_when_it_is_written(s3, s3_server):
    """For three seconds when the feed opens its shards, and for ten from a save on; then a worker is killed."""
    begun, reads, saves, refused = [], [], [], []

    def script(method, path, count):
        now, of_rows = time.monotonic(), "/rows/shards/" in path
        if "/out/ids/" in path:  # workers are there: who reads rows from now on is the feed
            begun.append(now)
        if begun and of_rows:
            reads.append(now)
        if "000000040" in path:
            saves.append(now)
        if not (saves and now - saves[0] < 10) and not (of_rows and reads and now - reads[0] < 3):
            return None
        refused.append((method, of_rows))
        return "503"

    toy.write_rows(f"{s3}/rows")
    with Proxy(s3_server, script=script) as proxy:
        with Driver(s3, CONFIG, {"AWS_ENDPOINT_URL": proxy.url}, "Slow", **PAIR) as driver:
            driver.wait_for_step(120)
            driver.workers()[1].kill()
            code, said = driver.end(240)
        assert code == 0, said
    assert len(storage.list_names(f"{s3}/out/ids")) > 1, "another group followed"
    assert ("PUT", False) in refused
    assert any(of_rows for _, of_rows in refused)
    check(s3, CONFIG)
