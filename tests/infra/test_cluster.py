"""A Cluster says how many workers share a batch, and refuses what cannot be."""

import os
import sys
from contextlib import nullcontext as nothing
from dataclasses import replace

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray._private import services
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager as Nvidia

from infra import device
from infra.capacity import Node, missing
from infra.cluster import CLUSTERS, Cluster, _apart, connect, laptop, this_machine


@given(st.integers(1, 8), st.integers(0, 8), st.integers(1, 64), st.integers(1, 512))
def test_a_worker_has_rows_enough_or_is_alone(low, more, rows, batch):
    cluster = Cluster(name="test", workers=(low, low + more), rows_per_worker=rows)
    least, most = cluster.workers_for(batch)
    assert 1 <= least <= most <= low + more
    assert most == 1 or batch // most >= rows
    if batch >= rows * (low + more):
        assert (least, most) == cluster.workers


@pytest.mark.parametrize(
    "wrong", [{"workers": (0, 1)}, {"workers": (2, 1)}, {"actors": (0, 0)}, {"rows_per_worker": 0}, {"micro_batch": -1}]
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Cluster(name="test", **wrong)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"offload": "optimizer"}, "gpus_per_worker=0"),
        ({"offload": "optimizer", "zero_stage": 0, "gpus_per_worker": 1}, "needs ZeRO stage 1 or more"),
        ({"offload": "parameters", "zero_stage": 2, "gpus_per_worker": 1}, "needs ZeRO stage 3 or more"),
    ],
)
def test_state_moves_only_from_gpus_that_share_it(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Cluster(name="test", **wrong)


def test_fp16_is_for_gpus():
    with pytest.raises(ValueError, match="fp16 is for GPUs, but the workers of cluster 'laptop' have none"):
        laptop().check("fp16")
    for name, precision in [("laptop", "bf16"), ("laptop", "fp32"), ("one_node", "fp16"), ("elastic", "bf16")]:
        CLUSTERS[name]().check(precision)


def test_weights_that_are_needed_whole_are_not_spread():
    with pytest.raises(ValueError, match="stage 2 or less"):
        Cluster(name="test", zero_stage=3).check("fp32", whole_weights=True)
    Cluster(name="test", zero_stage=3).check("fp32")
    Cluster(name="test", zero_stage=2).check("fp32", whole_weights=True)


def test_every_named_cluster_stands():
    for name, make in CLUSTERS.items():
        assert make().name == name


@pytest.fixture
def cards(monkeypatch):
    """Has this machine have so many NVIDIA GPUs, and so many cores."""

    def have(gpus, cores=16):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(device, "has_driver", lambda: True)
        monkeypatch.setattr(Nvidia, "get_current_node_num_accelerators", staticmethod(lambda: gpus))
        monkeypatch.setattr(os, "cpu_count", lambda: cores)

    return have


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
@pytest.mark.parametrize("cores", [2, 16, 128])
def test_if_nothing_is_said_all_gpus_are_used_and_this_is_told(cards, capsys, gpus, cores):
    cards(gpus, cores)
    found, told = this_machine(), capsys.readouterr().err
    if not gpus:
        assert (found, told) == (laptop(), "")
        return
    assert found.workers == (gpus, gpus)
    assert (found.gpus_per_worker, found.gpus_per_actor, found.actors) == (1, 1, (1, max(2, gpus)))
    assert ("a GPU," if gpus == 1 else f"{gpus} GPUs, ") in told
    assert "--cluster laptop leaves GPUs alone" in told
    node = Node(name="here", cpus=max(8, 2 * cores), gpus=gpus)  # as Ray is started here
    if cores >= gpus:
        assert missing(found, [node], batches=[256], decodes=True, free_gb=0) == []


@pytest.mark.parametrize("name", ["one_gpu", "one_node", "laptop"])
@pytest.mark.parametrize("gpus", [0, 4])
def test_gpus_that_are_not_there_are_said_before_ray_starts(cards, monkeypatch, gpus, name):
    cards(gpus)
    begun = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: begun.append(1))
    lack = not gpus and name != "laptop"
    with (
        pytest.raises(ValueError, match=f"'{name}' asks for GPUs, and Ray finds 0 .*nvidia-smi") if lack else nothing()
    ):
        connect(CLUSTERS[name]())
    assert begun == [1] * (not lack)


@pytest.mark.parametrize(("address", "sentence"), [(None, "did not start"), ("10.0.0.1:6379", "could not be joined")])
def test_a_ray_that_is_not_there_is_a_sentence(monkeypatch, address, sentence):
    def late(**_):
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(RuntimeError, match=f"{sentence}.*timed out during startup") as raised:
        connect(replace(laptop(), address=address))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /x"),
            "RAY_TMPDIR=/tmp",
        ),
        (OSError(28, "No space left on device"), r"did not start on this machine\. \(OSError: .*No space left"),
        (PermissionError(13, "Permission denied"), r"did not start on this machine\. \(PermissionError"),
        (TimeoutError("late"), "may have too much to do"),
    ],
)
def test_why_ray_did_not_start_is_not_guessed(monkeypatch, error, sentence):
    def fail(**_):
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(RuntimeError, match=sentence) as raised:
        connect(laptop())
    assert ("Give the same command again" in str(raised.value)) == ("too much" in sentence)


def test_a_home_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/dev/null/home")
    with pytest.raises(OSError, match=r"token cannot be kept in /dev/null/home/\.ray/auth_token: .*RAY_AUTH_TOKEN"):
        connect(laptop())


def test_what_signals_the_driver_s_group_does_not_reach_ray():
    before = services.ConsolePopen
    for apart in (False, True):
        with _apart() if apart else nothing():
            started = services.start_ray_process([sys.executable, "-c", "input()"], "test", False, pipe_stdin=True)
        try:
            assert (os.getsid(started.process.pid) == os.getsid(0)) is not apart
        finally:
            started.process.kill()
            started.process.communicate()
    assert services.ConsolePopen is before
