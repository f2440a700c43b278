"""MLflow and W&B are told what is logged, from a thread, under one run a training; what is missing is said at once."""

import importlib.util
import json
import sys
import threading
import time
import types
from dataclasses import replace

import pytest

from infra.cluster import laptop
from infra.config import to_dict
from infra.store import Store
from infra.track import check_installed, tracked

FOLDER = "/store/train_prior/0123456789abcdef"
TITLE = "train_prior/0123456789abcdef"


class FakeServer:
    """What MLflow's client and W&B's module share: they keep what they are told."""

    def __init__(self):
        self.runs, self.logged, self.ended, self.settings = {}, [], [], {}
        self.threads, self.fails, self.seconds = set(), 0, 0

    def take(self, step, figures):
        time.sleep(self.seconds)
        self.threads.add(threading.current_thread().name)
        if self.fails:
            self.fails -= 1
            raise ConnectionError("no answer")
        self.logged.append((step, figures))


@pytest.fixture
def server(monkeypatch):
    """Both modules, as far as they are used."""
    server = FakeServer()

    class Client:
        def get_experiment_by_name(self, name):
            return types.SimpleNamespace(experiment_id=name) if name in server.runs else None

        def create_experiment(self, name):
            server.runs[name] = []
            return name

        def search_runs(self, experiments, filter_string, max_results):
            return [run for run in server.runs[experiments[0]] if filter_string == f"tags.rescribe = '{run.title}'"]

        def create_run(self, experiment, run_name, tags):
            info = types.SimpleNamespace(run_id=f"run{len(server.runs[experiment])}")
            run = types.SimpleNamespace(info=info, title=tags["rescribe"])
            server.runs[experiment].append(run)
            return run

        def update_run(self, identity, status):
            pass

        def log_batch(self, identity, metrics):
            server.take(metrics[0].step, {metric.key: metric.value for metric in metrics})

        def set_terminated(self, identity):
            server.ended.append(identity)

    def metric(key, value, timestamp, step):
        return types.SimpleNamespace(key=key, value=value, timestamp=timestamp, step=step)

    def init(**settings):
        server.settings = settings
        log = lambda figures, step: server.take(step, figures)  # noqa: E731
        return types.SimpleNamespace(log=log, finish=lambda: server.ended.append(settings["id"]))

    modules = {
        "mlflow": types.SimpleNamespace(MlflowClient=Client),
        "mlflow.entities": types.SimpleNamespace(Metric=metric),
        "wandb": types.SimpleNamespace(init=init, Settings=dict),
    }
    for name, module in modules.items():
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return server


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_what_is_logged_is_told_in_order_from_a_thread(server, name):
    server.seconds = 0.05
    with tracked([name], FOLDER) as tell:
        began = time.perf_counter()
        for step in range(10):
            tell(step, {"prior/codes": 1.0 / (step + 1), "prior/grad_norm": float("inf")})
        assert time.perf_counter() - began < 0.2, "training does not wait"
    assert server.logged == [(step, {"prior/codes": 1.0 / (step + 1)}) for step in range(10)]
    assert server.threads == {name}
    assert len(server.ended) == 1


def test_a_training_that_goes_on_is_the_same_run(server):
    for _ in range(2):
        with tracked(["mlflow", "wandb"], FOLDER) as tell:
            tell(1, {"a/loss": 1.0})
    with tracked(["mlflow"], "/store/train_captioner/0123456789abcdef/base") as tell:
        tell(1, {"a/loss": 1.0})
    assert [run.title for run in server.runs["rescribe"]] == [TITLE, "train_captioner/0123456789abcdef/base"]
    assert server.settings["id"] == TITLE.replace("/", "-")
    assert server.settings["resume"] == "allow"
    assert server.settings["project"] == "rescribe"
    assert len(server.logged) == 5


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_server_that_fails_is_said_once_and_harms_nothing(server, name, capfd):
    server.fails = 3
    with tracked([name], FOLDER) as tell:
        for step in range(5):
            tell(step, {"a/loss": 1.0})
    assert [step for step, _ in server.logged] == [3, 4]
    assert capfd.readouterr().err == f"rescribe: {name} took no figures: no answer Training goes on.\n"


def test_who_cannot_begin_says_so_at_once(server, monkeypatch):
    def refuse(**_):
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(ValueError, match="wandb could not begin: api_key not configured"), tracked(["wandb"], FOLDER):
        pass
    monkeypatch.setattr("infra.track.BEGIN_SECONDS", 0.2)
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: time.sleep(1))
    with pytest.raises(ValueError, match=r"wandb did not answer for 0\.2 s"), tracked(["wandb"], FOLDER):
        pass


def test_a_package_that_is_missing_is_said_before_anything_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"names wandb, which is not installed\. Install rescribe\[wandb\]"):
        Store(str(tmp_path / "store"), replace(laptop(), track=("wandb",)))
    assert not (tmp_path / "store").exists()
    check_installed(())


def test_nobody_is_told_where_nobody_is_named():
    before = threading.enumerate()
    with tracked((), FOLDER) as tell:
        tell(1, {"a/loss": 1.0})
        assert {*threading.enumerate()} <= {*before}


def test_no_secret_is_in_what_a_manifest_keeps(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hush-hush")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hush-hush@example.org")
    cluster = replace(laptop(), track=("mlflow", "wandb"))
    assert "hush" not in json.dumps(to_dict(cluster))


# The real ones, where they are installed.


def test_mlflow_itself(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/runs")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for start in (0, 2):
        with tracked(["mlflow"], FOLDER) as tell:
            for step in (start, start + 1):
                tell(step, {"prior/codes": step / 2})
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("rescribe").experiment_id])
    assert (run.info.run_name, run.info.status) == (TITLE, "FINISHED")
    history = client.get_metric_history(run.info.run_id, "prior/codes")
    assert [(each.step, each.value) for each in history] == [(step, step / 2) for step in range(4)]


def test_wandb_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with tracked(["wandb"], FOLDER) as tell:
        tell(1, {"prior/codes": 0.5})
    (written,) = tmp_path.glob(f"wandb/offline-run-*-{TITLE.replace('/', '-')}/*.wandb")
    deadline = time.monotonic() + 10
    while b"prior/codes" not in written.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"prior/codes" in written.read_bytes()
