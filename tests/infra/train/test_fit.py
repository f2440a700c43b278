"""Ray Train, ZeRO and the Ray Data feed together compute what one plain process does, whatever is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra.cluster import Cluster
from infra.metrics import read_scalars
from infra.train import checkpoint
from infra.train.fit import Training, fit
from infra.train.loop import TrainConfig
from tests.infra.train import toy

CONFIG = {"steps": 12, "batch": 10, "log_every_steps": 1, "save_every_steps": 6}


def quiet(*_, **__):
    pass


@pytest.mark.timeout(180)
def test_fit_equals_the_plain_loop_and_is_a_no_op_again(ray_cluster, place, tmp_path):
    toy.write_rows(f"{place}/rows")
    seen = []
    cluster = Cluster(name="two", workers=(2, 2), zero_stage=2, micro_batch=3)
    arguments = ([Training(toy.Toy(), [f"{place}/rows"], TrainConfig(**CONFIG), f"{place}/out")], cluster)
    result = fit(*arguments, lambda done, total, unit, **figures: seen.append((done, total, unit)))
    _, losses = toy.plain(str(tmp_path / "plain"))
    assert [row["net/token"] for row in read_scalars(f"{place}/out")] == pytest.approx(losses, rel=1e-4)
    assert result["rows"] == toy.ROWS
    assert result["step"] == 12
    assert all(total == 12 and unit == "steps" for _, total, unit in seen)
    started = time.monotonic()
    assert fit(*arguments, quiet) == result
    assert time.monotonic() - started < 2


@pytest.mark.timeout(60)
def test_no_usable_row_is_said_before_anything_starts(ray_cluster, tmp_path):
    class Picky(toy.Toy):
        def where(self, columns):
            return columns["row"] < 0

    toy.write_rows(f"{tmp_path}/rows")
    training = Training(Picky(), [f"{tmp_path}/rows"], TrainConfig(**CONFIG), f"{tmp_path}/out")
    with pytest.raises(ValueError, match="No row is left"):
        fit([training], Cluster(name="one"), quiet)


DRIVER = """
import sys
from infra.cluster import Cluster
from infra.train.fit import Training, fit
from infra.train.loop import TrainConfig
from tests.infra.train import toy
place = sys.argv[1]
config = TrainConfig(steps=400, batch=10, log_every_steps=5, save_every_steps=20)
training = Training(toy.Toy(), [f"{place}/rows"], config, f"{place}/out")
fit([training], Cluster(name="two", workers=(2, 2)), lambda *a, **k: None)
"""


def start_driver(place):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", DRIVER, str(place)], env=environment)


def wait_for_step(place, step, driver):
    while not any(row["step"] >= step for row in read_scalars(f"{place}/out")):
        assert driver.poll() is None, "the driver ended before the step came"
        time.sleep(0.05)


def finish(place, driver, tmp_path):
    assert driver.wait(120) == 0
    rows = read_scalars(f"{place}/out")
    assert [row["step"] for row in rows] == list(range(5, 401, 5))
    _, losses = toy.plain(str(tmp_path / "plain"), steps=400, save_every_steps=400)
    assert [row["net/token"] for row in rows] == pytest.approx(losses[4::5], rel=1e-3)


@pytest.mark.faults
@pytest.mark.timeout(240)
def test_sigkill_of_the_driver(tmp_path):
    toy.write_rows(f"{tmp_path}/rows")
    driver = start_driver(tmp_path)
    try:
        wait_for_step(tmp_path, 60, driver)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert checkpoint.newest(f"{tmp_path}/out/checkpoints")
        driver = start_driver(tmp_path)
        finish(tmp_path, driver, tmp_path)
    finally:
        driver.kill()


@pytest.mark.faults
@pytest.mark.timeout(240)
def test_sigkill_of_a_worker(tmp_path):
    toy.write_rows(f"{tmp_path}/rows")
    driver = start_driver(tmp_path)
    try:
        wait_for_step(tmp_path, 60, driver)
        family = psutil.Process(driver.pid).children(recursive=True)
        workers = [process for process in family if "RayTrainWorker" in " ".join(process.cmdline())]
        assert len(workers) == 2
        workers[1].kill()
        finish(tmp_path, driver, tmp_path)
    finally:
        driver.kill()
