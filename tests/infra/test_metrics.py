"""Progress that a person can read, a stall that says so and why, scalars that survive a cut."""

import io
import json
import re
import tempfile
import time

import pytest

from infra import storage
from infra.metrics import FIRST_LINES, Progress, ScalarLog, counting, read_scalars


class Kept(list):
    """Stands where Gauges do."""

    closed = False

    def __call__(self, figures, label=""):
        self.append(dict(figures))

    def close(self):
        self.closed = True


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr("infra.metrics.free_resources", str)  # whether Ray is up is no matter here
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


def test_it_is_told_where_standard_error_leads_by_then(clock, capsys):
    Progress("mix").close("done already")
    assert "done already" in capsys.readouterr().err


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


def test_a_log_gets_a_few_lines_soon_and_then_one_a_minute(clock):
    stream = io.StringIO()
    progress = Progress("mix", stream)
    times = []
    for second in range(3600):
        clock[0] += 1
        progress(second, 10_000, "rows", loss=1.0)
        progress.look()
        if len(stream.getvalue().splitlines()) > len(times):
            times.append(second + 1)
    assert times == [10, 20, 30, *range(90, 3600, 60)]
    line = stream.getvalue().splitlines()[-1]
    assert line == "mix  3,569/10,000 rows  1.0 rows/s  1 h 47 min left  loss 1"


def test_a_log_gets_its_line_even_if_nothing_is_reported(clock):
    stream = io.StringIO()
    progress = Progress("mix", stream, stall_seconds=1e9)
    progress(0, 10, "shards", rows=0)
    clock[0] += 5
    progress(3, 10, "shards", rows=30)
    for _ in range(100):
        clock[0] += 1
        progress.look()
    lines = stream.getvalue().splitlines()
    assert len(lines) == FIRST_LINES + 1
    assert "3/10 shards" in lines[-1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_step_that_stalls_says_so_and_why_once_a_minute(clock, kind):
    stream = kind()
    progress = Progress("mix", stream, stall_seconds=100)
    progress(4, 10, "shards", why=lambda: "shard 000004 is with process 71")
    for _ in range(180):
        clock[0] += 1
        progress.look()
    lines = [line for line in re.split(r"[\r\n]", stream.getvalue()) if "no progress" in line]
    assert [re.search(r"for (.*?):", line)[1] for line in lines] == ["51 s", "1 min 51 s", "2 min 51 s"]
    assert lines[0].rstrip() == "mix  4/10 shards  no progress for 51 s: shard 000004 is with process 71"
    progress(5, 10, "shards")
    clock[0] += 50
    progress.look()
    assert stream.getvalue().count("no progress") == 3, "it goes on"
    clock[0] += 600
    progress.look()
    assert stream.getvalue().count("no progress") == 4
    assert stream.getvalue().rstrip().endswith("nothing is known of why"), "what was known before holds no more"


def test_a_step_that_has_counted_nothing_yet_is_under_way(clock):
    stream = io.StringIO()
    progress = Progress("mix", stream, stall_seconds=100)
    clock[0] += 60
    progress.look()
    assert stream.getvalue().strip() == "mix  under way for 1 min 00 s, nothing is counted yet"


def test_slow_units_are_no_stall_once_their_pace_is_known(clock):
    stream = io.StringIO()
    progress = Progress("mix", stream, stall_seconds=100)
    for done in range(4):
        progress(done, 10, "shards")
        for _ in range(0 if done == 3 else 40):
            clock[0] += 1
            progress.look()
    clock[0] += 100
    progress.look()
    assert "no progress" not in stream.getvalue()
    clock[0] += 21
    progress.look()
    assert stream.getvalue().count("no progress for 2 min 01 s") == 1


def test_an_explanation_that_fails_is_no_harm(clock):
    stream = io.StringIO()
    progress = Progress("mix", stream)
    progress(0, 10, "shards", why=lambda: 1 / 0)
    clock[0] += 60
    progress.look()
    assert "no progress for 1 min 00 s: nothing is known" in stream.getvalue()


def test_a_step_that_is_done_or_over_does_not_stall(clock):
    stream = io.StringIO()
    progress = Progress("mix", stream)
    progress(10, 10, "shards")
    clock[0] += 1000
    progress.look()
    assert "no progress" not in stream.getvalue()


def test_a_watched_step_tells_by_itself(monkeypatch):
    monkeypatch.setattr("infra.metrics.LOOK_SECONDS", 0.05)
    stream = io.StringIO()
    gauges = Kept()
    with Progress("mix", stream, gauges, stall_seconds=0.4) as progress:
        progress(0, 2, "parts", why=lambda: "it sleeps")
        time.sleep(0.6)
        assert "no progress for 0 s: it sleeps" in stream.getvalue()
    said = stream.getvalue()
    time.sleep(0.3)
    assert stream.getvalue() == said, "who has ended says no more"
    assert gauges[-1]["queued"] == 2
    assert gauges.closed


def test_gauges_are_told_counts_rates_and_how_long_nothing_moved(clock):
    gauges = Kept()
    progress = Progress("mix", io.StringIO(), gauges)
    for second in range(200):
        rate = 1 if second < 100 else 3  # of late it goes faster
        clock[0] += 1
        base = min(second, 100) + 3 * max(0, second - 100)
        progress(base, 1000, "shards", rows=20 * base, loss=rate * 0.5, **{"net/token": 7.0})
        progress.look()
    told = gauges[-1]
    assert told["done"] == 397
    assert told["queued"] == 603
    assert told["total"] == 1000
    assert told["loss"] == 1.5
    assert told["done_per_second"] == pytest.approx(3)
    assert told["rows_per_second"] == pytest.approx(60)
    assert told["stalled_seconds"] == 0
    assert "net/token" not in told, "losses are told by who trains"
    clock[0] += 33
    progress.look()
    assert gauges[-1]["stalled_seconds"] == 33
    progress(3, 50, "shards", rows=60)  # it counts anew
    clock[0] += 1
    progress(5, 50, "shards", rows=100)
    progress.look()
    assert gauges[-1]["rows_per_second"] == pytest.approx(40)


def test_rates_of_slow_units_are_of_their_last_ones(clock):
    gauges = Kept()
    progress = Progress("mix", io.StringIO(), gauges)
    for done in range(5):
        progress(done, 10, "shards")
        clock[0] += 300
    progress.look()
    assert gauges[-1]["done_per_second"] == pytest.approx(1 / 300, rel=0.6)


def test_a_hot_loop_costs_little_and_keeps_few_counts():
    progress, began = Progress("mix", io.StringIO()), time.perf_counter()
    for done in range(20_000):
        progress(done, 20_000, "rows", rows=done)
    assert time.perf_counter() - began < 3  # 150 us each, on a busy machine
    assert len(progress._counts._seen) <= 513


def test_counts_may_be_told_as_multiples(clock):
    stream = io.StringIO()
    progress = Progress("recaption", stream)
    report = counting(progress, "captions", of="accepted", times=2)
    report(0, 10, "shards", rows=0, accepted=0)
    clock[0] += 20
    report(1, 10, "shards", rows=100, accepted=90)
    assert stream.getvalue().splitlines()[-1] == (
        "recaption  1/10 shards  3 shards/min  3 min 00 s left  captions 180 (9.0/s)  rows 100  accepted 90"
    )
    report(2, 10, "shards")  # a step that does not tell what is accepted


def events(place):
    """The steps that TensorBoard reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with storage.fetched(storage.join(place, "tensorboard")) as folder:
        return [event.step for event in EventAccumulator(folder).Reload().Scalars("a/loss")]


def test_tensorboard_follows_a_training_as_it_goes(place, clock):
    log = ScalarLog(place, 0)
    for step in range(1, 4):
        clock[0] += 61
        log(step, {"a/loss": 1.0})
    assert events(place) == [1, 2, 3]
    log.close()


def test_a_file_that_takes_long_to_write_is_written_less_often(tmp_path, clock, monkeypatch):
    written, write = [], storage.write_bytes

    def slow(url, data):
        clock[0] += 2
        written.append(clock[0])
        write(url, data)

    monkeypatch.setattr(storage, "write_bytes", slow)
    log = ScalarLog(str(tmp_path), 0)
    for step in range(200):
        clock[0] += 2
        log(step, {"a/loss": 1.0})
    assert 4 <= len(written) <= 5, "two seconds of a hundred"
    log.close()
    assert len(read_scalars(str(tmp_path))) == 200


def test_scalars_continue_after_a_cut(place, tmp_path_factory, monkeypatch):
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    told = []
    log = ScalarLog(place, 0, lambda step, figures: told.append((step, figures)))
    for step in (10, 20, 30):
        log(step, {"a/loss": step / 7})
    log.close()
    assert events(place) == [10, 20, 30]
    assert told == [(step, {"a/loss": step / 7}) for step in (10, 20, 30)]
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
