"""How many pictures of a prior are equal over batch sizes and threads, and how far its logits lie apart.

    python -m benchmarks.batches STORE [--count 256] [--batches 1 8 64]

STORE holds a prior of codes and its tokenizer, such as `rescribe run demo` leaves; prompts are scenes of Shapes.
Pictures are drawn at temperature 1, where a code may fall otherwise for the least of differences. The last of the
batches is what others are compared with. Seconds are of this process's CPU, a picture.
"""

import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro

from infra.data.run import run_here
from infra.data.shards import ShardReader, shard_names
from t2i.evaluate.scenes import describe
from t2i.priors.asking import CAPTION
from t2i.priors.sampling import SamplingConfig
from t2i.priors.task import load_prior
from t2i.stages import Paint
from workflows.corpora.shapes import draw_scene
from workflows.lookup import MAKERS, one
from workflows.prompt_rows import write_rows
from workflows.prompts import Prompt
from workflows.sample import SampleConfig, links_of
from workflows.train_tokenizer import MODEL


@dataclass(frozen=True)
class Options:
    """What is drawn."""

    store: tyro.conf.Positional[str]
    count: int = 256
    batches: tuple[int, ...] = (1, 8, 64)
    threads: tuple[int, ...] = (1, 2)
    seed: int = 0


def main() -> None:
    """Draw, compare, print."""
    options = tyro.cli(Options)
    models = [one(options.store, MAKERS[kind], str) for kind in ("prior", "tokenizer")]
    rng = np.random.default_rng(options.seed)
    texts = [describe(draw_scene(rng)) for _ in range(options.count)]
    links = links_of(SampleConfig(sampling=SamplingConfig()), *models)
    with tempfile.TemporaryDirectory() as folder:
        rows = f"{folder}/rows"
        write_rows((Prompt(text) for text in texts), rows, seed=options.seed, batch=max(options.batches))
        drawn: dict[tuple[int, int], list[bytes]] = {}
        for threads in options.threads:
            torch.set_num_threads(threads)
            for batch in options.batches:
                began, out = time.process_time(), f"{folder}/{threads}-{batch}"
                run_here([Paint(links)], [rows], out, batch_size=batch)
                spent = (time.process_time() - began) / options.count
                drawn[threads, batch] = _pixels(rows, out)
                wanted = drawn[options.threads[0], batch] if threads != options.threads[0] else None
                line = f"threads {threads}  batch {batch:>3}  {spent * 1000:7.1f} ms a picture"
                if wanted:
                    line += f"  equal to {options.threads[0]} threads: {_share(drawn[threads, batch], wanted):.1%}"
                print(line, flush=True)
        last = options.batches[-1]
        for batch in options.batches[:-1]:
            share = _share(drawn[options.threads[0], batch], drawn[options.threads[0], last])
            print(f"batch {batch} against {last}: {share:.1%} of {options.count} pictures are equal")
    print(
        f"logits on the same codes, one row at a time against {last}: {_apart(models[0].url(MODEL), texts[:last]):.1e}"
    )


def _pixels(rows: str, out: str) -> list[bytes]:
    readers = [ShardReader([rows, out], name) for name in shard_names(out)]
    return [picture.tobytes() for reader in readers for picture in reader.pixels(np.arange(len(reader)))]  # type: ignore[union-attr]


def _share(some: list[bytes], others: list[bytes]) -> float:
    return float(np.mean([a == b for a, b in zip(some, others, strict=True)]))


def _apart(folder: str, texts: list[str]) -> float:
    """The largest difference of a logit."""
    prior, ask = load_prior(folder)
    seeds = list(range(len(texts)))
    codes = prior.sample(ask({CAPTION: texts}, seeds), seeds, SamplingConfig()).flatten(1)
    told = prior.conditions.asked(ask({CAPTION: texts}, seeds))
    together = prior.logits(told, codes[:, :-1])
    alone = [
        prior.logits(prior.conditions.asked(ask({CAPTION: [text]}, [seed])), codes[seed : seed + 1, :-1])
        for seed, text in enumerate(texts)
    ]
    return float((together - torch.cat(alone)).abs().max())


if __name__ == "__main__":
    main()
