"""The feed gives each worker its rows, from any step on, and leaves the processor to the trainer."""

import os
import re
import time
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from infra.data.images import decode, encode_png
from infra.data.ledger import commit
from infra.data.shards import count_rows
from infra.train import feed as feed_module
from infra.train import prepare
from infra.train.draw import uniforms
from infra.train.feed import Feed
from infra.train.ids import check, row_ids
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
    steps = 150  # more than one execution
    whole = list(feed(steps)(0))
    config = toy.TrainConfig(steps=steps, batch=10, seed=0)
    wanted = list(toy.feed(config, 0, 1, 2)(0))
    assert len(whole) == len(wanted) == steps
    for ours, theirs in zip(whole, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a["ids"], b["ids"])
            assert torch.equal(a["weight"], b["weight"])
            a["ids"] += 1  # batches are the trainer's own
            a["ids"] -= 1
    used = {step: torch.cat([batch["id"] for batch in batches]).tolist() for step, batches in enumerate(whole)}
    source = feed(steps)
    assert check(used, source.plan, row_ids(source.inputs, source.shards, source.task)) == 30
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
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_feed_that_is_ahead_waits_and_does_not_spin(feed, monkeypatch, tasks):
    # A Ray Data execution under backpressure of its own takes a whole core of the process that runs it.
    monkeypatch.setattr(feed_module, "CHUNK_BYTES", 4096)
    source = replace(feed(2000), tasks=tasks)
    batches = source(0)
    size = sum(array.nbytes for part in next(batches) for array in part.values())
    list(islice(batches, 30))
    with monkeypatch.context() as patched:
        patched.setattr(feed_module, "PATIENCE", 3)  # with tasks that run, not with a trainer that needs nothing
        time.sleep(4)
        started = time.process_time()
        time.sleep(3)
        assert time.process_time() - started < 1
    # A chunk for each task may lie ready and one be under way, and the trainer's end holds some.
    assert 0 < source.prepared() <= (3 * tasks + 4) * 4096 / size
    assert len(list(islice(batches, 200))) == 200


@pytest.mark.timeout(120)
def test_a_feed_of_small_batches_prepares_what_is_wanted_soon(feed):
    # As many of them as take the bytes of large ones would keep a core busy for minutes.
    source = feed(200_000)
    batches = source(0)
    for _ in range(400):
        next(batches)
        time.sleep(0.02)
    assert 0 < source.prepared() < 4000


@pytest.mark.timeout(120)
def test_no_order_depends_on_where_executions_are_cut(feed, monkeypatch):
    wanted = torch.cat([part["id"] for step in feed(90)(3) for part in step])
    monkeypatch.setattr(feed_module, "PLAN_ROWS", 70)  # of steps of 10: seven to an execution
    for module in (prepare, feed_module):
        monkeypatch.setattr(module, "READ_ROWS", 20)
    found = torch.cat([part["id"] for step in replace(feed(90), tasks=2)(3) for part in step])
    assert torch.equal(found, wanted)


class Draws(toy.Toy):
    def collate(self, rows, draw):
        return {"coin": draw("coin"), "die": draw("die")}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("world", "micro_steps"), [(1, 3), (2, 1), (3, 2)])
def test_a_draw_is_a_function_of_seed_epoch_row_and_name(feed, monkeypatch, world, micro_steps):
    """Over workers, micro-steps, two epochs of which a batch holds rows of both, and executions that are cut."""
    monkeypatch.setattr(feed_module, "PLAN_ROWS", 70)  # of steps of 7: ten to an execution
    monkeypatch.setattr(feed_module, "READ_ROWS", 20)
    steps, batch, seed = 15, 7, 5
    found = [{"id": [], "coin": [], "die": []} for _ in range(steps)]
    for rank in range(world):
        source = feed(steps, rank, world, -(-batch // world), micro_steps, batch)
        plan = replace(source.plan, seed=seed)
        for step, micro_batches in zip(found, replace(source, task=Draws(), plan=plan)(0), strict=True):
            for name, values in step.items():
                values += [value for part in micro_batches for value in part[name][part["weight"] > 0].tolist()]
    rows = plan.steps(0, steps)
    epochs = np.arange(steps * batch) // toy.ROWS
    ids = (rows.shard * toy.ROWS + rows.row).astype(np.uint64)
    assert len(set(zip(ids[epochs < 2], epochs[epochs < 2], strict=True))) == 2 * toy.ROWS
    assert [value for step in found for value in step["id"]] == ids.tolist()
    for name in ("coin", "die"):
        wanted = [uniforms(seed, epochs[i : i + 1], ids[i : i + 1], name)[0] for i in range(len(ids))]
        assert [value for step in found for value in step[name]] == wanted
        assert len(set(wanted)) == len(wanted), "an epoch's draws are its own"
    assert found[0]["coin"] != found[0]["die"]


class Raises(toy.Toy):
    def collate(self, rows, draw):
        raise ValueError("the image of sample 77 is lost")


class Dies(toy.Toy):
    def collate(self, rows, draw):
        os._exit(1)


class Claims(toy.Toy):
    def collate(self, rows, draw):
        return super().collate(rows, draw) | {"id": np.zeros(len(rows["row"]))}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("task", "message"), [(Raises, "steps 0 to 9: ValueError: the image of sample 77 is lost"), (Claims, "'id'")]
)
def test_an_error_is_raised_where_the_batch_is_asked_for(feed, task, message):
    with pytest.raises(ValueError, match=message) as error:
        next(replace(feed(10), task=task())(0))
    assert len(str(error.value).splitlines()) == 1, "the message is the task's, without Ray Data's advice"


@dataclass(frozen=True)
class RaisesOn(toy.Toy):
    bad: int = -1

    def collate(self, rows, draw):
        if self.bad in rows["row"]:
            raise ValueError("lost")
        return super().collate(rows, draw)


@pytest.mark.timeout(120)
def test_an_error_in_what_was_begun_ahead_comes_after_all_that_was_good(feed, monkeypatch):
    monkeypatch.setattr(feed_module, "PLAN_ROWS", 35)  # of steps of 5: seven to an execution
    monkeypatch.setattr(feed_module, "READ_ROWS", 5)
    source = feed(10, micro_steps=1, batch=5)
    source = replace(source, task=RaisesOn(bad=int(source.sample_ids(8)[0], 16)))
    wanted = torch.cat([batch["id"] for (batch,) in feed(10, micro_steps=1, batch=5)(0)])
    found = []
    with pytest.raises(ValueError, match="ValueError: lost") as error:
        found.extend(batch["id"] for (batch,) in source(0))
    assert re.search(rf"steps {len(found)} to 9", str(error.value))
    assert len(found) in (7, 8)
    assert torch.equal(torch.cat(found), wanted[: 5 * len(found)])


@pytest.mark.timeout(120)
def test_a_batch_that_is_lost_on_the_way_is_noticed(feed, monkeypatch):
    monkeypatch.setattr(feed_module, "unpack", lambda table: list(prepare.unpack(table))[:-1])
    with pytest.raises(RuntimeError, match="The feed gave nothing for steps"):
        list(feed(10)(0))


@pytest.mark.timeout(240)
def test_processes_that_die_are_not_tried_for_ever(feed, monkeypatch):
    monkeypatch.setattr(feed_module, "RETRIES", 1)
    with pytest.raises(RuntimeError, match="died 2 times on the same rows"):
        next(replace(feed(10), task=Dies())(0))


@pytest.mark.timeout(120)
def test_a_feed_without_a_free_cpu_says_so(feed, monkeypatch):
    monkeypatch.setattr(feed_module, "PATIENCE", 3)
    taken = [ray.util.placement_group([{"CPU": 1}] * 8)]
    try:
        ray.get(taken[0].ready(), timeout=60)
        with pytest.raises(RuntimeError, match="0 of 8 CPUs"):
            next(feed(10)(0))
    finally:
        ray.util.remove_placement_group(taken[0])


@settings(deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=3),
            arrays.arrays(
                st.sampled_from([np.uint8, np.int64, np.float32, bool]), arrays.array_shapes(min_dims=0, min_side=0)
            ),
            min_size=1,
            max_size=3,
        ),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([1, 100, 2**20]),
)
def test_what_is_packed_is_unpacked(batches, size):
    table = pa.concat_tables(prepare.pack(batches, size), promote_options="default")
    for found, wanted in zip(prepare.unpack(table), batches, strict=True):
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
            assert found[name].flags.aligned
            assert found[name].flags.writeable


@pytest.fixture
def opened(monkeypatch):
    """The names of the shards that were opened; two shards stand for all."""
    names = []

    class Counting(prepare.ShardReader):
        def __init__(self, inputs, name):
            names.append(name)
            super().__init__(inputs, f"{int(name) % 2:06d}")

    monkeypatch.setattr(prepare, "ShardReader", Counting)
    return names


def test_starting_late_opens_no_more_than_starting_at_once(tmp_path, opened):
    toy.write_rows(f"{tmp_path}/rows")
    shards = [f"{number:06d}" for number in range(100_000)]
    plan = BatchPlan([toy.ROWS // 2] * len(shards), 10, 0, 4)
    opens = []
    for start in (0, 1_000_000):
        source = Feed(toy.Toy(), [f"{tmp_path}/rows"], shards, plan, start + 40, 0, 1, 10, 1)
        work = prepare.Prepare(source.task, source.inputs, 0, 10, 0, source.key)
        batches = [batch for chunk in source.chunks(start, start + 20, 5) for batch in work.batches(chunk)]
        assert len(batches) == 20
        opens.append(len(opened))
        assert len(set(opened)) == len(opened) <= 12  # three windows at most, and each of their shards once
        opened.clear()
    assert max(opens) - min(opens) <= 4


def test_a_chunk_opens_a_shard_when_its_rows_come(tmp_path, opened, monkeypatch):
    toy.write_rows(f"{tmp_path}/rows")
    monkeypatch.setattr(prepare, "READ_ROWS", 4)
    shard = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    chunk = prepare.Chunk(["000000", "000001"], shard, np.arange(8) % 4, np.zeros(8, int), np.ones(8, np.float32))
    batches = prepare.Prepare(toy.Toy(), [f"{tmp_path}/rows"], 0, 2, 0, "key").batches(chunk)
    seen = [len(opened) for _ in batches]
    assert seen == [1, 1, 2, 2]


class Pictures(toy.Toy):
    def collate(self, rows, draw):
        return {"images": np.stack(rows["pixels"])}


def pictures(folder, images):
    """The batches of two steps of four rows, out of three encoded images."""
    count = len(images)
    columns = {"state": ["accepted"] * count, "reason": pa.nulls(count, pa.string()), "image": images}
    # An ingest is known by where its images lie; copies that it made go first.
    columns |= {"offset": [0] * count, "sample_id": [f"{row:024x}" for row in range(count)]}
    commit(str(folder), "000000", pa.table(columns))
    rows = np.array([0, 1, 2, 0, 2, 1, 0, 0])
    chunk = prepare.Chunk(["000000"], np.zeros(8, int), rows, np.zeros(8, int), np.ones(8, np.float32))
    return list(
        prepare.Prepare(
            Pictures(reads=("pixels",), where_reads=("state",)), [str(folder)], 0, 4, 0, str(folder)
        ).batches(chunk)
    )


def test_pictures_are_decoded_step_by_step_and_each_once_a_step(tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(prepare, "decode", lambda data: decoded.append(data) or decode(data))
    images = [encode_png(np.full((8, 8, 3), value, np.uint8)) for value in (10, 20, 30)]
    first, second = pictures(tmp_path, images)
    assert first["images"][:, 0, 0, 0].tolist() == [10, 20, 30, 10]
    assert second["images"][:, 0, 0, 0].tolist() == [30, 20, 10, 10]
    assert len(decoded) == 6


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path):
    images = [encode_png(np.zeros((8, 8, 3), np.uint8)), b"no picture", encode_png(np.ones((8, 8, 3), np.uint8))]
    with pytest.raises(OSError, match=f"The image of sample {1:024x} of shard 000000 is lost: not an image"):
        pictures(tmp_path, images)
