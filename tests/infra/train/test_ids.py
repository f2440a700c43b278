"""The log of ids proves each row once an epoch, whatever was killed, and finds it out where that is not so."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import storage
from infra.train import ids as log_of_ids
from infra.train import world
from infra.train.ids import IdLog, check, read_ids, row_ids
from infra.train.plan import BatchPlan
from tests.infra.train import toy


def make_ids(counts):
    numbers = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, sum(counts), dtype=np.int64)
    return np.split(numbers, np.cumsum(counts)[:-1])


def run(folder, plan, ids, size, start, stop, behind=0, torn=False, every=0, last=False):
    """One attempt of `size` workers over steps [start, stop), of which the last rank is killed `behind` steps early.

    With `every`, the folder cannot append: what it has is of so many steps, or of fewer at the `last`.
    """
    padded, attempt = -(-plan.batch // size), []
    for rank in range(size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(world, "rank", lambda rank=rank: rank)
            patch.setattr(world, "size", lambda: size)
            patch.setattr(world, "from_first", lambda mine: (attempt.append(mine), attempt[0])[1])  # rank 0 was first
            if every and storage.is_local(folder):
                patch.setattr(log_of_ids, "storage", SimpleNamespace(**{**vars(storage), "is_local": lambda _: False}))
            log = IdLog(folder, start)
        for step in range(start, stop - (behind if rank == size - 1 else 0)):
            if every and step % every == 0:
                log.flush()
            rows, weight = plan.share(step, step + 1, rank, size, padded)
            column = torch.tensor([int(ids[s][r]) for s, r in zip(rows.shard, rows.row, strict=True)])
            whole = {"id": column, "weight": torch.from_numpy(weight)}
            parts = {name: values.chunk(2) for name, values in whole.items()}
            log(step, [{name: part[i] for name, part in parts.items()} for i in range(len(parts["id"]))])
        if last:
            log.flush()
        log.close()
        if torn and not every:
            newest = sorted(Path(folder).glob(f"*-{rank:05d}-of-{size:05d}.jsonl"))[-1]
            with open(newest, "rb+") as file:
                file.truncate(max(0, file.seek(0, 2) - 3))


plans = st.builds(
    BatchPlan,
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum),
    batch=st.integers(1, 9),
    seed=st.integers(0, 9),
    window_shards=st.integers(1, 4),
)
attempts = st.lists(
    st.tuples(st.integers(1, 4), st.floats(0, 1), st.integers(0, 8), st.integers(0, 2), st.booleans()), max_size=4
)


def train_and_check(folder, plan, killed, last, every):
    """Attempts that were killed and one that was not, and whether what they wrote shows each row once an epoch."""
    ids, done = make_ids(plan.counts), 0
    for size, kept, length, behind, torn in killed:
        start = int(kept * done)  # a checkpoint that was whole
        run(folder, plan, ids, size, start, start + length, min(behind, length), torn, every)
        done = start + length - behind - torn
        if every:  # a save of all
            done = (start + length - min(behind, length) - 1) // every * every
        done = max(done, start)
    steps = -(-2 * plan.rows_per_epoch // plan.batch)
    run(folder, plan, ids, last, min(done, steps), max(done, steps), every=every, last=True)
    found = read_ids(folder)
    assert len(found) >= steps
    assert check(found, plan, ids) >= 2


@pytest.mark.timeout(120)
@settings(max_examples=60, deadline=None)
@given(plans, attempts, st.integers(1, 4), st.integers(0, 3))
def test_every_row_once_an_epoch_whatever_was_killed(plan, killed, last, every):
    with tempfile.TemporaryDirectory() as folder:
        train_and_check(f"{folder}/ids", plan, killed, last, every)


def test_a_store_that_cannot_append_has_all_before_each_save(s3):
    plan = BatchPlan([5, 4], 2, 0, 2)
    killed = [(2, 1.0, 5, 1, False), (3, 0.5, 4, 0, False)]
    train_and_check(f"{s3}/ids", plan, killed, 2, every=2)
    assert storage.list_names(f"{s3}/ids") == ["000000", "000001", "000002"]
    assert len(storage.list_names(f"{s3}/ids/000000")) == 5  # the starts, two steps twice, two once


@settings(deadline=None)
@given(plans, st.data())
def test_a_wrong_row_is_found(plan, data):
    ids = make_ids(plan.counts)
    rows = [plan.steps(step, step + 1) for step in range(-(-plan.rows_per_epoch // plan.batch))]
    steps = {n: [int(ids[s][r]) for s, r in zip(one.shard, one.row, strict=True)] for n, one in enumerate(rows)}
    assert check(steps, plan, ids) >= 1
    step = data.draw(st.sampled_from(sorted(steps)))
    place = data.draw(st.integers(0, len(steps[step]) - 1))
    for damage in ([], [steps[step][place] ^ 1], [steps[step][place]] * 2):
        broken = {**steps, step: [*steps[step][:place], *damage, *steps[step][place + 1 :]]}
        with pytest.raises(ValueError, match=f"Step {step} used other rows"):
            check(broken, plan, ids)
    if len(steps) > 1:
        del steps[0]
        with pytest.raises(ValueError, match="the first that is missing is 0"):
            check(steps, plan, ids)


def test_the_ids_of_the_rows_are_those_of_the_plan(tmp_path):
    toy.write_rows(f"{tmp_path}/rows")
    ids = row_ids([f"{tmp_path}/rows"], ["000000", "000001"], toy.Toy())
    assert [shard.tolist() for shard in ids] == [list(range(25)), list(range(50, 75))]


def write(folder, name, *records, end="\n"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(json.dumps(record) for record in records) + end)


def test_a_step_that_a_worker_lacks_is_told(tmp_path):
    write(tmp_path, "000000-00000-of-00002.jsonl", {"start": 0}, *({"step": s, "ids": [s]} for s in range(3)))
    write(tmp_path, "000000-00001-of-00002.jsonl", {"start": 0}, *({"step": s, "ids": [s]} for s in (0, 2)))
    with pytest.raises(ValueError, match="between others"):
        read_ids(str(tmp_path))


def test_steps_before_an_attempt_must_be_known(tmp_path):
    write(tmp_path, "000000-00000-of-00001.jsonl", {"start": 0}, {"step": 0, "ids": [1]})
    write(tmp_path, "000001-00000-of-00001.jsonl", {"start": 2}, {"step": 2, "ids": [1]})
    with pytest.raises(ValueError, match="what step 1 used"):
        read_ids(str(tmp_path))


def test_a_line_in_the_middle_is_not_read_over(tmp_path):
    write(tmp_path, "000000-00000-of-00001.jsonl", {"start": 0}, {"ste": 0}, {"step": 1, "ids": [1]})
    with pytest.raises(ValueError, match="is no id log"):
        read_ids(str(tmp_path))


def test_an_attempt_that_never_got_to_a_step_voids_what_it_began_at(tmp_path):
    write(tmp_path, "000000-00000-of-00001.jsonl", {"start": 0}, *({"step": s, "ids": [s]} for s in range(5)))
    write(tmp_path, "000001-00001-of-00002.jsonl", {"start": 3})
    assert read_ids(str(tmp_path)) == {0: [0], 1: [1], 2: [2]}
