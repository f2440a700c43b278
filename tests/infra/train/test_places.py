"""Places on a cluster that has just enough of them: for one of two trainings, or for a worker on each node."""

import pytest

from benchmarks.nodes import Nodes
from tests.infra.train import toy
from tests.infra.train.drive import Driver, check, groups

CONFIG = {"steps": 200, "batch": 10, "log_every_steps": 5, "save_every_steps": 100}
pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]


def test_both_end_though_each_wants_what_the_other_holds(tmp_path):
    """A worker takes two of four CPUs, its feed's among them, and each training at least two workers."""
    cluster = {"workers": (2, 3), "zero_stage": 2, "log_ids": True}
    for name in ("one", "two"):
        toy.write_rows(f"{tmp_path}/{name}/rows")
    with Nodes() as nodes:
        nodes.add(1, cpus=4)
        drivers = [
            Driver(tmp_path / name, CONFIG, nodes.environment, address=nodes.address, **cluster)
            for name in ("one", "two")
        ]
        with drivers[0], drivers[1]:
            for driver in drivers:
                code, said = driver.end(300)
                assert code == 0, said
    for name in ("one", "two"):
        assert {group["workers"] for group in groups(tmp_path / name)} == {2}
        check(tmp_path / name, CONFIG)


def test_the_cpu_for_the_feed_is_not_held_where_a_worker_is_to_sit(tmp_path):
    """Of the two nodes that have just room for a worker of four CPUs each, one has two more."""
    toy.write_rows(f"{tmp_path}/rows")
    config = {"steps": 20, "batch": 10, "log_every_steps": 5, "save_every_steps": 20}
    cluster = {"workers": (2, 3), "cpus_per_worker": 4, "zero_stage": 2, "log_ids": True}
    with Nodes() as nodes:
        nodes.add(0, cpus=4)
        nodes.add(1, cpus=6)
        with Driver(tmp_path, config, nodes.environment, address=nodes.address, **cluster) as driver:
            code, said = driver.end(120)
            assert code == 0, said
    assert [group["why"] for group in groups(tmp_path)] == ["all was trained"]
    check(tmp_path, config)
