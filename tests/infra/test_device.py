"""The Cluster decides which device a process computes on, and not what its machine happens to have."""

import json
import os
import subprocess
import sys

import pytest
import ray.train.torch
import torch
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager as Nvidia

from infra import device
from infra.cluster import laptop, one_gpu
from infra.data.stage import ACCEPTED
from infra.data.work import StageWork
from infra.train import spare, trainer

NAMES = ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Of this process, as it is where nobody has decided; put back at the end."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return os.environ


class Group:
    """A worker, in this process."""

    def execute(self, function, *arguments):
        function(*arguments)


def started(monkeypatch, cluster):
    begun = []
    monkeypatch.setattr(ray.train.torch.TorchConfig().backend_cls, "on_start", lambda *_: begun.append(1))
    monkeypatch.setattr(trainer, "keep_to_loopback", lambda: None)
    config = trainer._Config(backend=cluster.backend)
    config.backend_cls().on_start(Group(), config)
    return bool(begun)


def test_without_gpus_a_worker_finds_no_cuda(monkeypatch, environment):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert started(monkeypatch, laptop())
    assert {name: environment.get(name) for name in NAMES} == {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    ("cuda", "kind", "sentence"),
    [
        (None, ValueError, "was built without CUDA. Install a build that has it, or choose --cluster laptop"),
        (
            "13.0",
            RuntimeError,
            r"gave a process a GPU, but torch .* finds none\. See whether `nvidia-smi` .* CUDA 13\.0",
        ),
    ],
)
def test_gpus_that_are_not_there_are_a_sentence(monkeypatch, environment, cuda, kind, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(kind, match=sentence):
        started(monkeypatch, one_gpu())


def test_what_ray_dealt_out_stays(monkeypatch, environment):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert started(monkeypatch, one_gpu())
    assert {name: environment.get(name) for name in NAMES} == {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "3"}


class Look:
    """A stage that is given `gpus`."""

    reads, writes, cpus = (), (), 1

    def __init__(self, gpus):
        self.gpus = gpus

    def setup(self):
        self.found = os.environ.get("CUDA_VISIBLE_DEVICES")

    def __call__(self, batch):
        return {"state": [ACCEPTED]}


def test_actors_have_the_device_of_their_stages(monkeypatch, environment):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    stages = (Look(0), Look(0))
    StageWork(stages, (), 1).setup()
    assert [stage.found for stage in stages] == ["", ""]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((ValueError, RuntimeError), match="gave a process a GPU"):
        StageWork((Look(0), Look(1)), (), 1).setup()


@pytest.mark.parametrize("found", [True, False])
def test_a_spare_loads_deepspeed_where_it_will_see_no_gpu(monkeypatch, environment, found):
    """Whatever lies in /dev, as on WSL2, where a GPU has no `nvidiactl`."""
    monkeypatch.setattr(os.path, "exists", lambda path: found)
    loaded = []
    monkeypatch.setitem(sys.modules, "infra.train.zero", None)  # to import it raises
    monkeypatch.setattr(spare, "suppress", lambda *_: Told(loaded))
    for gpus in (0, 1):
        monkeypatch.setenv("DS_ACCELERATOR", device.variables(gpus)["DS_ACCELERATOR"])
        spare.load()
    assert loaded == [True, False]


class Told:
    """Whether the body raised."""

    def __init__(self, raised):
        self.raised = raised

    def __enter__(self):
        pass

    def __exit__(self, kind, *_):
        self.raised.append(kind is not None)
        return True


@pytest.mark.parametrize(("listed", "visible", "count"), [(2, None, 2), (2, "1", 1), (2, "", 0), (0, "0", 0)])
def test_gpus_are_counted_as_ray_counts_them(monkeypatch, environment, listed, visible, count):
    monkeypatch.setattr(device, "has_driver", lambda: True)
    monkeypatch.setattr(Nvidia, "get_current_node_num_accelerators", staticmethod(lambda: listed))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device.count() == count


def test_without_a_driver_ray_counts_none_either(monkeypatch):
    if not device.has_driver():
        assert Nvidia.get_current_node_num_accelerators() == device.count() == 0
    monkeypatch.setattr(device, "has_driver", lambda: False)
    assert device.count() == 0


CARD = """
import os
exists = os.path.exists
os.path.exists = lambda path: path == "/dev/nvidiactl" or exists(path)
from infra.train import zero
from deepspeed.accelerator import get_accelerator
print(get_accelerator().device_name())
"""


@pytest.mark.timeout(60)
def test_deepspeed_does_not_follow_what_lies_in_dev(environment):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CARD], capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1:] == ["cpu"], done.stderr[-2000:]


GROUP = """
import json, os, sys, ray
from infra.cluster import Cluster
from infra.private import loopback
from infra.train import trainer
from infra.train.restarts import LASTING, root, sentence

def work(arguments):
    with open(arguments["out"], "w") as file:
        file.write(json.dumps({name: os.environ.get(name) for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")}))

with loopback():
    ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level=40)
for gpus in (0, 1):
    cluster, out = Cluster(name="test", gpus_per_worker=gpus), f"{sys.argv[1]}/{gpus}.json"
    failures, _ = trainer.run(work, {"out": out}, cluster, 1, [], {}, begun=lambda _: None)
    print(json.dumps([isinstance(root(failures), LASTING), sentence(root(failures))] if failures else open(out).read()))
"""


@pytest.mark.faults
@pytest.mark.timeout(180)
def test_a_group_has_it_in_its_environment_and_its_failure_is_the_sentence(tmp_path, environment):
    """On a machine that Ray takes to have a GPU, and that has none."""
    (tmp_path / "group.py").write_text(GROUP)
    line = [sys.executable, "-W", "ignore", str(tmp_path / "group.py"), str(tmp_path)]
    here = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=here)
    assert len(done.stdout.splitlines()) == 2, done.stderr[-2000:]
    without, (lasting, told) = map(json.loads, done.stdout.splitlines())
    assert json.loads(without) == {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    assert "gave a process a GPU, but torch" in told
    assert told.endswith(".")
    assert lasting == ("built without CUDA" in told)
