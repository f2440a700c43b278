"""Groups follow one another for as long as something is gained by it, and what befell the last one is said."""

import signal
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import ray

from infra import notice as notices
from infra.cluster import Cluster
from infra.train import group, seats, trainer
from infra.train.fit import fit
from infra.train.group import GROWS, STOPPED, TAKEN, Group, Growth
from infra.train.loop import DoesNotFitError, TrainConfig
from infra.train.worker import Job, Training
from tests.infra.train import toy
from tests.infra.train.drive import groups

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def training(ray_cluster, tmp_path):
    toy.write_rows(f"{tmp_path}/rows")
    return Training(toy.Toy(), [f"{tmp_path}/rows"], TrainConfig(steps=5), f"{tmp_path}/out")


def fit_with(monkeypatch, training, outcome, **cluster):
    """Fit with groups that end as `outcome(number, notice)` says: why, and failures."""

    class Scripted(Group):
        def run(self, report, notice, say, first_step):
            self.why, failures = outcome(self.number, notice)
            return failures

    monkeypatch.setattr(group, "Group", Scripted)
    fit([training], Cluster(name="test", **cluster), lambda *_, **__: None)


def test_groups_that_end_without_a_word_are_not_started_for_ever(monkeypatch, training, tmp_path):
    with pytest.raises(RuntimeError, match="ended before all was trained, and none said why"):
        fit_with(monkeypatch, training, lambda number, notice: ("", {}), restarts=2)
    assert len(groups(tmp_path, "begins")) == 3


def test_want_of_memory_starts_again_with_half_the_rows_and_is_no_start_in_vain(monkeypatch, training, capsys):
    taken = []

    class Scripted(Group):
        def run(self, report, notice, say, first_step):
            most = self._job.most[training.out]
            taken.append(self._job.cluster.micro_batches(64, self.size, most)[0])
            text = f"{taken[-1]} rows at once do not fit."
            return {0: RuntimeError("Connection closed by peer"), 1: DoesNotFitError(text, taken[-1], training.out)}

    monkeypatch.setattr(group, "Group", Scripted)
    cluster = Cluster(name="test", workers=(2, 2), restarts=0, micro_batch=12)
    for _ in range(2):  # the same line again knows it
        with pytest.raises(RuntimeError, match="a single row does not fit: 1 rows at once do not fit"):
            fit([training], cluster, lambda *_, **__: None)
    assert taken == [12, 6, 3, 1, 1]
    assert "From now on 3 are taken at once" in capsys.readouterr().err


def test_a_node_over_which_groups_fall_is_left_out_and_named(monkeypatch, training, capsys):
    """It falls twice, and then on another node, of which no more than that is known."""
    without = []

    class Scripted(Group):
        def run(self, report, notice, say, first_step):
            without.append(self._left_out())
            self._where = {0: "good", 1: "good" if "bad" in without[-1] else "bad"}
            self._failures = {0: RuntimeError("Connection reset by peer"), 1: RuntimeError("The actor died.")}
            return self._failures

    monkeypatch.setattr(group, "Group", Scripted)
    monkeypatch.setattr(seats, "spared", lambda nodes, *_: nodes & {"bad"})
    monkeypatch.setattr(seats, "take", lambda *_, left_out, **__: (["node"] * (2 - len(left_out)), ExitStack()))
    with pytest.raises(RuntimeError, match="The actor died"):
        fit([training], Cluster(name="test", workers=(1, 2), restarts=2), lambda *_, **__: None)
    assert without == [frozenset()] * 2 + [frozenset(["bad"])] * 2
    assert "Node bad is left out for now, since groups of workers fell there." in capsys.readouterr().err


def test_a_notice_whose_save_fails_says_what_was_lost(monkeypatch, training, capsys):
    def outcome(number, notice):
        notice._note(signal.SIGTERM, None)
        return "told to stop", {0: OSError("There is no room left for /out.")}

    with pytest.raises(SystemExit) as ended:
        fit_with(monkeypatch, training, outcome)
    assert ended.value.code == 143
    said = capsys.readouterr().err
    assert "There is no room left for /out. What was trained since the last checkpoint is not saved." in said


def test_a_signal_and_its_echo_are_one(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(notices, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    told = notices.Notice()
    told._note(signal.SIGTERM, None)
    clock[0] += notices.ECHO_SECONDS / 2
    told._note(signal.SIGTERM, None)
    assert told.given()
    clock[0] += notices.ECHO_SECONDS
    with pytest.raises(SystemExit):
        told._note(signal.SIGTERM, None)


def test_a_group_whose_places_are_taken_waits_and_says_so(monkeypatch, training, capsys):
    def outcome(number, notice):
        return (TAKEN, {}) if number < 9 else ("", {0: ValueError("enough")})

    with pytest.raises(RuntimeError, match="enough"):
        fit_with(monkeypatch, training, outcome, restarts=0)
    assert "Training waits: the places of its 1 workers were taken by others." in capsys.readouterr().err


def test_what_the_driver_itself_cannot_do_is_a_failure(monkeypatch, training):
    def run(*_, **__):
        raise OSError("There is no room left for /tmp.")

    monkeypatch.setattr(trainer, "run", run)
    group = Group(Job([training], [{}], Cluster(name="test")), 0, None, 1, [], Growth(30, 1), ExitStack())
    group._fit()
    assert str(group._failures[-1]) == "There is no room left for /tmp."


def test_a_group_that_is_stopped_before_it_trains_says_so(monkeypatch, training, ray_cluster):

    def starts(self):
        deadline = time.monotonic() + 20
        while not self.why and time.monotonic() < deadline:
            time.sleep(0.01)

    monkeypatch.setattr(Group, "_fit", starts)
    board = SimpleNamespace(open=SimpleNamespace(remote=lambda *_: ray.put(None)))
    group = Group(Job([training], [{}], Cluster(name="test")), 0, board, 1, [], Growth(30, 1), ExitStack())
    notice = SimpleNamespace(given=lambda: True)
    assert group.run(lambda *_, **__: None, notice, lambda _: None, lambda: None) == {}
    assert group.why == STOPPED


def test_growing_in_vain_is_tried_less_and_less_often_until_other_nodes_are_there():
    nodes = {"a", "b"}
    growth = Growth(30, 8, lambda: frozenset(nodes))
    assert growth.seconds() == 30
    growth.came(4, 4)
    assert growth.seconds() == 60
    growth.came(4, 3)
    assert growth.seconds() == 120
    nodes.add("c")
    assert growth.seconds() == 30, "a node has joined"
    growth.came(4, 4)
    assert growth.seconds() == 240
    growth.came(4, 6)
    assert growth.seconds() == 30
    for _ in range(99):
        growth.came(6, 6)
    assert growth.seconds() == 30 * 2**7


def test_a_group_that_cannot_grow_is_not_ended_over_and_over(monkeypatch, training):
    """Seats that are found and come to nothing: the time until they are looked for again doubles."""
    waited = []

    class Scripted(Group):
        def run(self, report, notice, say, first_step):
            waited.append(self._growth.seconds())
            self.why = GROWS if self.number < 4 else ""
            return {} if self.number < 4 else {0: ValueError("enough")}

    monkeypatch.setattr(group, "Group", Scripted)
    monkeypatch.setattr(seats, "take", lambda *_, **__: (["node"] * 2, ExitStack()))
    with pytest.raises(RuntimeError, match="enough"):
        fit([training], Cluster(name="test", workers=(1, 8), grow_seconds=3), lambda *_, **__: None)
    assert waited == [3, 6, 12, 24, 48]
