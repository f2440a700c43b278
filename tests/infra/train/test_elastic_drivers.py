"""The driver goes, told to or not, and the same is asked again; the numbers stay those of an undisturbed run."""

import os
import signal
import time

import pytest

from infra.train import checkpoint, ids
from tests.infra.train import toy
from tests.infra.train.drive import Driver, check, here

CONFIG = {"steps": 200, "batch": 10, "log_every_steps": 5, "save_every_steps": 20}
PAIR = {"workers": (2, 2), "log_ids": True}
pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]


@pytest.fixture
def place(tmp_path):
    toy.write_rows(f"{tmp_path}/rows")
    return tmp_path


def tell_group(pid, sent):
    """As `timeout` does."""
    os.kill(pid, sent)
    time.sleep(0.01)
    os.killpg(pid, sent)


@pytest.mark.parametrize("tell", [os.kill, tell_group], ids=["driver", "group"])
def test_a_driver_that_is_told_to_go_saves_first(ray_cluster, place, tell):
    with Driver(place, CONFIG, task="Slow", **PAIR) as driver:
        driver.wait_for_step(30)
        tell(driver.process.pid, signal.SIGTERM)
        begun = time.monotonic()
        code, said = driver.end(60)
        assert time.monotonic() - begun < 30
    assert code == 143, said
    assert "Saving what is trained" in said
    saved = checkpoint.newest(f"{place}/out/checkpoints")
    assert saved
    step = checkpoint.step_of(saved)
    assert step >= 30
    assert len(ids.read_ids(f"{place}/out/ids")) == step, "no step was lost"
    here(place, CONFIG, **PAIR)
    check(place, CONFIG)


def test_sigkill_of_the_driver(ray_cluster, place):
    with Driver(place, CONFIG, task="Slow", **PAIR) as driver:
        driver.wait_for_step(60)
        driver.process.kill()
        driver.end()
    assert checkpoint.newest(f"{place}/out/checkpoints")
    here(place, CONFIG, **PAIR)
    check(place, CONFIG)
