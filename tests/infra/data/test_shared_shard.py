"""One folder of pictures is many actors' work, a killed one costs little, and the driver tells rows."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.data import run, telling
from infra.data.run import run_stages
from infra.data.verify import verify_shards
from tests.infra.data.test_parts import write_index
from tests.infra.data.test_run import read_rows

ROWS = 60


@dataclass(frozen=True)
class Slow:
    """Takes a while over a row, leaves a mark of each, and kills its process once, at a row."""

    marks: str
    dies_at: str = ""
    reads: tuple[str, ...] = ("text",)
    writes: tuple[str, ...] = ("loud", "pid")
    cpus: float = 1
    gpus: float = 0

    def setup(self):
        pass

    def __call__(self, batch):
        for text in batch["text"]:
            time.sleep(0.1)
            with Path(self.marks, text).open("a") as mark:
                mark.write(f"{os.getpid()}\n")
            if text == self.dies_at and not Path(self.marks, "died").exists():
                Path(self.marks, "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return {"loud": [f"{text}!" for text in batch["text"]], "pid": [os.getpid()] * len(batch["text"])}


@pytest.mark.timeout(120)
def test_two_actors_share_a_shard_and_one_is_killed(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PART_SECONDS", 0.5)
    monkeypatch.setattr(telling, "LOOK_SECONDS", 0.2)
    index, out, marks, seen = write_index(str(tmp_path / "index"), {"000000": ROWS}), str(tmp_path / "out"), [], []
    (tmp_path / "marks").mkdir()

    def report(done, total, unit, **figures):
        seen.append((done, total, unit))
        assert 0 <= figures["accepted"] <= figures["rows"] == done

    stage = Slow(str(tmp_path / "marks"), dies_at="25")
    counts = run_stages([stage], [index], out, batch_size=4, actors=(2, 2), report=report)
    assert counts["rows_in"] == ROWS
    assert list(verify_shards(out, [index], counts)) == []
    assert sorted(os.listdir(out)) == ["ledger.json", "shards"]
    rows = [row for row in read_rows(out) if row["state"] == "accepted"]
    assert len({row["pid"] for row in rows}) >= 2
    marks = {row["loud"][:-1]: (tmp_path / "marks" / row["loud"][:-1]).read_text().split() for row in rows}
    twice = [text for text, pids in marks.items() if len(pids) > 1]
    assert "25" in twice
    assert len(twice) <= 12, "a part in flight is half a second of work, and the batch after it"
    assert [told[1:] for told in seen] == [(ROWS, "rows")] * len(seen)
    done = [told[0] for told in seen]
    assert done == sorted(done)
    assert len({*done}) >= 4, "0, 60 and some in between"
