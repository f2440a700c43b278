"""Workers die and hang under a driver that lives; the numbers stay those of an undisturbed run."""

import time

import pytest
import ray

from infra import storage
from infra.train import checkpoint
from tests.infra.train import toy
from tests.infra.train.drive import Driver, check, groups
from tests.kills import survivors

CONFIG = {"steps": 200, "batch": 10, "log_every_steps": 5, "save_every_steps": 20}
PAIR = {"workers": (2, 2), "log_ids": True}
pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]


@pytest.fixture
def place(tmp_path):
    toy.write_rows(f"{tmp_path}/rows")
    return tmp_path


@pytest.fixture
def on(ray_cluster):
    """The address of the Ray that is up here: no process of it is harmed but this driver's workers."""
    return ray.get_runtime_context().gcs_address


def test_a_worker_that_hangs_is_told_of_and_replaced(on, place):
    with Driver(place, CONFIG, task="Slow", stall_seconds=12, on=on, **PAIR) as driver:
        driver.wait_for_step(30)
        hung = driver.workers()[1]
        hung.suspend()
        stopped = time.time()
        driver.wait(lambda: len(groups(place)) == 1, 40)
        assert groups(place)[0]["at"] - stopped < 30
        code, said = driver.end()
        assert code == 0, said
    assert not survivors({hung.pid: hung})
    assert "says nothing for" in said
    assert f"process {hung.pid}" in said
    check(place, CONFIG)


def stopped_in_a_save(workers, folder):
    """Suspend workers; whether the newest checkpoint then has a part and no commit record, else they go on."""
    for worker in workers:
        worker.suspend()
    newest = checkpoint.place(folder, max(checkpoint.steps(folder), default=0))
    names = storage.list_names(newest)
    if any(name.endswith(".safetensors") for name in names) and checkpoint.COMMIT not in names:
        return True
    for worker in workers:
        worker.resume()
    return False


def test_a_worker_that_hangs_before_it_comes_in_is_replaced(on, place):
    """None has said a word yet: Ray Train finds its actor silent, or else the board misses it."""
    with Driver(place, CONFIG, task="Toy", stall_seconds=12, on=on, **PAIR) as driver:
        driver.wait(lambda: len(driver.workers()) == 2)
        hung = driver.workers()[1]
        hung.suspend()
        driver.wait(lambda: len(groups(place)) == 1, 150)
        code, said = driver.end()
        assert code == 0, said
    assert not survivors({hung.pid: hung})
    assert "Training goes on from what was saved last." in said
    check(place, CONFIG)


def test_killed_twice_within_a_save(on, place):
    config, folder = CONFIG | {"save_every_steps": 1}, f"{place}/out/checkpoints"
    with Driver(place, config, task="Toy", on=on, **PAIR) as driver:
        for number, step in enumerate((30, 60)):
            driver.wait_for_group(number)
            driver.wait_for_step(step)
            workers = driver.workers()
            driver.wait(lambda workers=workers: stopped_in_a_save(workers, folder))
            workers.pop(number).kill()
            for worker in workers:
                worker.resume()
            driver.wait(lambda number=number: len(groups(place)) == number + 1)
        code, said = driver.end()
        assert code == 0, said
    check(place, CONFIG)
