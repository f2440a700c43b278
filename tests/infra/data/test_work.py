import hashlib
import threading

import numpy as np
import pyarrow as pa
import pytest

from infra import storage
from infra.data import work
from infra.data.clock import clocked, taken
from infra.data.images import encode_png
from infra.data.ledger import commit
from infra.data.work import StageWork
from tests.infra.data.zoo import picture

ROWS = 20


class Look:
    """Notes the batches that it is given, and who made its view."""

    writes, cpus, gpus = ("mean",), 1, 0

    def __init__(self, whole):
        self.reads = ("pixels", "sample_id") if whole else ("small", "sample_id")
        self.views = {} if whole else {"small": self.shrink}
        self.batches, self.threads = [], set()

    def setup(self):
        pass

    def shrink(self, pixels):
        self.threads.add(threading.current_thread())
        return pixels[::4, ::4]

    def __call__(self, batch):
        self.batches.append(len(batch["sample_id"]))
        return {"mean": [float(view.mean()) for view in batch[self.reads[0]]]}


@pytest.fixture
def index(tmp_path):
    """An index of twenty pictures, one of which is no picture."""
    images = [encode_png(picture(n)) for n in range(ROWS)]
    images[7] = b"nothing"
    for n, image in enumerate(images):
        storage.write_bytes(str(tmp_path / f"corpus/{n}.png"), image)
    shapes = [picture(n).shape for n in range(ROWS)]
    columns = {
        "sample_id": [f"{n:024x}" for n in range(ROWS)],
        "state": ["accepted"] * ROWS,
        "reason": pa.array([None] * ROWS, pa.string()),
        "source": [str(tmp_path / f"corpus/{n}.png") for n in range(ROWS)],
        "offset": [0] * ROWS,
        "length": [len(image) for image in images],
        "sha256": [hashlib.sha256(image).hexdigest() for image in images],
        "height": [shape[0] for shape in shapes],
        "width": [shape[1] for shape in shapes],
    }
    commit(str(tmp_path / "ingest"), "000000", pa.table(columns))
    return str(tmp_path / "ingest")


def run(stage, index, batch=8):
    whole = StageWork((stage,), (index,), batch)
    whole.setup()
    return whole("000000").to_pylist()


def test_views_are_made_in_threads_and_a_lost_picture_is_a_failed_row(index):
    stage = Look(whole=False)
    rows = run(stage, index)
    assert threading.main_thread() not in stage.threads
    for n, row in enumerate(rows):
        if n == 7:
            assert (row["state"], row["mean"]) == ("failed", None)
            assert row["reason"].startswith("decode_error: image:")
        else:
            assert row["mean"] == pytest.approx(picture(n)[::4, ::4].mean())


def test_large_pictures_come_in_small_batches(index, monkeypatch):
    """So that a hundred photographs do not stand decoded in memory; views are small, and need no such bound."""
    most = max(picture(n).nbytes for n in range(ROWS))
    monkeypatch.setattr(work, "PICTURES_BYTES", 5 * most)
    whole, small = Look(whole=True), Look(whole=False)
    assert [row["state"] for row in run(whole, index)] == [row["state"] for row in run(small, index)]
    assert max(whole.batches) == 5
    assert max(small.batches) == 8
    assert sum(whole.batches) == sum(small.batches) == ROWS - 1


def test_parts_are_clocked_even_where_they_fail(index):
    taken()
    run(Look(whole=True), index)
    assert {"wait", "read", "decode", "Look"} <= taken().keys()
    assert taken() == {}
    with pytest.raises(ValueError, match="oops"), clocked("part"):
        raise ValueError("oops")
    assert taken()["part"] >= 0
    assert np.isfinite(sum(taken().values()))
