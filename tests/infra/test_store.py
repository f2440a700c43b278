"""A step runs once, is found again, continues after a cut, and runs anew when what it is made of changes."""

import json
import multiprocessing
import os
import time
from dataclasses import dataclass

import pytest

from infra import storage
from infra.cluster import Cluster
from infra.config import from_dict, setting, to_dict
from infra.lease import Lease
from infra.store import Artifact, Plan, Step, Store, step

CLUSTER = Cluster(name="test")
CALLS: list[str] = []


@dataclass(frozen=True, kw_only=True)
class NumberConfig:
    value: int = 1


@dataclass(frozen=True, kw_only=True)
class HalfConfig:
    value: float


LISTING = {"files": 3}


@step(version=1, key=lambda config: LISTING["files"])
def number(config: NumberConfig, *, out: str, cluster: Cluster, report) -> dict:
    CALLS.append("number")
    storage.write_json(storage.join(out, "value.json"), config.value)
    return {"value": config.value}


@step(version=1)
def double(config: NumberConfig, source: Artifact, *, out: str, cluster: Cluster, report) -> dict:
    CALLS.append("double")
    if os.environ.get("CUT"):
        storage.write_bytes(storage.join(out, "half"), b"x")
        raise RuntimeError("cut")
    return {"value": 2 * source.summary["value"] + config.value}


def workflow(store, value=1, add=0):
    first = store.step(number, NumberConfig(value=value))
    return store.step(double, NumberConfig(value=add), first)


@pytest.fixture(autouse=True)
def _fresh():
    CALLS.clear()
    LISTING["files"] = 3


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path / "store") if request.param == "local" else f"{request.getfixturevalue('s3')}/store"


def test_once(root):
    made = workflow(Store(root, CLUSTER))
    assert made.summary == {"value": 2}
    again = workflow(Store(root, CLUSTER))
    assert again.manifest == made.manifest
    assert CALLS == ["number", "double"]
    assert [artifact.step for artifact in again.inputs] == ["number"]
    assert Artifact.open(made.path).manifest == made.manifest
    assert "lease.json" not in storage.list_names(made.path)


def test_a_changed_config_runs_itself_and_what_follows(root):
    workflow(Store(root, CLUSTER))
    workflow(Store(root, CLUSTER), add=5)
    assert CALLS == ["number", "double", "double"]
    workflow(Store(root, CLUSTER), value=2)
    assert CALLS[3:] == ["number", "double"]


def test_a_changed_key_runs_anew(root):
    workflow(Store(root, CLUSTER))
    LISTING["files"] = 4
    workflow(Store(root, CLUSTER))
    assert CALLS == ["number", "double"] * 2


def test_the_cluster_is_not_what_it_is_made_of(root):
    a = workflow(Store(root, CLUSTER))
    b = workflow(Store(root, Cluster(name="other", workers=(3, 5), zero_stage=3)))
    assert a.path == b.path


def test_a_cut_step_runs_again(root, monkeypatch):
    monkeypatch.setenv("CUT", "1")
    with pytest.raises(RuntimeError, match="cut"):
        workflow(Store(root, CLUSTER))
    plan = Plan(root)
    workflow(plan)
    assert [line[2] for line in plan.lines] == ["done", "was cut: continues"]
    monkeypatch.delenv("CUT")
    assert workflow(Store(root, CLUSTER)).summary == {"value": 2}
    assert CALLS == ["number", "double", "double"]


def test_a_refused_step_leaves_no_folder(root, tmp_path, monkeypatch):
    def refuse(config: NumberConfig, *, out: str, cluster: Cluster, report) -> dict:
        if storage.is_local(out):
            os.makedirs(os.path.join(out, "parts"))
        raise ValueError("refused")

    monkeypatch.chdir(tmp_path)
    refused = Step(refuse, 1, None, shards=lambda *_: {})
    with pytest.raises(ValueError, match="refused"):
        Store(root, CLUSTER).step(refused, NumberConfig())
    assert not storage.exists(root)
    workflow(Store(root, CLUSTER))
    with pytest.raises(ValueError, match="refused"):
        Store(root, CLUSTER).step(refused, NumberConfig())
    assert storage.list_names(root) == ["double", "number"]
    with Lease(storage.join(root, "refuse", refused.identity(NumberConfig(), ()))), pytest.raises(RuntimeError):
        Store(root, CLUSTER).step(refused, NumberConfig())  # another works there
    plan = Plan(root)
    plan.step(refused, NumberConfig())
    assert plan.lines[0][2] == "first time"


def test_the_plan_compares_with_what_it_is_told_to(root):
    before = [workflow(Store(root, CLUSTER), add=3)]
    time.sleep(1.1)  # the newest by the second
    workflow(Store(root, CLUSTER), add=5)
    for compared, wanted in (((), "value 5 -> 7"), (before, "value 3 -> 7")):
        plan = Plan(root, before=[f"{each.step}/{each.id}" for each in compared])
        workflow(plan, add=7)
        assert plan.lines[1][2] == wanted


def test_an_integer_in_the_field_of_a_float(tmp_path):
    """What was made of one is found by it; so is what was made of a file, in which it was read as a float before."""

    @step()
    def halve(config: HalfConfig, *, out, cluster, report):
        return {"value": config.value / 2}

    store = Store(str(tmp_path / "a"), CLUSTER)
    made = store.step(halve, HalfConfig(value=1))
    plan = Plan(store.root)
    plan.step(halve, from_dict(HalfConfig, json.loads(json.dumps(to_dict(HalfConfig(value=1))))))
    assert plan.lines == [("halve", made.id, "done")]
    plan.step(halve, HalfConfig(value=1.0))
    assert plan.lines[1][2] == "value 1 -> 1.0"

    store = Store(str(tmp_path / "b"), CLUSTER)
    before = store.step(halve, HalfConfig(value=1.0))
    plan = Plan(store.root)
    plan.step(halve, HalfConfig(value=1))
    assert plan.lines == [("halve", before.id, "done")]
    assert store.step(halve, HalfConfig(value=1)).path == before.path


def test_the_plan_says_why(root):
    plan = Plan(root)
    workflow(plan)
    assert [line[2] for line in plan.lines] == ["first time", "first time"]
    made = workflow(Store(root, CLUSTER))
    plan = Plan(root)
    assert workflow(plan).path == made.path
    assert [line[2] for line in plan.lines] == ["done", "done"]
    plan = Plan(root)
    workflow(plan, value=7)
    assert [line[2] for line in plan.lines] == ["value 1 -> 7", "new input: number"]


@dataclass(frozen=True, kw_only=True)
class SlowConfig:
    steps: int = 1
    seed: int = 0


@step(version=1, told=lambda config, inputs, made: [f"{config.steps} steps are told"])
def slow(config: SlowConfig, *, out: str, cluster: Cluster, report) -> dict:
    return {}


def test_the_plan_says_how_long_as_much_took(tmp_path, capsys):
    store, plan = Store(str(tmp_path), CLUSTER), Plan(str(tmp_path))
    made = store.step(slow, SlowConfig())
    assert capsys.readouterr().err.strip().endswith("1 steps are told"), "and no seconds of nothing"
    storage.write_json(made.url("manifest.json"), made.manifest | {"seconds": 200.4})
    told = [plan.told[plan.step(slow, config).id][1:] for config in (SlowConfig(seed=1), SlowConfig(steps=2))]
    assert told == [["about 3 min 20 s, as last time"], []]
    assert plan.told[plan.step(slow, SlowConfig()).id][1:] == [], "it is done"


def test_a_field_that_came_later_is_no_reason(tmp_path):
    """The plan speaks of what was chosen anew, and not of fields that an old manifest could not know."""

    @dataclass(frozen=True, kw_only=True)
    class GrownConfig(NumberConfig):
        later: int = setting(5, since="0.2")

    def grown(config: GrownConfig, *, out: str, cluster: Cluster, report) -> dict: ...

    grown.__name__ = "number"
    root = str(tmp_path)
    old = Store(root, CLUSTER).step(number, NumberConfig())
    for config, wanted in [
        (GrownConfig(), "done"),
        (GrownConfig(value=2), "value 1 -> 2"),
        (GrownConfig(later=6), "later 5 -> 6"),
    ]:
        plan = Plan(root)
        found = plan.step(Step(grown, 1, number.key), config)
        assert plan.lines[0][2] == wanted
        assert (found.path == old.path) == (wanted == "done")


def test_no_artifact_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished artifact"):
        Artifact.open(str(tmp_path))


def test_a_second_driver_is_refused(root):
    with Lease(root), pytest.raises(RuntimeError, match="Another driver"), Lease(root):
        pass
    with Lease(root):  # released
        pass


def _hold(folder, held):
    Lease(folder).__enter__()
    held.set()
    time.sleep(60)


def test_a_dead_driver_holds_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), held))
    process.start()
    assert held.wait(20)
    with pytest.raises(RuntimeError, match="Another driver"), Lease(str(tmp_path)):
        pass
    process.kill()
    process.join()
    with Lease(str(tmp_path)):
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()


def test_a_lease_of_a_silent_host_runs_out(tmp_path):
    record = {"token": "x", "host": "elsewhere", "pid": 1, "born": 0.0, "beat": time.time()}
    (tmp_path / "lease.json").write_text(json.dumps(record))
    with pytest.raises(RuntimeError, match="elsewhere"), Lease(str(tmp_path)):
        pass
    (tmp_path / "lease.json").write_text(json.dumps({**record, "beat": time.time() - 100}))
    with Lease(str(tmp_path)):
        pass
