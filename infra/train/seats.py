"""Where training workers could sit now: placement groups, which are demand to an autoscaler, too."""

import time
from collections.abc import Callable
from contextlib import ExitStack
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
    """Asks the cluster for places for workers; a place that is found is held until `free`.

    Nodes that are being drained, or that do not answer any more, give none, whether Ray has marked them yet or not;
    nor do those that are left out.
    """

    def __init__(self, resources: dict[str, float], left_out: frozenset[str] = frozenset()) -> None:
        self._resources = resources  # of a worker
        self.left_out = left_out  # Ray's ids of nodes
        self._asked: list[PlacementGroup] = []
        self._found: dict[PlacementGroup, list[str]] = {}  # the node of each bundle

    def ask(self, count: int, together: int = 1) -> None:
        """For so many places more, or so many times some that are held only once all of them are there."""
        elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(self.left_out))})"}
        for _ in range(count):
            # With each a CPU somewhere for the tasks that feed it: a full cluster would starve them.
            places = [self._resources, {"CPU": 1}] * together
            where: Any = [elsewhere, {}] * together if self.left_out else None
            self._asked.append(placement_group(places, strategy="PACK", bundle_label_selector=where))

    def found(self) -> list[str]:
        """The nodes of the places found so far, one entry a place."""
        for group in self._asked:
            if group not in self._found:
                # Not `group.ready()`: that is a task, which needs a process to start in each place.
                told: Any = placement_group_table(group)
                if told.get("state") == "CREATED":
                    self._found[group] = [node for _, node in sorted(told["bundles_to_node_id"].items())]
        return [node for nodes in self._found.values() for node in nodes[::2]]

    def feeders(self) -> list[str]:
        """The nodes of the CPUs that were found beside, one entry a place."""
        return [node for nodes in self._found.values() for node in nodes[1::2]]

    def free(self) -> None:
        """Give all places back, and wait for none."""
        for group in self._asked:
            remove_placement_group(group)
        self._asked, self._found = [], {}


def take(
    resources: dict[str, float],
    low: int,
    high: int,
    waiting: Callable[[], None],
    stopped: Callable[[], bool],
    left_out: frozenset[str] = frozenset(),
) -> tuple[list[str], ExitStack]:
    """The nodes where `low` to `high` workers can start now, one entry a worker; waits until there are `low`.

    `waiting()` is called now and then while it waits, and nothing is held meanwhile: else two trainings that each hold
    a part of what both want would wait for ever, and one that runs would have no CPUs to be fed by. Gives fewer than
    `low` only where `stopped()`. Nodes that are `left_out` give places only where no others are found.

    The second is to be closed once the workers sit there: it holds a CPU for what feeds them, or else another training
    might find places before they sit, and both would then have workers and nothing to feed them with.
    """
    seats, waits = Seats(resources, left_out), False
    seats.ask(high)
    found: list[str] = []
    since = time.monotonic()
    try:
        while len(found) < high and not stopped():
            now = seats.found()
            if len(now) > len(found):
                found, since = now, time.monotonic()
            if waits and found:
                waits = False
                seats.ask(high - low)
            if len(found) >= low and time.monotonic() - since > SETTLE_SECONDS:
                break
            if len(found) < low and time.monotonic() - since > WAIT_SECONDS:
                since = time.monotonic()
                if seats.left_out:
                    seats.left_out, found = frozenset(), []
                    seats.free()
                    seats.ask(high)
                    continue
                waiting()
                if not waits:
                    waits, found = True, []
                    seats.free()
                    seats.ask(1, together=low)
            time.sleep(LOOK_SECONDS)
        held = ExitStack()
        for node in seats.feeders()[:1]:  # there, and not where a worker is to sit
            feeder = placement_group([{"CPU": 1}], bundle_label_selector=[{"ray.io/node-id": node}])
            held.callback(remove_placement_group, feeder)
        return found, held
    finally:
        seats.free()


def spared(nodes: frozenset[str], resources: dict[str, float], low: int) -> frozenset[str]:
    """These nodes where the others have places for `low` workers, taken or not; else none of them."""
    if not nodes:
        return nodes
    others = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in nodes]
    wanted = {name: count for name, count in resources.items() if count}
    places = sum(int(min((has.get(name, 0) / count for name, count in wanted.items()), default=0)) for has in others)
    return nodes if places >= low else frozenset()


def alive() -> frozenset[str]:
    """Ray's ids of the nodes that are there."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def draining() -> set[str]:
    """Ray's ids of the nodes that have been told to go."""
    from ray._private.state import state  # what Ray Train itself asks; there is no public way without a dashboard

    return set(state.get_draining_nodes() or {})
