"""Places for workers on a cluster that others use, too."""

import time
from contextlib import contextmanager

import pytest
import ray
from ray.util import placement_group, remove_placement_group

from infra.train import seats

pytestmark = pytest.mark.timeout(60)
FREE = 3


@contextmanager
def taken(cpus, seconds=5.0):
    """So many CPUs are taken within, together; gives whether they could be."""
    others = placement_group([{"CPU": 1}] * cpus)
    yield others.wait(seconds)
    remove_placement_group(others)


@pytest.fixture
def others(ray_cluster, monkeypatch):
    """Placement groups of one CPU each, which leave three."""
    monkeypatch.setattr(seats, "WAIT_SECONDS", 0.5)
    monkeypatch.setattr(seats, "SETTLE_SECONDS", 0.5)
    held = [placement_group([{"CPU": 1}]) for _ in range(int(ray.cluster_resources()["CPU"]) - FREE)]
    assert all(each.wait(20) for each in held)
    yield held
    for each in held:
        remove_placement_group(each)


@pytest.mark.parametrize(("leave", "found"), [(1, 2), (2, 2), (3, 3), (5, 3)])
def test_who_waits_for_places_holds_none(others, leave, found):
    """A worker takes two CPUs, its feed's among them: one would fit, and two to three are wanted."""
    said = []

    def waiting():
        said.append("waits")
        if len(said) == 3:
            with taken(FREE) as possible:
                assert possible, "who waits holds some of it"
            for _ in range(leave):
                remove_placement_group(others.pop())

    nodes, held = seats.take({"CPU": 1}, 2, 3, waiting, lambda: len(said) > 20)
    with held:
        assert nodes == [ray.get_runtime_context().get_node_id()] * found
        assert len(said) >= 3


def test_until_workers_sit_nobody_else_takes_the_cpu_of_their_feed(others):
    nodes, held = seats.take({"CPU": 1}, 1, 2, lambda: None, lambda: False)
    assert len(nodes) == 1
    with held, taken(FREE - 1) as workers, taken(1, 1) as more:
        assert workers
        assert not more
    with taken(FREE) as possible:
        assert possible


def test_a_node_that_is_left_out_gives_places_only_where_there_are_no_others(others, monkeypatch):
    here = frozenset([ray.get_runtime_context().get_node_id()])
    few = seats.Seats({"CPU": 1}, here)
    few.ask(1)
    assert not few.found()
    few.free()
    begun = time.monotonic()
    nodes, held = seats.take({"CPU": 1}, 1, 1, lambda: None, lambda: False, here)
    held.close()
    assert nodes == [*here]
    assert time.monotonic() - begun > seats.WAIT_SECONDS


@pytest.mark.parametrize(("low", "done_without"), [(1, True), (4, True), (5, False)])
def test_nodes_are_done_without_where_the_others_have_places_enough(monkeypatch, low, done_without):
    def node(name, cpus, gpus, alive=True):
        return {"NodeID": name, "Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}

    nodes = [node("bad", 8, 8), node("good", 8, 3), node("busy", 1.5, 9), node("head", 9, 0), node("gone", 8, 8, False)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    wanted = frozenset(["bad"]) if done_without else frozenset()
    assert seats.spared(frozenset(["bad"]), {"CPU": 1, "GPU": 1}, low) == wanted


def test_who_is_told_to_stop_gives_back_what_was_found(others):
    said = []
    nodes, held = seats.take({"CPU": 1}, 2, 3, lambda: said.append("waits"), lambda: bool(said))
    assert len(nodes) < 2
    held.close()
    with taken(FREE) as possible:
        assert possible
