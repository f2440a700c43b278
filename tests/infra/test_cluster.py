"""A Cluster says how many workers share a batch, and refuses what cannot be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.cluster import CLUSTERS, Cluster


@given(st.integers(1, 8), st.integers(0, 8), st.integers(1, 64), st.integers(1, 512))
def test_a_worker_has_rows_enough_or_is_alone(low, more, rows, batch):
    cluster = Cluster(name="test", workers=(low, low + more), rows_per_worker=rows)
    least, most = cluster.workers_for(batch)
    assert 1 <= least <= most <= low + more
    assert most == 1 or batch // most >= rows
    if batch >= rows * (low + more):
        assert (least, most) == cluster.workers


@pytest.mark.parametrize(
    "wrong", [{"workers": (0, 1)}, {"workers": (2, 1)}, {"actors": (0, 0)}, {"rows_per_worker": 0}, {"micro_batch": -1}]
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Cluster(name="test", **wrong)


def test_every_named_cluster_stands():
    for name, make in CLUSTERS.items():
        assert make().name == name
