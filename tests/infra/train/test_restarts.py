"""A fault that passes is tried again, for so long as something is gained by it; one that lasts is not."""

import pytest

from infra.train.loop import Diverged
from infra.train.restarts import Restarts, root, sentence

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


def test_the_root_is_not_an_echo():
    echo = RuntimeError("Read error: Connection reset by peer")
    cause = OSError("No space left on device")
    assert root({0: echo, 1: cause, 2: echo}) is cause
    wrong = ValueError("wrong")
    assert root({0: cause, 1: echo, 2: wrong}) is wrong
    assert root({}) is None
    assert sentence(RuntimeError("Traceback:\n  at x\nIt is full.\n")) == "It is full."
    assert sentence(RuntimeError()) == "RuntimeError()"
