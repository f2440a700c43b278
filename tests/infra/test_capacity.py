"""What a cluster lacks is what no placement could give: held against a search over all placements."""

from hypothesis import given, settings
from hypothesis import strategies as st

from infra.capacity import Node, inventory, missing
from infra.cluster import CLUSTERS, Cluster

NODES = st.lists(st.builds(Node, name=st.just("n"), cpus=st.integers(0, 4), gpus=st.integers(0, 3)), max_size=3)


def fits(count, cpus, gpus, free):
    """Whether so many workers can be placed, by trying every node for the next one."""
    if count == 0:
        return True
    for place, (has_cpus, has_gpus) in enumerate(free):
        if has_cpus >= cpus and has_gpus >= gpus:
            left = (has_cpus - cpus, has_gpus - gpus)
            if fits(count - 1, cpus, gpus, [*free[:place], left, *free[place + 1 :]]):
                return True
    return False


@settings(max_examples=200, deadline=None)
@given(NODES, st.integers(1, 4), st.sampled_from([0.5, 1, 2, 3]), st.sampled_from([0, 0.5, 1, 2]))
def test_actors_are_missing_where_no_placement_holds_them(nodes, count, cpus, gpus):
    cluster = Cluster(name="test", actors=(count, count), cpus_per_actor=cpus, gpus_per_actor=gpus)
    free = [(node.cpus, node.gpus) for node in nodes]
    for decodes in (True, False):
        lacks = missing(cluster, nodes, batches=[], decodes=decodes, free_gb=0)
        assert bool(lacks) != fits(count, cpus, gpus if decodes else 0, free)


def test_ten_tenths_fit_on_one():
    cluster = Cluster(name="test", actors=(10, 10), cpus_per_actor=0.1)
    assert missing(cluster, [Node(name="n", cpus=1)], batches=[], decodes=True, free_gb=0) == []


def test_training_wants_a_cpu_for_its_feed_and_only_as_many_workers_as_a_batch_feeds():
    cluster = Cluster(name="test", workers=(2, 2), rows_per_worker=16)
    two = [Node(name="n", cpus=2)]
    (said,) = missing(cluster, two, batches=[32, 16], decodes=False, free_gb=0)
    assert "1 CPU beside them" in said
    assert missing(cluster, two, batches=[16], decodes=False, free_gb=0) == []
    assert missing(cluster, two, batches=[], decodes=False, free_gb=0) == []
    assert missing(cluster, [*two, Node(name="m", cpus=1)], batches=[32], decodes=False, free_gb=0) == []


def test_full_disks_are_named_and_unknown_ones_are_not():
    nodes = [Node(name="full", cpus=8, free_gb=0.4), Node(name="silent", cpus=8), Node(name="empty", free_gb=90)]
    (said,) = missing(Cluster(name="test"), nodes, batches=[], decodes=False, free_gb=1)
    assert said == "Node full has 0.4 GB of disk left, less than 1."


def test_named_clusters_against_their_own_hardware():
    node = Node(name="n", cpus=64, gpus=8)
    for make in CLUSTERS.values():
        assert missing(make(), [node], batches=[256], decodes=True, free_gb=1) == []
    lacks = missing(CLUSTERS["one_node"](), [Node(name="n", cpus=64, gpus=4)], batches=[256], decodes=True, free_gb=1)
    assert "8 training workers of 4 CPU and 1 GPU each, and there is room for 4" in " ".join(lacks)
    assert inventory([node, node]) == "2 nodes with 128 CPUs and 16 GPUs"
    assert inventory([]) == "0 nodes with 0 CPUs and 0 GPUs"
