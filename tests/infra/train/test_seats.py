"""Places for workers on a cluster that others use, too."""

import pytest
import ray
from ray.util import placement_group, remove_placement_group

from infra.train import seats

pytestmark = pytest.mark.timeout(60)
FREE = 3


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
            all_of_it = placement_group([{"CPU": 1}] * FREE)
            assert all_of_it.wait(5), "what waits holds some of it"
            remove_placement_group(all_of_it)
            for _ in range(leave):
                remove_placement_group(others.pop())

    nodes = seats.take({"CPU": 1}, 2, 3, waiting, lambda: len(said) > 20)
    assert nodes == [ray.get_runtime_context().get_node_id()] * found
    assert len(said) >= 3


def test_who_is_told_to_stop_gives_back_what_was_found(others):
    said = []
    assert len(seats.take({"CPU": 1}, 2, 3, lambda: said.append("waits"), lambda: bool(said))) < 2
    all_of_it = placement_group([{"CPU": 1}] * FREE)
    assert all_of_it.wait(5)
    remove_placement_group(all_of_it)
