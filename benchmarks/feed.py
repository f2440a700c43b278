"""How fast is the feed alone, against webdataset with torch's DataLoader and against plain readers?

    taskset -c 0 python -m benchmarks.feed
    taskset -c 0 python -m benchmarks.feed --only codes --rounds 9

Writes two corpora: `images`, JPEGs of 256x256 in tars, ingested, so that the feed finds pictures by its index; and
`codes`, Parquet sidecars of 256 codes and a caption a row, as a prior is trained on, and the same rows in tars for
webdataset. Three readers make the same batches of them with the project's own `decode` and the task's own `collate`:

* `feed`: Ray Data in tasks, one for each core that this process may use, in the exact order of the plan;
* `webdataset`: its tar reader and buffer shuffle of 1000 rows, in as many DataLoader workers;
* `plain`: in this process; tars from front to end, decoded in as many threads, or Parquet files one after another, the
  rows of each permuted.

They run in turns, each to the last batch of its epochs; of codes, webdataset has a fifth of them, being so much slower.
A training lasts hours and starts once, so two figures are told: the seconds until the first batch is there, and the
rate over what follows the first fifth of the rows. The first round is thrown away. Prints one JSON object: rows a
second of each (median over rounds), the median over rounds of the feed's against the faster of the others in that
round, and processor seconds, starts included.
"""

import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
import webdataset
from PIL import Image

from infra.cluster import connect, laptop
from infra.data.ahead import ahead
from infra.data.images import decode
from infra.data.ledger import commit
from infra.data.shards import count_rows, shard_names, shard_url
from infra.train.optim import OptimConfig
from infra.train.plan import BatchPlan
from infra.train.task import Task
from t2i.conditions.words import WordsConfig
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.priors.task import PriorShape, PriorTask, save_vocabulary
from t2i.protocol import Space
from t2i.tokenizers.losses import LossConfig
from t2i.tokenizers.patch_vqgan import PatchVQGANConfig
from t2i.tokenizers.task import TokenizerTask
from t2i.vocabulary import TextVocabulary
from workflows.ingest import IngestConfig, ingest

WORDS = ["red", "blue", "green", "small", "large", "circle", "square", "triangle", "left", "of", "the", "grey", "field"]
SHUFFLE = 1000
Reader = Callable[[], Iterator[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Config:
    only: Literal["both", "images", "codes"] = "both"
    images: int = 2000
    codes: int = 40_000
    shards: int = 20
    grid: tuple[int, int] = (16, 16)
    batch: int = 64
    image_epochs: int = 16
    code_epochs: int = 20  # a fifth of them for webdataset
    rounds: int = 6
    window_shards: int = 16


def quiet(*_: Any, **__: Any) -> None: ...


def write_images(folder: str, count: int, shards: int) -> None:
    """Tars of JPEGs of 256x256, some 20 kB each, with captions."""
    generator = np.random.default_rng(0)
    os.makedirs(folder)
    for shard, rows in enumerate(np.array_split(np.arange(count), shards)):
        with tarfile.open(f"{folder}/{shard:05d}.tar", "w") as tar:
            for row in rows:
                coarse = Image.fromarray(generator.integers(0, 256, (48, 48, 3), dtype=np.uint8))
                buffer = BytesIO()
                coarse.resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
                for ending, data in (("jpg", buffer.getvalue()), ("txt", caption(generator).encode())):
                    member = tarfile.TarInfo(f"{row:07d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))


def caption(generator: np.random.Generator) -> str:
    return " ".join(generator.choice(WORDS, 16))


def write_codes(folder: str, count: int, shards: int, places: int, codebook_size: int) -> None:
    """An artifact of codes and captions, and a text vocabulary beside it."""
    generator = np.random.default_rng(0)
    for shard, rows in enumerate(np.array_split(np.arange(count), shards)):
        codes = generator.integers(0, codebook_size, (len(rows), places))
        columns = {
            "sample_id": [f"{row:024x}" for row in rows * 2654435761],
            "state": ["accepted"] * len(rows),
            "reason": pa.nulls(len(rows), pa.string()),
            "split": ["train"] * len(rows),
            "keep": [True] * len(rows),
            "caption_alt": [caption(generator) for _ in rows],
            "weight_alt": [1.0] * len(rows),
            "codes": pa.array(codes.tolist(), pa.list_(pa.int32())),
        }
        commit(folder, f"{shard:06d}", pa.table(columns))
    captions = (caption(generator) for _ in range(1000))
    save_vocabulary(TextVocabulary.train(captions, 100, 32), f"{folder}/vocabulary")


def write_code_tars(folder: str, artifact: str) -> None:
    os.makedirs(folder)
    for name in shard_names(artifact):
        with webdataset.TarWriter(f"{folder}/{name}.tar", encoder=False) as tar:
            for row in pq.read_table(shard_url(artifact, name)).to_pylist():
                buffer = BytesIO()
                np.save(buffer, np.array(row["codes"], np.int32))
                tar.write({"__key__": row["sample_id"], "npy": buffer.getvalue(), "txt": row["caption_alt"].encode()})


def prior_task(folder: str, grid: tuple[int, int], codebook_size: int, model: AutoregressiveConfig, **options: Any):
    words = WordsConfig(vocabulary_size=100, length=32)
    shape = PriorShape(model=model, space=Space(grid, codes=codebook_size), conditions=(words,))
    return PriorTask(shape=shape, folder=f"{folder}/vocabulary", styles=("alt",), **options)


def tokenizer_task(channels: int = 8) -> TokenizerTask:
    model = PatchVQGANConfig(patch=8, channels=channels)
    return TokenizerTask(model=model, losses=LossConfig(), optim=OptimConfig(ema_decay=0.99))


def collate(task: Task, columns: dict[str, list]) -> dict[str, torch.Tensor]:
    rows = len(next(iter(columns.values())))
    arrays = task.collate(columns, lambda salt: np.random.default_rng(0).random(rows))
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def picture(sample: dict[str, Any]) -> dict[str, Any]:
    return {"pixels": decode(sample["jpg"])}


def row_of_codes(sample: dict[str, Any]) -> dict[str, Any]:
    codes = np.load(BytesIO(sample["npy"]))
    return {"codes": codes, "caption_alt": sample["txt"].decode(), "weight_alt": 1.0}


def columns_of(samples: Any) -> dict[str, list]:
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def fed(task: Task, artifact: str, config: Config, epochs: int) -> Iterator[dict[str, Any]]:
    from infra.train.feed import Feed

    counts = count_rows([artifact], task.where, task.where_reads)
    plan = BatchPlan(list(counts.values()), config.batch, 0, config.window_shards)
    steps = plan.rows_per_epoch * epochs // config.batch
    feed = Feed(task, [artifact], list(counts), plan, steps, 0, 1, config.batch, 1, len(os.sched_getaffinity(0)))
    for (batch,) in feed(0):
        yield batch


def webdataset_batch(task: Task, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return collate(task, columns_of(samples))


def by_webdataset(task: Task, tars: str, read: Callable, config: Config, epochs: int) -> Iterator[dict[str, Any]]:
    urls = sorted(map(str, Path(tars).glob("*.tar"))) * epochs
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(SHUFFLE).map(read)
    data = data.batched(config.batch, collation_fn=partial(webdataset_batch, task), partial=True)
    workers = len(os.sched_getaffinity(0))
    yield from torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers)  # type: ignore[arg-type]


def plain_images(task: Task, tars: str, config: Config, epochs: int) -> Iterator[dict[str, Any]]:
    threads = len(os.sched_getaffinity(0))
    pictures = ahead(decode, jpegs(tars, epochs), threads=threads)
    while batch := list(islice(pictures, config.batch)):
        yield collate(task, {"pixels": batch})


def jpegs(tars: str, epochs: int) -> Iterator[bytes]:
    for path in sorted(Path(tars).glob("*.tar")) * epochs:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    yield tar.extractfile(member).read()  # type: ignore[union-attr]


def plain_codes(task: Task, artifact: str, config: Config, epochs: int) -> Iterator[dict[str, Any]]:
    for epoch in range(epochs):
        for name in shard_names(artifact):
            table = pq.read_table(shard_url(artifact, name), columns=list(task.reads), use_threads=False)
            table = table.take(np.random.default_rng(epoch).permutation(len(table))).combine_chunks()
            codes = table["codes"].chunk(0)
            codes = codes.flatten().to_numpy().reshape(len(table), -1)
            texts, weights = table["caption_alt"].to_pylist(), table["weight_alt"].to_pylist()
            for first in range(0, len(table), config.batch):
                part = slice(first, first + config.batch)
                rows = {"codes": list(codes[part]), "caption_alt": texts[part], "weight_alt": weights[part]}
                yield collate(task, rows)


def spent() -> float:
    """Processor seconds of this process and all that it started so far."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:4]) for process in family)  # children that ended included


def run(reader: Reader, rows: int) -> dict[str, float]:
    """Seconds to the first batch, rows a second after a fifth of the rows, processor seconds of a thousand."""
    began, used, done, marks = time.perf_counter(), spent(), 0, []
    for batch in reader():
        done += len(next(iter(batch.values())))
        marks.append((done, time.perf_counter()))
    warm, at = next(mark for mark in marks if mark[0] >= rows / 5)
    rate = (done - warm) / (marks[-1][1] - at)
    return {"start": marks[0][1] - began, "rate": rate, "cpu": (spent() - used) / done * 1000}


def in_turns(readers: dict[str, tuple[Reader, int]], rounds: int) -> dict[str, Any]:
    """Each reader, with the rows that it has, `rounds` times."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in readers}
    for number in range(rounds):
        for name in list(readers) if number % 2 else reversed(list(readers)):
            found[name].append(run(*readers[name]))
            print(number, name, found[name][-1], file=sys.stderr, flush=True)

    def medians(kind: str, places: int) -> dict[str, float]:
        return {name: round(statistics.median(run[kind] for run in runs[1:]), places) for name, runs in found.items()}

    fed, *others = ([run["rate"] for run in found[name][1:]] for name in ("feed", *(found.keys() - {"feed"})))
    ratios = [rate / max(rival) for rate, rival in zip(fed, zip(*others, strict=True), strict=True)]
    return {
        "rows_per_second": medians("rate", 1),
        "seconds_to_the_first_batch": medians("start", 2),
        "cpu_seconds_per_1000_rows": medians("cpu", 3),
        "feed_to_faster": round(statistics.median(ratios), 3),
        "least_and_most": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def main(config: Config) -> None:
    assert config.rounds > 1, "the first round is thrown away"
    torch.set_num_threads(1)
    connect(laptop())
    figures: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory() as place:
        if config.only != "codes":
            tars, images, task = f"{place}/tars", f"{place}/images", tokenizer_task()
            write_images(tars, config.images, config.shards)
            ingest.work(IngestConfig(corpus=tars, test_fraction=0.0), out=images, cluster=laptop(), report=quiet)
            epochs, rows = config.image_epochs, config.images * config.image_epochs
            readers: dict[str, tuple[Reader, int]] = {
                "feed": (lambda: fed(task, images, config, epochs), rows),
                "webdataset": (lambda: by_webdataset(task, tars, picture, config, epochs), rows),
                "plain": (lambda: plain_images(task, tars, config, epochs), rows),
            }
            figures["images"] = in_turns(readers, config.rounds)
        if config.only != "images":
            codes = f"{place}/codes"
            write_codes(codes, config.codes, config.shards, config.grid[0] * config.grid[1], 1000)
            write_code_tars(f"{place}/code-tars", codes)
            prior = prior_task(codes, config.grid, 1000, AutoregressiveConfig(), optim=OptimConfig())
            epochs, few = config.code_epochs, max(1, config.code_epochs // 5)
            readers = {
                "feed": (lambda: fed(prior, codes, config, epochs), config.codes * epochs),
                "webdataset": (
                    lambda: by_webdataset(prior, f"{place}/code-tars", row_of_codes, config, few),
                    config.codes * few,
                ),
                "plain": (lambda: plain_codes(prior, codes, config, epochs), config.codes * epochs),
            }
            figures["codes"] = in_turns(readers, config.rounds)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config))
