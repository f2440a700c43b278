"""What hardware a run may use; nothing in here changes a result, so nothing in here is part of a fingerprint."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from infra import device
from infra.private import ensure_token, loopback


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Workers that train, actors that run stages, and how ZeRO spreads a model over the workers."""

    name: str
    workers: tuple[int, int] = (1, 1)  # training workers, at least and at most
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    threads_per_worker: int = 1
    rows_per_worker: int = 1  # of a training step, at least: another worker is not worth its start for fewer
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "optimizer", "parameters"] = "none"  # what GPU workers keep in their node's memory instead
    recompute: bool = False  # activations of repeated blocks are computed again in the backward pass: time for memory
    feed_tasks: int = 1  # tasks that read, decode and collate at a time for one worker
    max_requests: int = 0  # to a served captioner, of this run; 0: as many as there are captions
    max_tokens: int = 0  # that it reads and writes for this run, likewise
    token_prices: tuple[float, float] = (0.0, 0.0)  # of a million that it reads, and that it writes, in your money
    micro_batch: int = 0  # rows a worker takes through the model at once, at most; 0: its whole share, if that fits
    restarts: int = 3  # of a training, in a row and without a checkpoint in between, before it is given up
    stall_seconds: float = 100  # without a step or a word of a worker, until all start anew; half: until it is said
    grow_seconds: float = 30  # that a group trains at least before it makes room for workers that have come
    track: tuple[Literal["mlflow", "wandb"], ...] = ()  # who is told the scalars of a training, beside TensorBoard
    held_out: int = 512  # rows on which checkpoints are measured while they are trained, beside it; 0: none are
    log_ids: bool = False  # which rows each training step used is written down, beside the checkpoints
    actors: tuple[int, int] = (1, 2)  # actors of a stage, at least and at most
    cpus_per_actor: float = 1
    gpus_per_actor: float = 0
    address: str | None = None  # of a running Ray cluster; None starts one on this machine

    def __post_init__(self) -> None:
        for name in ("workers", "actors"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} are given as (at least, at most), 1 or more; found ({low}, {high}).")
        if self.rows_per_worker < 1:
            raise ValueError(f"rows_per_worker must be at least 1, but it is {self.rows_per_worker}.")
        if self.micro_batch < 0:
            raise ValueError(f"micro_batch must be 0 (the whole share) or more, but it is {self.micro_batch}.")
        if self.restarts < 0 or self.grow_seconds < 0 or not self.stall_seconds > 0:
            raise ValueError("restarts and grow_seconds must not be negative, and stall_seconds must be positive.")
        if self.held_out < 0:
            raise ValueError(f"held_out must be 0 (no row is measured) or more, but it is {self.held_out}.")
        if self.offload != "none":
            if not self.gpus_per_worker:
                raise ValueError(
                    f"offload='{self.offload}' moves state from GPUs to their node's memory, but gpus_per_worker=0: "
                    "leave offload at 'none', or give each worker a GPU."
                )
            needed = 3 if self.offload == "parameters" else 1
            if self.zero_stage < needed:
                raise ValueError(
                    f"offload='{self.offload}' needs ZeRO stage {needed} or more, but zero_stage={self.zero_stage}: "
                    "raise the stage, or offload less."
                )

    @property
    def worker_resources(self) -> dict[str, float]:
        """What a training worker holds of its node."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})

    def workers_for(self, batch: int) -> tuple[int, int]:
        """Training workers, at least and at most, that share a global batch of so many rows."""
        most = max(1, batch // self.rows_per_worker)
        return min(self.workers[0], most), min(self.workers[1], most)

    def micro_batches(self, batch: int, workers: int, most: int = 0) -> tuple[int, int]:
        """How one of so many workers takes its share of a global batch: rows at once, and how often.

        `most` is a further limit of these rows; 0: none.
        """
        share = -(-batch // workers)
        rows = min(self.micro_batch or share, most or share, share)
        return rows, -(-share // rows)

    def check(self, precision: str, whole_weights: bool = False) -> None:
        """Raises ValueError where these workers cannot train in `precision`, or not with all weights on each."""
        if precision == "fp16" and not self.gpus_per_worker:
            raise ValueError(
                f"fp16 is for GPUs, but the workers of cluster '{self.name}' have none: train in bf16 or fp32, or "
                "choose a cluster with gpus_per_worker=1."
            )
        if whole_weights and self.zero_stage == 3:
            raise ValueError(
                "zero_stage=3 leaves each worker a part of the weights, but models that train in turns, as a tokenizer "
                "and its critic, compute with each other's: give --cluster.zero-stage 2 or less."
            )

    @property
    def backend(self) -> str:
        """What workers talk over; what they agree on beside the gradients lies in the CPU's memory."""
        return "cpu:gloo,cuda:nccl" if self.gpus_per_worker else "gloo"


def laptop() -> Cluster:
    """This machine's cores: one training worker a core, two at most, and as many actors."""
    count = min(2, os.cpu_count() or 1)
    return Cluster(name="laptop", workers=(count, count), rows_per_worker=16, actors=(count, count))


def one_gpu() -> Cluster:
    """One machine with one GPU."""
    return Cluster(
        name="one_gpu", cpus_per_worker=2, gpus_per_worker=1, threads_per_worker=4, feed_tasks=4, gpus_per_actor=1,
    )  # fmt: skip


def one_node() -> Cluster:
    """One machine with eight GPUs."""
    return Cluster(
        name="one_node", workers=(8, 8), cpus_per_worker=4, gpus_per_worker=1, threads_per_worker=4, feed_tasks=4,
        zero_stage=2, actors=(1, 8), gpus_per_actor=1,
    )  # fmt: skip


def elastic() -> Cluster:
    """A Ray cluster whose GPU nodes come and go."""
    return Cluster(
        name="elastic", workers=(1, 64), cpus_per_worker=4, gpus_per_worker=1, threads_per_worker=4, feed_tasks=4,
        zero_stage=2, actors=(1, 64), gpus_per_actor=1, address="auto",
    )  # fmt: skip


CLUSTERS = {cluster.__name__: cluster for cluster in (laptop, one_gpu, one_node, elastic)}


def this_machine() -> Cluster:
    """What is taken if nothing is said: all GPUs of this machine, which is told, or `laptop` where it has none."""
    gpus = device.count()
    if not gpus:
        return laptop()
    found = "a GPU, and trains on it" if gpus == 1 else f"{gpus} GPUs, and trains with a worker on each"
    print(f"This machine has {found}; --cluster laptop leaves GPUs alone.", file=sys.stderr, flush=True)
    if gpus == 1:
        return one_gpu()
    cpus = max(1, min(4, (os.cpu_count() or 1) // gpus))  # of Ray's two a core: what feeds the workers needs some, too
    workers = {"workers": (gpus, gpus), "cpus_per_worker": cpus, "threads_per_worker": cpus, "feed_tasks": cpus}
    return replace(one_node(), name="this_machine", actors=(1, gpus), **workers)


def logical_cpus() -> int:
    """That Ray has where it is started here: more than cores, since on two some plans of Ray Data wait for ever."""
    return max(8, 2 * (os.cpu_count() or 1))


def connect(cluster: Cluster, workers: int = 0) -> None:
    """Join the Ray cluster, or start one on this machine, on which so many `workers` at least are to train.

    Does nothing where that is done already. What is started here listens on loopback alone, and asks for a token
    (`docs/security.md`). Raises RuntimeError where Ray cannot be joined, or does not start, and ValueError where it
    would start on this machine, which has no GPU for those that are to have one.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    import ray  # slow to import: `--help` and `plan` do without

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its files keep the rest; on a terminal it is noise
    if cluster.address:
        sentence = f"The Ray cluster at {cluster.address} could not be joined. Is it up, and is its token set here?"
        with _told(lambda _: sentence):
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        return
    wanted = (cluster.workers[0] * cluster.gpus_per_worker, cluster.actors[0] * cluster.gpus_per_actor)
    least = workers * cluster.gpus_per_worker or min(filter(None, wanted), default=0)
    if least and (found := device.count()) < least:
        raise ValueError(
            f"Cluster '{cluster.name}' asks for GPUs, and Ray finds {found} on this machine of the {least:g} that it "
            "needs. See what `nvidia-smi` and CUDA_VISIBLE_DEVICES say, or choose another --cluster, such as laptop."
        )
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # else a process for each logical CPU
    ensure_token()
    with _told(_not_started), _silent(), loopback(), _apart():
        ray.init(
            address="local",  # never somebody else's cluster on this machine
            num_cpus=logical_cpus(),
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=2**30,
            logging_level=logging.ERROR,
        )


def _not_started(error: Exception) -> str:
    """What it means that Ray raised this as it started."""
    if "AF_UNIX path" in str(error):
        return "Ray did not start: its sockets would have too long a path. Give it a shorter folder: RAY_TMPDIR=/tmp."
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return "Ray did not start on this machine."
    return "Ray did not start on this machine, which may have too much to do. Give the same command again."


@contextmanager
def _told(sentence: Callable[[Exception], str]) -> Iterator[None]:
    """Ray raises bare exceptions of many lines where a node is late; a user is told what it means."""
    try:
        yield
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise RuntimeError(f"{sentence(error)} ({type(error).__name__}: {first})") from error


@contextmanager
def _apart() -> Iterator[None]:
    """Ray's processes that are started in here are in sessions of their own, and so is what they start.

    What signals this process's group, as a terminal's Ctrl-C and `timeout` do, must not end them while something is
    being saved on them. They end with this process all the same: the kernel sees to it.
    """
    from ray._private import services

    before = services.ConsolePopen
    services.ConsolePopen = partial(before, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = before


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the C++ core writes to standard error, past Python; a failure still raises."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
