"""Progress that a person can read, scalars that survive a cut, memory that is counted."""

import io
import json
import tempfile

import numpy as np
import pytest

from infra.metrics import MemoryWatch, Progress, ScalarLog, read_scalars


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("infra.metrics.time.monotonic", lambda: now[0])
    return now


def test_progress_says_how_far_how_fast_how_long(clock):
    stream = io.StringIO()
    progress = Progress("mix", stream)
    progress(0, 1000, "rows")
    clock[0] += 10
    progress(200, 1000, "rows", loss=0.123456)
    assert stream.getvalue().splitlines()[-1] == "mix  200/1,000 rows  20.0 rows/s  40 s left  loss 0.1235"
    clock[0] += 1
    progress(220, 1000, "rows")  # too soon for a log
    progress(1000, 1000, "rows")
    assert len(stream.getvalue().splitlines()) == 2


def test_what_was_done_before_is_no_speed(clock):
    stream = io.StringIO()
    progress = Progress("mix", stream)
    progress(900, 1000, "rows")
    clock[0] += 20
    progress(920, 1000, "rows")
    assert "1.0 rows/s  1 min 20 s left" in stream.getvalue()


def test_a_second_count_starts_a_new_clock(clock):
    stream = io.StringIO()
    progress = Progress("train", stream)
    progress(0, 100, "steps")
    clock[0] += 20
    progress(100, 100, "steps")
    clock[0] += 100
    progress(0, 50, "steps")
    clock[0] += 10
    progress(20, 50, "steps")
    assert "20/50 steps  2.0 steps/s  15 s left" in stream.getvalue()


def test_scalars_continue_after_a_cut(place, tmp_path_factory, monkeypatch):
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    log = ScalarLog(place, 0)
    for step in (10, 20, 30):
        log(step, {"a/loss": step / 7})
    log.close()
    log = ScalarLog(place, 20)  # the checkpoint was of step 20: what came later is done again
    log(30, {"a/loss": 1.0})
    log.close()
    rows = read_scalars(place)
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[-1]["a/loss"] == 1.0
    assert rows[0]["a/loss"] == pytest.approx(10 / 7, rel=1e-5)
    assert sorted(row["seconds"] for row in rows) == [row["seconds"] for row in rows]
    assert all(json.dumps(row) for row in rows)
    assert not list(scratch.iterdir())


def test_no_scalars_yet(tmp_path):
    assert read_scalars(str(tmp_path)) == []


def test_memory_is_counted():
    with MemoryWatch(0.01) as small:
        pass
    block = np.ones(50_000_000)  # 400 MB
    with MemoryWatch(0.01) as large:
        pass
    assert 0.35 < large.peak_gb - small.peak_gb < 0.45
    assert block[-1] == 1
