"""What a step reports and a training logs is a gauge that Prometheus can scrape, and that the dashboard asks for."""

import json
import re
import sys
import time
import types
import urllib.request
from pathlib import Path

import pytest

from infra import gauges
from infra.data.run import run_shards
from infra.gauges import METRICS, PREFIX, Gauges, place_of
from infra.metrics import Progress, ScalarLog, counting
from tests.infra.data.test_run import Numbers

DASHBOARD = json.loads((Path(__file__).parents[2] / "infra/deploy/grafana/rescribe.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(gauges.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def told(monkeypatch, clock):
    """What gauges are set to, by metric and labels; Ray is up."""
    told = {}

    class Gauge:
        def __init__(self, name, description, tag_keys):
            assert description
            self.name, self.keys = name, tag_keys

        def set(self, value, tags):
            assert tags.keys() == {*self.keys}
            told[self.name, *(f"{key}={value}" for key, value in sorted(tags.items()))] = value

    ray = types.SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.util.metrics", types.SimpleNamespace(Gauge=Gauge))
    monkeypatch.setattr(gauges, "_gauges", {})
    return told


def test_figures_go_by_their_names_and_labels(told):
    one = Gauges("mix", "0123456789abcdef")
    one({"done": 3, "rows_per_second": 1.5, "a/mse": 0.25, "a/lr": 0.1, "no name!": 1, "bad": float("nan")}, "shards")
    place = ("artifact=0123456789abcdef", "step=mix")
    assert told == {
        ("rescribe_done", *place, "unit=shards"): 3,
        ("rescribe_rows_per_second", *place): 1.5,
        ("rescribe_loss", "artifact=0123456789abcdef", "loss=a/mse", "step=mix"): 0.25,
        ("rescribe_lr", *place, "update=a"): 0.1,
        ("rescribe_no_name_", *place): 1,
    }


def test_they_are_set_once_a_second_at_most(told, clock):
    one = Gauges("mix")
    for value in range(5):
        one({"done": value}, "shards")
    assert [*told.values()] == [0]
    clock[0] += 1
    one({"done": 7}, "shards")
    assert [*told.values()] == [7]


def test_they_are_set_again_until_they_are_closed(told, clock, monkeypatch):
    """Ray forgets what is not set again."""
    monkeypatch.setattr(gauges, "KEEP_SECONDS", 0.05)
    monkeypatch.setattr(gauges, "_keeper", gauges._Keeper())
    one, other = Gauges("mix"), Gauges("encode")
    one({"done": 1}, "shards")
    one({"done": 2}, "shards")  # too soon, but the last word counts
    other({"done": 5}, "shards")
    time.sleep(0.3)
    assert sorted(told.values()) == [2, 5]
    one.close()
    time.sleep(0.1)
    told.clear()
    time.sleep(0.2)
    assert [*told.values()] == [5]
    del other
    time.sleep(0.1)
    told.clear()
    time.sleep(0.2)
    assert not told, "who is forgotten is not told of"


@pytest.mark.parametrize("ray", [None, types.SimpleNamespace(is_initialized=lambda: False)])
def test_nothing_happens_without_ray(monkeypatch, told, ray):
    monkeypatch.setitem(sys.modules, "ray", ray)
    Gauges("mix")({"done": 1}, "shards")
    assert not told


@pytest.mark.parametrize(
    ("folder", "place"),
    [
        ("/runs/train_prior/0123456789abcdef", ("train_prior", "0123456789abcdef", "")),
        ("s3://b/runs/mix/0123456789abcdef.2/", ("mix", "0123456789abcdef.2", "")),
        ("/runs/train_captioner/0123456789abcdef/base", ("train_captioner", "0123456789abcdef", "base")),
        ("/0123456789abcdef/elsewhere", ("elsewhere", "", "")),
        ("elsewhere", ("elsewhere", "", "")),
        ("0123456789abcdef/0123456789abcdef0", ("0123456789abcdef0", "", "")),
    ],
)
def test_a_folder_says_of_which_step_it_is(folder, place):
    assert place_of(folder) == place


# A real scrape.


def scrape(port: int) -> dict[str, float]:
    """The newest value of each of our gauges by `name{step,label}`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^(ray_rescribe_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        known = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        further = [known[key] for key in ("unit", "loss", "update") if known.get(key)]
        found[", ".join([name, known["step"], known["artifact"], *further])] = float(value)
    return found


@pytest.mark.timeout(120)
def test_prometheus_finds_what_a_step_and_a_training_tell(ray_cluster, tmp_path):
    import ray

    place = tmp_path / "train_prior" / "fedcba9876543210"
    log = ScalarLog(str(place), 0)
    with Progress("numbers", gauges=Gauges("numbers", "0123456789abcdef")) as progress:
        report = counting(progress, "captions", of="accepted", times=2)
        assert run_shards(Numbers(), [f"{n:06d}" for n in range(6)], str(tmp_path / "out"), report=report)
        log(10, {"prior/codes": 0.5, "prior/lr": 0.25, "model_flops_per_second": 1e12, "rows_per_second": 64.0})
        wanted = {
            "ray_rescribe_done, numbers, 0123456789abcdef, shards": 6,
            "ray_rescribe_total, numbers, 0123456789abcdef, shards": 6,
            "ray_rescribe_queued, numbers, 0123456789abcdef, shards": 0,
            "ray_rescribe_rows, numbers, 0123456789abcdef": 30,
            "ray_rescribe_accepted, numbers, 0123456789abcdef": 30,
            "ray_rescribe_rejected, numbers, 0123456789abcdef": 0,
            "ray_rescribe_captions, numbers, 0123456789abcdef": 60,
            "ray_rescribe_loss, train_prior, fedcba9876543210, prior/codes": 0.5,
            "ray_rescribe_lr, train_prior, fedcba9876543210, prior": 0.25,
            "ray_rescribe_model_flops_per_second, train_prior, fedcba9876543210": 1e12,
            "ray_rescribe_rows_per_second, train_prior, fedcba9876543210": 64,
        }
        (node,) = ray.nodes()
        deadline, found = time.monotonic() + 60, {}
        while not wanted.items() <= found.items() and time.monotonic() < deadline:
            time.sleep(0.5)
            found = scrape(node["MetricsExportPort"])
        assert {name: found.get(name) for name in wanted} == wanted
        assert found["ray_rescribe_rows_per_second, numbers, 0123456789abcdef"] > 0
        assert found["ray_rescribe_stalled_seconds, numbers, 0123456789abcdef"] >= 0
    log.close()


# Grafana


def expressions():
    return [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


def test_every_metric_of_the_dashboard_is_exported():
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
    from ray.data._internal.execution.interfaces.op_runtime_metrics import OpRuntimeMetrics

    ours = {f"ray_{PREFIX}{name}" for name in METRICS}
    rays = {f"ray_{name}" for name in METRICS_GAUGES} | {
        f"ray_data_{each.name}" for each in OpRuntimeMetrics.get_metrics()
    }
    asked = {name for _, expression in expressions() for name in re.findall(r"\bray_\w+", expression)}
    assert asked <= ours | rays, asked - ours - rays
    assert ours <= asked, "what is exported is shown"
    assert {name for name in asked - ours if name.startswith("ray_rescribe")} == set()


def test_every_label_of_the_dashboard_is_one_that_the_metric_has():
    for title, expression in expressions():
        for by, name in re.findall(r"by \(([^)]*)\) \(ray_rescribe_(\w+)", expression):
            known = {"step", "artifact", METRICS[name][1]}
            assert {label.strip() for label in by.split(",")} <= known, title
        shown = set(re.findall(r"by \(([^)]*)\)", expression)[0].replace(" ", "").split(","))
        (legend,) = {t["legendFormat"] for p in PANELS for t in p["targets"] if t["expr"] == expression}
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= shown, title
        assert expression.count("(") == expression.count(")")
        assert expression.count("{") == expression.count("}")


def test_the_dashboard_can_be_imported():
    """What Grafana's schema of a dashboard demands, as far as it matters."""
    assert isinstance(DASHBOARD["title"], str)
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", DASHBOARD["uid"])
    assert DASHBOARD.get("id") is None, "an id would be of somebody's Grafana"
    assert 36 <= DASHBOARD["schemaVersion"] <= 42
    identities = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identities)) == len(identities)
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in PANELS:
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert panel["fieldConfig"]["defaults"]["unit"]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"])))
    assert used <= variables.keys()
