"""How long until a resumed driver captions, and how much memory does it take, by the number of shards?

    python -m benchmarks.resume --shards 1000 10000 100000 --fresh 10000 100000

Makes what a killed driver leaves: an input of N shards, an output with 99 % of them committed and their records in the
journal, the last ten not noted. A resume looks at names alone, so only the first thousand files of a folder are written
by `commit`, 8 rows each; the others are hard links to them. Then a fresh process lists the input's shards and calls
`run_shards` as a step does, with a work that notes the time of its first call and makes 8 rows. Where more than 500
shards are pending it is stopped after 200. A third process reads the records together, as the end of a run does.
Prints one JSON object. Memory is the driver's largest resident set (VmHWM); `idle` is it with Ray up and nothing done.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import tyro

from infra import storage
from infra.data.ledger import JOURNAL, Ledger, commit
from infra.data.shards import joined_names, shard_url

WRITTEN = 1000  # files of a folder that are written rather than linked
PIECE = 16  # records of a journal's file: what is committed in two seconds at eight shards a second
UNNOTED = 10
STOP_ABOVE, STOP_AFTER = 500, 200


@dataclass(frozen=True, kw_only=True)
class Config:
    shards: tuple[int, ...] = (1_000, 10_000, 100_000)  # of outputs of which a share is finished
    fresh: tuple[int, ...] = (10_000, 100_000)  # of outputs in which nothing is
    finished: float = 0.99
    folder: str = ""  # for the files; none: a temporary one


class Stopped(Exception):  # noqa: N818 - nothing is wrong
    pass


@dataclass(frozen=True)
class Note:
    """Work that notes when it was first called, by any process."""

    mark: str

    def setup(self) -> None: ...

    def __call__(self, name: str) -> pa.Table:
        if not os.path.exists(self.mark):
            Path(self.mark).write_text(str(time.time()))
        return rows(name)


def rows(name: str) -> pa.Table:
    return pa.table(
        {
            "sample_id": [f"{name}-{row}" for row in range(8)],
            "state": ["accepted"] * 8,
            "reason": pa.nulls(8, pa.string()),
            "caption_short": ["a red circle on a blue square"] * 8,
            "logp_short": [-1.5] * 8,
        }
    )


def make(out: str, names: list[str]) -> dict[str, Any]:
    """Shards of an artifact, and their records by name."""
    records = {name: commit(out, name, rows(name)) for name in names[:WRITTEN]}
    for number, name in enumerate(names[WRITTEN:]):
        source = names[number % WRITTEN]
        os.link(shard_url(out, source), shard_url(out, name))
        records[name] = records[source]
    return records


def note(out: str, records: dict[str, Any]) -> None:
    """The journal of a driver that was killed before it noted the last."""
    os.makedirs(storage.join(out, JOURNAL))
    noted = sorted(records)[:-UNNOTED]
    for start in range(0, len(noted), PIECE):
        piece = {name: records[name] for name in noted[start : start + PIECE]}
        Path(storage.join(out, JOURNAL, f"{start:032d}.json")).write_text(json.dumps(piece))


def highest() -> float:
    """The largest resident set of this process so far, in MB; not that of its parent, as getrusage may say."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


def used() -> float:
    """Seconds of CPU of this process so far, of all its threads."""
    return sum(psutil.Process().cpu_times()[:2])


def resume(images: str, out: str, mark: str) -> dict[str, Any]:
    """The part of the driver."""
    from infra.cluster import connect, laptop

    connect(laptop())
    from infra.data.run import run_shards

    idle, begun = highest(), time.time()
    figures: dict[str, Any] = {}

    def report(done: int, total: int, unit: str, **_: Any) -> None:
        figures.setdefault("pending", total - done)
        told = figures["pending"] - (total - done)
        if told == 1:
            figures.update(cpu_seconds_first=used(), peak_first_mb=highest())
        if told == STOP_AFTER and figures["pending"] > STOP_ABOVE:
            raise Stopped

    names = joined_names([images])
    listed = time.time()
    try:
        counts = run_shards(Note(mark), names, out, report=report)
        assert counts["shards"] == len(names), counts
        figures["seconds_to_end"] = time.time() - begun
    except Stopped:
        pass
    first = float(Path(mark).read_text())
    return figures | {
        "seconds_from_process": first - psutil.Process().create_time(),
        "seconds_from_ray": first - begun,
        "seconds_from_run_shards": first - listed,
        "cpu_seconds": used(),
        "idle_mb": idle,
        "peak_mb": highest(),
        "growth_mb": highest() - idle,
    }


def close(out: str) -> dict[str, Any]:
    """What the end of a run does with the records."""
    idle, begun = highest(), time.time()
    count = len(Ledger(out).close())
    size = storage.listing(storage.join(out, "ledger.json"))[0].size
    return {
        "records": count,
        "close_seconds": time.time() - begun,
        "close_growth_mb": highest() - idle,
        "ledger_bytes_a_shard": size / count,
    }


def apart(*arguments: str) -> dict[str, Any]:
    """What a fresh process prints."""
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "benchmarks.resume", *arguments]
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures = json.loads([line for line in printed.splitlines() if line.startswith("{")][-1])  # Ray may print too
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in figures.items()}


def measure(shards: int, finished: float, folder: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder or None) as place:
        images, out = f"{place}/images", f"{place}/out"
        names = [f"{number:07d}" for number in range(shards)]
        make(images, names)
        done = round(shards * finished)
        if done:
            note(out, make(out, names[:done]))
        figures = {"shards": shards, "finished": done} | apart("resume", images, out, f"{place}/first")
        return figures | (apart("close", out) if done and "seconds_to_end" not in figures else {})


def main(config: Config) -> None:
    cases = [(shards, config.finished) for shards in config.shards] + [(shards, 0.0) for shards in config.fresh]
    results = []
    for shards, finished in cases:
        results.append(measure(shards, finished, config.folder))
        print(results[-1], file=sys.stderr, flush=True)
    print(json.dumps({"results": results}, indent=1))


if __name__ == "__main__":
    parts = {"resume": resume, "close": close}  # of a fresh process
    if sys.argv[1:2] and sys.argv[1] in parts:
        print(json.dumps(parts[sys.argv[1]](*sys.argv[2:])))
    else:
        main(tyro.cli(Config))
