"""What a Ray cluster has, and what a run could never get from it."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

from infra import device
from infra.cluster import Cluster, logical_cpus

WITHOUT_VLLM = "vLLM is not installed; install rescribe[vllm], or caption through an endpoint that has it."

_FUZZ = 1e-6  # ten workers of 0.1 CPUs fit on one CPU


@dataclass(frozen=True, kw_only=True)
class Node:
    """One living machine of a cluster; resources are totals, whoever uses them now."""

    name: str
    host: str | None = None  # its own name for itself; None until it has reported
    cpus: float = 0
    gpus: float = 0
    free_gb: float | None = None  # of the disk that Ray spills and unpacks to; None: not known
    head: bool = False
    python: str | None = None  # absolute path of the interpreter that its workers run; None until it has reported

    def room(self, cpus: float, gpus: float) -> int:
        """How many workers of so many CPUs and GPUs fit on it."""
        asked = [(self.cpus, cpus), (self.gpus, gpus)]
        return min((floor(has / wants + _FUZZ) for has, wants in asked if wants > 0), default=2**31)


def missing(
    cluster: Cluster, nodes: Sequence[Node], *, batches: Sequence[int], decodes: bool, free_gb: float
) -> list[str]:
    """What would have to be there for a run to be able to start, a sentence each; empty where nothing is missing.

    `batches` are the global batches (in rows) that the run trains with, none if it does not train; `decodes`: its
    actors hold models and take the GPUs that the Cluster gives an actor. A worker needs its CPUs and GPUs on one node.
    """
    wanted = []
    if batches:
        workers = max(cluster.workers_for(batch)[0] for batch in batches)
        # Training never ends where its workers hold every CPU: the tasks that feed them need one.
        wanted.append(("training worker", workers, cluster.cpus_per_worker, cluster.gpus_per_worker, 1))
    wanted.append(("actor", cluster.actors[0], cluster.cpus_per_actor, cluster.gpus_per_actor if decodes else 0, 0))
    sentences = []
    for what, count, cpus, gpus, spare in wanted:
        room = sum(node.room(cpus, gpus) for node in nodes)
        each = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        if room < count:
            sentences.append(f"It needs at least {count} {what}s of {each} each, and there is room for {room}.")
        elif sum(node.cpus for node in nodes) + _FUZZ < count * cpus + spare:
            sentences.append(f"It needs {count} {what}s of {each} each and 1 CPU beside them that prepares batches.")
    for node in nodes:
        if node.free_gb is not None and node.free_gb < free_gb:
            sentences.append(f"Node {node.name} has {node.free_gb:.1f} GB of disk left, less than {free_gb:g}.")
    return sentences


def lacks_here(cluster: Cluster, batches: Sequence[int], decodes: bool) -> list[str]:
    """What is `missing` where Ray is started on this machine, in a sentence; of a cluster that is joined, nothing."""
    if cluster.address:
        return []
    asks = cluster.gpus_per_worker or cluster.gpus_per_actor  # to count GPUs takes a second
    here = Node(name="here", cpus=logical_cpus(), gpus=device.count() if asks else 0)
    found = missing(cluster, [here], batches=batches, decodes=decodes, free_gb=0)
    if not found:
        return []
    advice = "See what `nvidia-smi` and CUDA_VISIBLE_DEVICES say, or choose" if asks else "Choose"
    return [
        f"This machine ({here.cpus:g} logical CPUs and {here.gpus:g} GPUs) has no room for the cluster "
        f"'{cluster.name}'. {' '.join(found)} {advice} another --cluster, such as laptop."
    ]


def has_vllm() -> bool:
    """Whether vLLM is installed here."""
    return importlib.util.find_spec("vllm") is not None


def inventory(nodes: Sequence[Node]) -> str:
    """The nodes in a phrase."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''} with {cpus:g} CPUs and {gpus:g} GPUs"
