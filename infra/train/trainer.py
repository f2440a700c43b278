"""Ray Train, as a group of workers is run on it; it is slow to import, so `--help` and `plan` do without."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
import ray.train.torch
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.util import get_placement_group, placement_group, remove_placement_group

from infra import device
from infra.cluster import Cluster
from infra.train.meeting import keep_to_loopback

MEET_SECONDS = 120  # in which the workers of a group have to find one another
PLACE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
PLACE_SECONDS = "60"  # that a group waits for places where nobody has looked for them before

# Of Ray Train's controller, which inherits them from here: how often it looks at its workers, and how long it waits for
# a place that was there a moment ago.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault(PLACE, "10")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # draining nodes are seen by the group


def run(
    work: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    cluster: Cluster,
    size: int,
    nodes: list[str],
    variables: dict[str, str],
    begun: Callable[[Any], None],
) -> tuple[Mapping[int, BaseException], bool]:
    """See `work(arguments)` through on so many workers, on `nodes` if any are named, one entry a worker.

    `variables`, and those that say which device it computes on, are added to the environment of every process of the
    group; `begun` is given the actor that controls them, with whose end they end. Returns the failures of the workers
    by rank, -1 for that of all of them, none where it ended well; and whether there were places for them. Nothing is
    tried again here.
    """
    # Ray Train's own run folder holds nothing that is needed again: checkpoints are ours, under `out`. So there is no
    # snapshot of its controller that could be torn.
    scratch = tempfile.mkdtemp(prefix="rescribe-train-")
    name = f"rescribe-{uuid.uuid4().hex}"
    try:
        trainer = _Trainer(
            work,
            train_loop_config=arguments,
            torch_config=_Config(backend=cluster.backend, timeout_s=MEET_SECONDS),
            scaling_config=ray.train.ScalingConfig(
                num_workers=size,
                use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker=cluster.worker_resources,
                # Where there was room a moment ago, not on a node that is dead and that Ray has not missed yet.
                label_selector=[{"ray.io/node-id": node} for node in nodes] or None,
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
            ),
        )
        places = {} if nodes else {PLACE: PLACE_SECONDS}
        trainer.variables = variables | places | device.variables(cluster.gpus_per_worker)
        trainer.begun = begun
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        return {rank: _told(failure) for rank, failure in error.worker_failures.items()}, True
    except ray.train.ControllerError as error:
        if "Timeout" in type(error.controller_failure).__name__:
            return {}, False
        return {-1: error.controller_failure}, True
    except Exception as error:  # whatever befell the controller: the next group has another one
        return {-1: error}, True
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        # Of a group that fails while it starts, or whose controller died, Ray keeps the places until the job ends.
        with suppress(Exception):  # there is none of that name, as where all went well, or no cluster any more
            remove_placement_group(get_placement_group(name))
    return {}, True


class _Workers(WorkerGroup):
    """Their places have the name of the run, by which the driver finds them."""

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> DefaultPlacementGroupHandle:
        places = placement_group(
            [worker_group_context.resources_per_worker] * worker_group_context.num_workers,
            strategy=worker_group_context.placement_strategy,
            name=str(self._train_run_context.get_run_config().name),
            bundle_label_selector=worker_group_context.label_selector,
        )
        return DefaultPlacementGroupHandle(places)


class _Controller(TrainController):
    worker_group_cls = _Workers


class _Backend(ray.train.torch.TorchConfig().backend_cls):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(device.take, float("cuda" in backend_config.backend))
        worker_group.execute(keep_to_loopback)
        super().on_start(worker_group, backend_config)


class _Config(ray.train.torch.TorchConfig):
    backend_cls: Any = _Backend


class _Trainer(ray.train.torch.TorchTrainer):
    """With what `run` is given, and without two processes: ours come by the feed, and `run` itself frees the places.

    One would split datasets over workers, the other frees places after a controller that died.
    """

    variables: dict[str, str]
    begun: Callable[[Any], None]

    def _create_default_callbacks(self) -> list[Any]:
        left_out = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, left_out)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        environment = {"env_vars": get_env_vars_to_propagate() | self.variables}
        start: Any = ray.remote(num_cpus=0, label_selector=here, runtime_env=environment)(_Controller).remote
        controller = start(**arguments)
        self.begun(controller)
        try:
            ray.get(controller.run.remote())
            return ray.get(controller.get_result.remote())
        finally:
            ray.kill(controller)  # it lives for as long as somebody knows it


def _told(failure: BaseException) -> BaseException:
    """What the worker raised, out of what Ray Train wraps it in."""
    return getattr(failure, "_base_exc", failure)
