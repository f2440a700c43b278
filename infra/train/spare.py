"""Spare processes: they have loaded what a group takes, and wait, so that the next group need not start its own.

Most of a new group's start would be imports: of its workers, of the tasks that feed them, and of Ray Train's helpers.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

SECONDS = 1800  # that a spare is kept, unless it is asked for anew; Ray ends it with the job, too
# Ray calls the function of this name, where there is one, when a process has started, before it is given work.
VARIABLES = {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "infra.train.spare.load"}
HELPERS = 2  # of Ray Train, beside the driver: its controller, and one that it starts


def load() -> None:
    """Import what a process of a group will want; what goes wrong is told where it is wanted."""
    with suppress(Exception):
        import infra.train.feed
        import infra.train.prepare
        import infra.train.trainer
        import infra.train.worker

        if os.environ.get("DS_ACCELERATOR") == "cpu":  # else DeepSpeed looks for GPUs before Ray has dealt them out
            import infra.train.zero  # noqa: F401


def ask(nodes: list[str], environment: str, tasks: int, goes_on: Callable[[], bool]) -> None:
    """Have a spare for each process of a group that is at work, on the node where that is.

    nodes: of its workers, one entry a worker; environment: Ray's description of their environment, by which it finds a
    process that fits; tasks: that feed each of them. What the group took is replaced; a spare that is not taken stays.
    They are asked for one after another, `goes_on()` in between, until it says no: a node that is asked for more than
    it starts at a time forgets the others.
    """
    import ray

    context = ray.get_runtime_context()
    # Ray compares descriptions letter by letter, and writes one that a job does not add to with spaces.
    plain = context.get_runtime_env_string() in ("", "{}")
    helpers = json.dumps(json.loads(environment)) if plain else environment
    wanted = Counter({(node, environment): count * (1 + tasks) for node, count in Counter(nodes).items()})
    wanted[context.get_node_id(), helpers] += HELPERS
    while wanted and goes_on():
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for node, described in wanted:
            if node in alive:
                _start(alive[node], described)
        wanted -= Counter(list(wanted))


def _start(node: dict[str, Any], environment: str) -> None:
    """Tell a node's raylet to start one; there is no way to it by Ray's Python API."""
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    messages: Any = import_module("ray.core.generated.node_manager_pb2")
    request = messages.PrestartWorkersRequest(  # in Python, as all that is not said
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        keep_alive_duration_secs=SECONDS,
        num_workers=1,
    )
    request.runtime_env_info.serialized_runtime_env = environment
    channel: Any = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    with channel:
        NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=10)
