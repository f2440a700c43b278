"""Where training workers could sit now: placement groups of one worker each, which are demand to an autoscaler, too."""

import random
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

SETTLE_SECONDS = 2.0  # without another seat: what there is, is taken
WAIT_SECONDS = 10.0  # until it is said that training waits, and too few seats are given back
LOOK_SECONDS = 0.2


class Seats:
    """Asks the cluster for places for so many workers; a place that is found is held until `free`.

    Nodes that are being drained, or that do not answer any more, give none, whether Ray has marked them yet or not.
    """

    def __init__(self, resources: dict[str, float], count: int) -> None:
        # Beside a worker's own resources, a CPU somewhere for the tasks that feed it: a full cluster would starve them.
        bundles = [resources, {"CPU": 1}]
        self._asked = [placement_group(bundles, strategy="PACK") for _ in range(count)]
        self._found: dict[PlacementGroup, str] = {}

    def found(self) -> list[str]:
        """The nodes of the places found so far, one entry a place."""
        for group in self._asked:
            if group not in self._found:
                # Not `group.ready()`: that is a task, which needs a process to start in each place.
                told: Any = placement_group_table(group)
                if told.get("state") == "CREATED":
                    self._found[group] = told["bundles_to_node_id"][0]
        return list(self._found.values())

    def free(self) -> None:
        """Give all places back, and ask no more."""
        for group in self._asked:
            remove_placement_group(group)


def take(
    resources: dict[str, float], low: int, high: int, waiting: Callable[[int], None], stopped: Callable[[], bool]
) -> list[str]:
    """The nodes where `low` to `high` workers can start now, one entry a worker; waits until there are `low`.

    `waiting(found)` is called while it waits, and what it holds is given back for a moment: two trainings that each
    hold a part of what both want would wait for ever. Returns fewer than `low` only where `stopped()`.
    """
    seats = Seats(resources, high)
    found: list[str] = []
    since = time.monotonic()
    try:
        while len(found) < high and not stopped():
            now = seats.found()
            if len(now) > len(found):
                found, since = now, time.monotonic()
            if len(found) >= low and time.monotonic() - since > SETTLE_SECONDS:
                break
            if len(found) < low and time.monotonic() - since > WAIT_SECONDS:
                waiting(len(found))
                seats.free()
                time.sleep(random.uniform(0, SETTLE_SECONDS))
                seats, found, since = Seats(resources, high), [], time.monotonic()
            time.sleep(LOOK_SECONDS)
        return found
    finally:
        seats.free()


def alive() -> frozenset[str]:
    """Ray's ids of the nodes that are there."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def draining() -> set[str]:
    """Ray's ids of the nodes that have been told to go."""
    from ray._private.state import state  # what Ray Train itself asks; there is no public way without a dashboard

    return set(state.get_draining_nodes() or {})
