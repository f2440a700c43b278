"""The feed gives each worker its rows, from any step on, and leaves the processor to the trainer."""

import time
from itertools import islice

import pytest
import torch

from infra.data.shards import count_rows
from infra.train.feed import Feed
from infra.train.plan import BatchPlan
from tests.infra.train import toy


@pytest.fixture
def feed(ray_cluster, tmp_path):
    toy.write_rows(f"{tmp_path}/rows")
    inputs, task = [f"{tmp_path}/rows"], toy.Toy()
    counts = count_rows(inputs, task.where, task.where_reads)

    def build(steps, rank=0, world=1, micro_batch=5, micro_steps=2, batch=10):
        plan = BatchPlan(list(counts.values()), batch, 0, 2)
        return Feed(task, inputs, list(counts), plan, steps, rank, world, micro_batch, micro_steps)

    return build


@pytest.mark.timeout(120)
def test_it_gives_what_the_plan_says_from_any_step_on(feed):
    steps = 150  # more than one segment
    whole = list(feed(steps)(0))
    config = toy.TrainConfig(steps=steps, batch=10, seed=0)
    wanted = list(toy.feed(config, 0, 1, 2)(0))
    assert len(whole) == len(wanted) == steps
    for ours, theirs in zip(whole, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a["ids"], b["ids"])
            assert torch.equal(a["weight"], b["weight"])
    late = list(feed(steps)(137))
    assert len(late) == 13
    assert all(torch.equal(a[1]["ids"], b[1]["ids"]) for a, b in zip(late, whole[137:], strict=True))


@pytest.mark.timeout(120)
def test_workers_share_the_batch(feed):
    together = [next(feed(1, rank, 3, 4, 1)(0))[0] for rank in range(3)]
    ids = torch.cat([part["ids"][part["weight"] > 0] for part in together])
    alone = torch.cat([part["ids"] for part in next(feed(1)(0))])
    assert torch.equal(ids, alone)


@pytest.mark.timeout(120)
def test_a_feed_that_is_ahead_does_not_spin(feed):
    # A Ray Data execution under backpressure takes a whole core of the process that runs it.
    batches = feed(20_000)(0)
    list(islice(batches, 3))
    time.sleep(4)
    started = time.process_time()
    time.sleep(3)
    assert time.process_time() - started < 1
