"""Rows of several shapes: each once an epoch, in steps of one bucket; and the order without buckets is what it was."""

import hashlib
import tracemalloc
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.data.images import encode_png
from infra.data.ledger import commit
from infra.data.shards import count_buckets, count_rows
from infra.train import buckets as buckets_module
from infra.train.buckets import BucketPlan
from infra.train.draw import permutation
from infra.train.ids import IdLog, check, read_ids, row_ids
from infra.train.loop import TrainConfig
from infra.train.plan import BatchPlan
from infra.train.worker import Training
from tests.infra.train import toy
from tests.infra.train.plainly import PlainFeed

NAMES = ("16x32", "20x20", "32x16", "8x8")
shards = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 9), max_size=4)
plans = st.builds(
    BucketPlan,
    counts=st.lists(shards, min_size=1, max_size=12).filter(lambda counts: any(sum(one.values()) for one in counts)),
    batch=st.integers(1, 13),
    seed=st.integers(0, 2**31),
    window_shards=st.integers(1, 5),
)


def listed(rows):
    columns = (rows.epoch, rows.shard, rows.row, rows.weight)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def bucket_of(plan, shard, row):
    """By its number: the usable rows of a shard stand bucket after bucket."""
    for name in sorted(plan.counts[shard]):
        row -= plan.counts[shard][name]
        if row < 0:
            return name
    raise AssertionError("There is no such row.")


@pytest.mark.parametrize(
    ("counts", "batch", "seed", "window", "digest"),
    [
        ([5, 0, 9, 3, 7], 4, 0, 2, "690af2f15c50c5a7"),
        ([3] * 40, 7, 5, 4, "78a1bd7a7f16833b"),
        ([50, 50], 100, 2**31, 16, "6a8ff764ea77e0fc"),
    ],
)
def test_the_order_without_buckets_is_what_it_was(counts, batch, seed, window, digest):
    """Digests of what commit b6c73f7 gave."""
    rows = BatchPlan(counts, batch, seed, window).steps(0, 60)
    order = np.stack([rows.epoch, rows.shard, rows.row]).astype("<i8").tobytes()
    assert hashlib.sha256(order).hexdigest()[:16] == digest
    assert rows.weight.tolist() == [1] * 60 * batch


@given(plans, st.integers(1, 3))
def test_every_row_once_an_epoch_in_steps_of_one_bucket(plan, epochs):
    sizes = Counter()
    for count in plan.counts:
        sizes.update(count)
    assert plan.rows_per_epoch == sizes.total()
    assert plan.steps_per_epoch == sum(-(-rows // plan.batch) for rows in sizes.values())
    steps = np.array(listed(plan.steps(0, plan.steps_per_epoch * epochs))).reshape(epochs, -1, plan.batch, 4)
    for number, epoch in enumerate(steps):
        real = [tuple(row[:3].astype(int)) for step in epoch for row in step if row[3]]
        assert len(real) == len(set(real))
        assert set(real) == {(number, s, r) for s, n in enumerate(plan.counts) for r in range(sum(n.values()))}
        short = Counter()
        for step in epoch:
            found = {bucket_of(plan, int(shard), int(row)) for _, shard, row, _ in step}
            assert len(found) == 1, "of one bucket, those of weight 0, too"
            short[found.pop()] += plan.batch - int(step[:, 3].sum())
            assert step[0, 3] == 1
            assert (np.diff(step[:, 3]) <= 0).all(), "what is filled up stands at the end"
        assert all(rows < plan.batch for rows in short.values()), "a bucket has at most one step that is not full"


@given(plans, st.integers(0, 60), st.integers(1, 9))
def test_a_step_does_not_depend_on_where_one_starts(plan, start, length):
    whole = listed(plan.steps(0, start + length))
    assert listed(plan.steps(start, start + length)) == whole[start * plan.batch :]


@given(plans, st.integers(1, 8), st.integers(0, 30), st.integers(0, 3))
def test_workers_together_compute_the_global_batch(plan, world, step, extra):
    padded = -(-plan.batch // world) + extra
    together = [[], []]
    for rank in range(world):
        rows, weight = plan.share(step, step + 2, rank, world, padded)
        assert weight.dtype == np.float32
        mine = np.array(listed(rows)).reshape(2, padded, 4)
        for i, used in enumerate(weight.reshape(2, padded) > 0):
            together[i] += [tuple(row) for row in mine[i][used]]
            shape = {bucket_of(plan, int(shard), int(row)) for _, shard, row, _ in mine[i]}
            assert len(shape) == 1, "places without a row have the shape of the step"
    for i in range(2):
        assert together[i] == [row for row in listed(plan.steps(step + i, step + i + 1)) if row[3]]


@given(plans, st.integers(0, 5))
def test_the_buckets_of_an_epoch_s_steps_depend_on_seed_and_epoch_alone(plan, epoch):
    whole = plan.of_steps(epoch, 0, plan.steps_per_epoch)
    other = BucketPlan([dict(sum(map(Counter, plan.counts), Counter()))], plan.batch, plan.seed, 99)
    assert np.array_equal(other.of_steps(epoch, 0, plan.steps_per_epoch), whole), "not on shards or windows"
    for start in range(0, plan.steps_per_epoch, 3):
        stop = min(start + 3, plan.steps_per_epoch)
        assert np.array_equal(plan.of_steps(epoch, start, stop), np.array(whole)[:, start:stop])
    bucket, number = whole
    for one in range(len(plan.buckets)):
        assert np.array_equal(number[bucket == one], np.arange((bucket == one).sum()))


def test_each_bucket_is_spread_over_the_epoch_at_random():
    plan = BucketPlan([{"a": 7000, "b": 2000, "c": 1000, "d": 3}], 10, 0, 1)
    orders = []
    for seed in (0, 1):
        for epoch in range(2):
            bucket, _ = BucketPlan(plan.counts, 10, seed, 1).of_steps(epoch, 0, plan.steps_per_epoch)
            orders.append(bucket)
            for one, steps in enumerate((700, 200, 100, 1)):
                behind = np.cumsum(bucket == one) - (np.arange(1001) + 1) * steps / 1001
                assert np.abs(behind).max() < 5, "by any step it has had about its share"
    assert len({order.tobytes() for order in orders}) == 4
    pairs = Counter(zip(orders[0].tolist(), orders[1].tolist(), strict=True))
    assert abs(pairs[1, 1] - 40) < 25, "200 of 1000 in each: 40 meet if they know nothing of each other"


def test_a_million_steps_in_costs_what_the_first_step_costs(monkeypatch):
    made = []

    def counting(size, *key):
        made.append(size)
        return permutation(size, *key)

    monkeypatch.setattr(buckets_module, "permutation", counting)
    plan = BucketPlan([{"a": 7000, "b": 2900, "c": 100}] * 100_000, 256, 0, 16)  # 10^9 rows
    assert plan.steps_per_epoch > 3_900_000
    plan.steps(0, 1)  # counts are put in order once
    for step in (0, 1_000_000, plan.steps_per_epoch - 1, 10_000_000):
        made.clear()
        tracemalloc.start()
        rows = plan.steps(step, step + 1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(rows) == 256
        assert made.count(100_000) == 1
        assert sum(made) <= 100_000 + 2 * 16 * 7000
        assert peak < 50e6


def test_steps_that_follow_one_another_read_the_same_shards():
    window = 16
    plan = BucketPlan([{"a": 700, "b": 290, "c": 10} for _ in range(640)], 64, 0, window)
    order = permutation(640, 0, 0)
    place = np.argsort(order)
    for start in range(0, plan.steps_per_epoch - 40, 997):
        rows = plan.steps(start, start + 40)
        assert len(np.unique(rows.shard)) <= 3 * window
        assert np.ptp(place[rows.shard]) < 4 * window, "all buckets stand at about the same shard"
    # Of a rare bucket a window has 160 rows, of one that is rarer than a row a shard, fewer than a batch.
    rare = BucketPlan([{"a": 700, "b": number % 4 == 0} for number in range(640)], 64, 0, window)
    bucket, _ = rare.of_steps(0, 0, rare.steps_per_epoch)
    assert (bucket == 1).sum() == 3
    for step in np.flatnonzero(bucket == 1).tolist():
        rows = rare.steps(step, step + 1)
        assert len(np.unique(rows.shard)) == rows.weight.sum(), "a shard a row"


def test_no_rows_is_said():
    for counts in ([{}, {}], [{"a": 0}]):
        with pytest.raises(ValueError, match="No row is left"):
            BucketPlan(counts, 4, 0, 1)


SHAPES = {"8x8": (8, 8), "4x8": (4, 8)}


@dataclass(frozen=True)
class Pictures(toy.Toy):
    """Pictures of two shapes; each seventh row is not trained on."""

    reads: tuple[str, ...] = ("pixels", "row")
    bucket: str | None = "bucket"

    def where(self, columns):
        return columns["row"] % 7 > 0

    def collate(self, rows, draw):
        return {"images": np.stack(rows["pixels"]), "row": np.array(rows["row"]), "coin": draw("coin")}


def write(folder, counts, bucket=lambda number: "8x8" if number % 3 else "4x8"):
    """Shards of so many rows; a picture's pixels are all its row's number."""
    first = 0
    for shard, count in enumerate(counts):
        numbers = range(first, first + count)
        first += count
        names = [bucket(number) for number in numbers]
        columns = {
            "sample_id": [f"{number:016x}" for number in numbers],
            "state": ["accepted"] * count,
            "reason": pa.nulls(count, pa.string()),
            "row": list(numbers),
            "bucket": pa.array(names, pa.string()),
            "offset": [0] * count,
            "image": [
                encode_png(np.full((*SHAPES.get(name, (1, 1)), 3), number % 256, np.uint8))
                for number, name in zip(numbers, names, strict=True)
            ],
        }
        commit(str(folder), f"{shard:06d}", pa.table(columns))


def trained(tmp_path, counts=(20, 3, 17), batch=4, **options):
    write(tmp_path / "rows", counts)
    config = TrainConfig(steps=99, batch=batch, window_shards=2)
    return Training(Pictures(), [str(tmp_path / "rows")], config, str(tmp_path / "out"))


def test_rows_are_counted_by_bucket(tmp_path):
    training = trained(tmp_path)
    usable = [[n for n in numbers if n % 7] for numbers in (range(20), range(20, 23), range(23, 40))]
    wanted = [Counter("8x8" if n % 3 else "4x8" for n in numbers) for numbers in usable]
    assert list(training.count().values()) == wanted
    task = training.task
    assert count_buckets(training.inputs, "bucket", task.where, task.where_reads) == training.count()
    assert list(count_rows(training.inputs, task.where, task.where_reads).values()) == [len(one) for one in usable]


@pytest.mark.parametrize(("world", "micro_steps"), [(1, 1), (1, 3), (2, 1), (3, 2), (5, 1)])
def test_a_step_has_one_shape_and_each_row_comes_once_an_epoch(tmp_path, world, micro_steps):
    training = trained(tmp_path)
    epoch = training.plan(training.count()).steps_per_epoch
    seen, coins = [Counter(), Counter()], [set(), set()]
    each = [PlainFeed(training, rank, world, micro_steps, 2 * epoch)(0) for rank in range(world)]
    shapes_seen = set()
    for step, parts in enumerate(zip(*each, strict=True)):
        micro = [batch for batches in parts for batch in batches]
        shapes = {tuple(batch["images"].shape) for batch in micro}
        assert len(shapes) == 1, "workers and micro-batches have one shape, places without a row, too"
        shapes_seen.add(shapes.pop()[1:3])
        for batch in micro:
            assert (batch["images"][:, 0, 0, 0] == batch["row"] % 256).all()
            used = batch["weight"] > 0
            seen[step // epoch].update(batch["row"][used].tolist())
            coins[step // epoch].update(batch["coin"][used].tolist())
    assert shapes_seen == {(8, 8), (4, 8)}
    wanted = Counter(n for n in range(40) if n % 7)
    assert seen == [wanted, wanted]
    assert [len(one) for one in coins] == [len(wanted)] * 2
    assert not coins[0] & coins[1]


def test_what_a_cut_and_resized_training_used_is_proven_by_its_log(tmp_path):
    """Two workers for some steps, then three from a checkpoint before where they came to, then one."""
    training = trained(tmp_path)
    plan = training.plan(training.count())
    ids = row_ids(training.inputs, ["000000", "000001", "000002"], training.task)
    stop = 2 * plan.steps_per_epoch

    class Writer(IdLog):
        def __init__(self, folder, start, attempt, rank, world):
            self._lines, self._objects, self._file = [], 0, -1
            self._name = f"{folder}/{attempt:06d}/{rank:05d}-of-{world:05d}"
            self._write({"start": start})

    for attempt, (world, start, end) in enumerate([(2, 0, 9), (3, 7, 12), (1, 12, stop)]):
        for rank in range(world):
            log = Writer(str(tmp_path / "ids"), start, attempt, rank, world)
            for step, batches in enumerate(PlainFeed(training, rank, world, stop=end)(start), start):
                log(step, batches)
            log.flush()
    used = read_ids(str(tmp_path / "ids"))
    assert check(used, plan, ids) == 2
    assert any(len(rows) < plan.batch for rows in used.values()), "what was filled up is not there"
    whole = next(step for step, rows in used.items() if len(rows) == plan.batch)
    used[whole] = used[whole][:-1]
    with pytest.raises(ValueError, match=f"Step {whole} used other rows"):
        check(used, plan, ids)


def test_the_rows_of_a_step_that_diverged_are_named_once(tmp_path):
    training = trained(tmp_path)
    feed = PlainFeed(training)
    named = [feed.source.sample_ids(step) for step in range(feed.plan.steps_per_epoch)]
    assert sorted(i for ids in named for i in ids) == [f"{n:016x}" for n in range(40) if n % 7]
    assert all(ids for ids in named)


def test_a_row_without_a_bucket_is_told(tmp_path):
    write(tmp_path / "rows", [5], bucket=lambda number: None if number == 3 else "8x8")
    training = Training(Pictures(), [str(tmp_path / "rows")], TrainConfig(steps=1), "out")
    with pytest.raises(ValueError, match=f"Sample {3:016x} of shard 000000 has no 'bucket'"):
        training.count()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3))
def test_through_real_files(tmp_path_factory, counts, batch, world, window):
    place = tmp_path_factory.mktemp("real")
    write(place / "rows", counts)
    config = TrainConfig(steps=9, batch=batch, window_shards=window)
    training = Training(Pictures(), [str(place / "rows")], config, str(place / "out"))
    wanted = Counter(number for number in range(sum(counts)) if number % 7)
    if not wanted:
        with pytest.raises(ValueError, match="No row is left"):
            training.plan(training.count())
        return
    seen, stop = Counter(), training.plan(training.count()).steps_per_epoch
    for rank in range(world):
        for batches in PlainFeed(training, rank, world, stop=stop)(0):
            for one in batches:
                seen.update(one["row"][one["weight"] > 0].tolist())
    assert seen == wanted


@pytest.mark.timeout(120)
def test_ray_s_feed_gives_the_same(tmp_path, ray_cluster):
    training = trained(tmp_path)
    plain = PlainFeed(training, 1, 2, stop=30)
    wanted, found = list(plain(4)), list(plain.source(4))
    assert len(found) == len(wanted) == 26
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)
