"""Rows a second on one node and on two: one core a node, each pinned, and every row captioned once.

    python -m benchmarks.scale_out --samples 4000

Starts a head without CPUs and one node, then the same with two (`benchmarks/nodes.py`), and on each a driver that
indexes the built-in corpus and captions it with a captioner of random weights, one caption an image of at most 12
tokens. Head, driver and the first node share core 0, so the second node adds a core. Prints one JSON object: `whole`
is rows by the time of the whole step, with the actors' start; `steady` rows by the time when all nodes were at work.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import tyro

from benchmarks.nodes import ROOT, Nodes, pinned
from infra.data.stage import Columns


@dataclass(frozen=True, kw_only=True)
class Config:
    samples: int = 4000
    shard: int = 50  # rows
    batch: int = 25
    nodes: tuple[int, ...] = (1, 2)


@dataclass
class Where:
    """A stage that says which node did a row, and when."""

    reads: tuple[str, ...] = ("key",)
    writes: tuple[str, ...] = ("node", "at")
    cpus: float = 1
    gpus: float = 0

    def setup(self) -> None: ...

    def __call__(self, batch: Columns) -> Columns:
        import ray

        rows = len(batch["key"])
        return {"node": [ray.get_runtime_context().get_node_id()] * rows, "at": [time.time()] * rows}


def write_captioner(folder: str) -> None:
    """A small captioner of ours that knows nothing."""
    import torch

    from captioner.model import Captioner, CaptionerConfig, TextConfig, VisionConfig
    from captioner.vocabulary import train_vocabulary

    os.makedirs(folder, exist_ok=True)
    torch.manual_seed(0)
    vocabulary = train_vocabulary(["a large red circle at the top left of a white background"] * 3, 200)
    config = CaptionerConfig(
        vision=VisionConfig(image_size=(32, 32), patch_size=8, hidden=192, layers=4, heads=4, mlp=768),
        text=TextConfig(hidden=192, layers=4, heads=4, mlp=768, max_length=24),
    )
    Captioner(config.blip(vocabulary), vocabulary).save(folder)


def drive(address: str, place: str, nodes: int, samples: int, shard: int, batch: int) -> dict[str, Any]:
    """Index and caption on a cluster that runs; the figures."""
    import pyarrow.parquet as pq

    from captioner.stages import Caption
    from captioner.styles import Style
    from captioner.tower import Tower
    from infra.cluster import Cluster, connect
    from infra.data.run import run_stages
    from infra.data.shards import shard_names, shard_url
    from infra.data.verify import verify_shards
    from infra.store import Store
    from workflows.corpora.shapes import ShapesConfig
    from workflows.ingest import IngestConfig, ingest

    cluster = Cluster(name="nodes", actors=(nodes, nodes), address=address)
    connect(cluster)
    store = Store(f"{place}/store", cluster)
    shapes = ShapesConfig(samples=samples, labelled=0, shard_size=shard)
    images = store.step(ingest, IngestConfig(corpus=shapes)).path
    model, out = f"{place}/captioner", f"{place}/captions-{nodes}"
    write_captioner(model)
    # Nothing is decoded again: random weights say nothing but faults.
    caption = Caption(Tower(model), (Style(name="short", max_tokens=12),), retries=())
    begun = time.time()
    counts = run_stages([caption, Where()], [images], out, batch_size=batch, actors=cluster.actors)
    seconds = time.time() - begun
    tables = [pq.read_table(shard_url(out, name), columns=["sample_id", "node", "at"]) for name in shard_names(out)]
    rows = [row for table in tables for row in table.to_pylist()]
    times: dict[str, list[float]] = {}
    for row in rows:
        times.setdefault(row["node"], []).append(row["at"])
    start, end = max(min(one) for one in times.values()), min(max(one) for one in times.values())
    steady = sum(start < row["at"] <= end for row in rows) / max(end - start, 1e-9)
    return {
        "nodes": nodes,
        "rows": counts["rows_in"],
        "accepted": counts["accepted"],
        "rows_by_node": sorted(Counter(row["node"] for row in rows).values(), reverse=True),
        "ids_twice": len(rows) - len({row["sample_id"] for row in rows}),
        "faults": list(verify_shards(out, [images], counts)),
        "seconds": round(seconds, 2),
        "whole": round(len(rows) / seconds, 1),
        "steady": round(steady, 1),
    }


def measure(nodes: int, config: Config, place: str) -> dict[str, Any]:
    """The figures of one cluster; `place` keeps the indexed corpus for the next."""
    with Nodes() as cluster:
        for core in range(nodes):
            cluster.add(core)
        numbers = map(str, (nodes, config.samples, config.shard, config.batch))
        command = [*pinned(0), sys.executable, "-m", "benchmarks.scale_out", "drive", cluster.address, place, *numbers]
        printed = subprocess.run(
            command, env=cluster.environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        return json.loads([line for line in printed.splitlines() if line.startswith("{")][-1])


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as place:
        runs = [measure(nodes, config, place) for nodes in config.nodes]
    speedup = {key: round(runs[-1][key] / runs[0][key], 2) for key in ("whole", "steady")}
    print(json.dumps({"runs": runs, "speedup": speedup}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["drive"]:
        address, place, *numbers = sys.argv[2:]
        print(json.dumps(drive(address, place, *map(int, numbers))))
    else:
        main(tyro.cli(Config))
