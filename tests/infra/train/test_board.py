"""Workers are heard, told to leave, and missed when they make no progress."""

import time

import pytest

from infra.train.board import Beat, Board, Pulse, silence


def beat(rank=0, **place):
    return Beat(**{"rank": rank, "node": "abcdef0123456789", "phase": "step", "step": 7, "slowest": 0.2, **place})


def make_steps(pulse, count, seconds):
    for step in range(count):
        pulse.at("data", step=step)
        pulse.at("step", step=step)
        time.sleep(seconds)


def test_a_group_is_told_to_leave_and_one_before_it_always_is():
    board = Board()
    board.open(3, 1)
    assert board.beat(3, beat()) is False
    board.leave()
    assert board.beat(3, beat()) is True
    board.open(4, 1)
    assert board.beat(3, beat()) is True, "a worker that outlived its group"
    ((said, _),) = board.read()
    assert said.pid == 0, "and what it says does not count"
    assert board.beat(4, beat()) is False


def test_handles_are_those_of_the_group():
    board = Board()
    board.open(1, 2)
    board.hello(0, 0, b"stale", "{}")
    board.hello(1, 0, b"a", "{}")
    board.hello(1, 1, b"b", "{}")
    assert board.handles() == [b"a", b"b"]


def test_the_pulse_tells_where_training_stands_and_hears_the_answer():
    heard = []

    def tell(word):
        heard.append(word)
        return len(heard) > 1

    pulse = Pulse(1, "node", tell)
    pulse.at("start", training=2)
    make_steps(pulse, 4, 0.02)
    pulse.logged({"a/loss": 1.5})
    deadline = time.monotonic() + 10
    while not pulse.leaving() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert pulse.leaving()
    pulse.at("done")
    pulse.close()
    last = heard[-1]
    assert (last.rank, last.training, last.step, last.phase, last.figures) == (1, 2, 3, "done", {"a/loss": 1.5})
    assert 0.02 <= last.slowest < 5


def test_each_training_of_a_group_begins_anew():
    last = []
    pulse = Pulse(0, "node", lambda word: bool(last.append(word)))
    make_steps(pulse, 3, 0.2)
    pulse.at("start", training=1)
    pulse.at("data", step=0)
    time.sleep(0.2)  # waiting is none of a step's time
    make_steps(pulse, 1, 0.2)  # the first one may take long again
    make_steps(pulse, 2, 0.0)
    pulse.at("data", step=3)
    pulse.close()
    assert (last[-1].training, last[-1].made) == (1, 6)
    assert 0 < last[-1].slowest < 0.1


def test_what_was_logged_of_one_training_is_not_told_of_the_next():
    heard = []
    pulse = Pulse(0, "node", lambda word: bool(heard.append(word)))
    make_steps(pulse, 3, 0.0)
    pulse.logged({"a/loss": 1.5})
    pulse.at("save", step=3)
    pulse.at("start", training=1)
    pulse.close()
    last = heard[-1]
    assert (last.training, last.step, last.figures) == (1, 0, {})


def test_the_pulse_outlives_a_board_that_is_gone():
    def tell(word):
        raise RuntimeError("the actor died")

    pulse = Pulse(0, "node", tell)
    time.sleep(0.1)
    assert not pulse.leaving()
    pulse.close()


def test_saving_does_not_count_as_a_slow_step():
    last = []
    pulse = Pulse(0, "node", lambda word: bool(last.append(word)))
    for step in range(6):
        pulse.at("data", step=step)
        pulse.at("step", step=step)
        if step == 3:
            pulse.at("save", step=step)
            time.sleep(0.3)
    pulse.close()
    assert last[-1].slowest < 0.1


def test_a_worker_that_does_not_come_in_is_missed():
    board = Board()
    board.open(0, 3)
    board.beat(0, beat(rank=0, phase="start", slowest=0.0))
    words = board.read()
    assert [word.rank for word, _ in words] == [0, 1, 2]
    assert silence(words, 100) is None
    late = [(word, 251.0 if not word.pid else quiet) for word, quiet in words]
    text, ends = silence(late, 100) or ("", True)
    assert "No progress at step 0: worker 1 has not come in for 251 s, worker 0 is starting" in text
    assert not ends
    assert (silence([(word, 500.0 if not word.pid else quiet) for word, quiet in words], 100) or ("", 0))[1]
    assert silence([(word, 249.0 if not word.pid else quiet) for word, quiet in words], 100) is None


@pytest.mark.parametrize(
    ("seconds", "quiet", "phase", "slowest", "said", "ends"),
    [
        (49, 0, "step", 0.2, False, False),
        (51, 0, "step", 0.2, True, False),
        (100, 0, "data", 0.2, True, True),
        (51, 0, "step", 0.0, False, False),  # the first step may take longer
        (251, 0, "step", 0.0, True, False),
        (500, 0, "start", 0.0, True, True),
        (300, 0, "step", 100.0, False, False),  # ten slow steps
        (499, 0, "save", 0.2, True, False),
        (0, 51, "save", 0.2, True, False),  # no word at all
        (0, 100, "export", 0.2, True, True),
        (9999, 9999, "done", 0.2, False, False),
    ],
)
def test_what_is_said_and_what_ends_a_group(seconds, quiet, phase, slowest, said, ends):
    stuck = beat(seconds=seconds, phase=phase, slowest=slowest)
    found = silence([(beat(rank=1), 0.3), (stuck, quiet)], 100)
    assert (found is not None) == said
    if found:
        assert found[1] == ends
        assert "worker 0" in found[0]
        assert "step 7" in found[0]
        assert "worker 1 computes" in found[0]


def test_the_worst_worker_is_named_with_what_it_does():
    words = [(beat(seconds=70), 0.0), (beat(rank=1, phase="data", seconds=71), 0.0)]
    assert "worker 1 (process" in (silence(words, 100) or ("",))[0]
    words = [(beat(seconds=70), 0.0), (beat(rank=1), 80.0)]
    text, ends = silence(words, 100) or ("", True)
    assert "worker 1" in text
    assert "says nothing for 80 s" in text
    assert not ends
    assert silence([], 100) is None
