"""A fault that passes is tried again, for so long as something is gained by it; one that lasts is not."""

import pytest

from infra.train.loop import Diverged
from infra.train.restarts import FADE_SECONDS, Faults, Restarts, root, sentence

LOST = {1: RuntimeError("The actor died unexpectedly.")}


def test_so_many_starts_in_vain_and_no_more():
    restarts = Restarts(3, reached=0)
    assert [restarts.again(LOST, 0) for _ in range(4)] == [True, True, True, False]
    assert not Restarts(0, reached=0).again(LOST, 0)


def test_progress_forgives():
    restarts = Restarts(1, reached=20)
    assert [restarts.again(LOST, step) for step in (20, 40, 60, 80, 80, 80)] == [True, True, True, True, True, False]


@pytest.mark.parametrize(
    "error", [ValueError("no"), Diverged("The loss", 3), KeyError("x"), TypeError("t"), ImportError("i")]
)
def test_what_lasts_is_told_at_once(error):
    assert not Restarts(9, reached=0).again({0: RuntimeError("Connection closed by peer"), 1: error}, 100)


@pytest.mark.parametrize("error", [OSError(28, "No space"), RuntimeError("CUDA error"), TimeoutError("slow")])
def test_what_may_pass_is_tried_again(error):
    assert Restarts(1, reached=0).again({0: error}, 0)


def test_a_start_that_shows_a_bad_node_was_not_in_vain():
    restarts = Restarts(1, reached=0)
    assert [restarts.again(LOST, 0, elsewhere) for elsewhere in (False, True, False)] == [True, True, False]


def test_a_node_is_done_without_after_two_faults_or_one_of_its_device_until_they_fade():
    now = [0.0]
    faults = Faults(lambda: now[0])
    lost, device = LOST[1], type("AcceleratorError", (RuntimeError,), {})("CUDA error: an illegal memory access")
    for _ in range(2):
        faults.note("", lost)
    faults.note("a", lost)
    faults.note("b", lost)
    for told in (OSError("no room"), TimeoutError(), RuntimeError("The feed gave nothing for steps 1 to 2."), None):
        for _ in range(2):
            faults.note("d", told)
    assert faults.bad() == frozenset()
    faults.note("a", lost)
    faults.note("c", device)
    assert faults.bad() == {"a", "c"}
    now[0] = FADE_SECONDS / 2
    assert faults.bad() == frozenset()
    faults.note("a", lost)
    faults.note("b", lost)
    assert faults.bad() == {"a", "b"}
    now[0] = 10 * FADE_SECONDS
    faults.note("a", lost)
    assert faults.bad() == frozenset()


def test_the_root_is_not_an_echo():
    echo = RuntimeError("Read error: Connection reset by peer")
    cause = OSError("No space left on device")
    assert root({0: echo, 1: cause, 2: echo}) is cause
    wrong = ValueError("wrong")
    assert root({0: cause, 1: echo, 2: wrong}) is wrong
    assert root({}) is None
    assert sentence(RuntimeError("Traceback:\n  at x\nIt is full.\n")) == "It is full."
    assert sentence(RuntimeError()) == "RuntimeError()"
