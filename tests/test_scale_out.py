"""Two nodes of one cluster, each processes of its own, share a corpus."""

import pytest

from benchmarks.scale_out import Config, measure


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_nodes_share_the_work_and_do_no_row_twice(tmp_path):
    run = measure(2, Config(samples=800, shard=20, batch=10), str(tmp_path))
    assert run["rows"] == run["accepted"] == sum(run["rows_by_node"]) == 800
    assert len(run["rows_by_node"]) == 2
    assert min(run["rows_by_node"]) >= 20
    assert run["ids_twice"] == 0
    assert run["faults"] == []
