"""How fast a corpus is recaptioned: against the bare model, against others, two styles at once, rows in slots.

    python -m benchmarks.recaption efficiency
    python -m benchmarks.recaption efficiency --size demo --images 16000 --bare_images 8000 --batch 128
    python -m benchmarks.recaption styles --precision fp32 --images 48
    python -m benchmarks.recaption peers --images 64
    python -m benchmarks.recaption lengths --images 96

BLIP-base at 384 pixels with random weights, whose captions never end by themselves: every caption is as long as its
style allows. Each command prints one JSON object. What is compared is timed in turns, in one run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from benchmarks.blip import Size, alt_text, draw_photo, make_model, write_corpus
from captioner.images import fit_images
from captioner.slots import greedy
from captioner.stages import Caption
from captioner.styles import Style
from captioner.task import ALT_COLUMN, load_tower
from captioner.tower import Tower
from infra.cluster import Cluster, connect, laptop
from infra.data.clock import taken
from infra.data.images import decode
from infra.store import Artifact, Store
from workflows.ingest import IngestConfig, ingest
from workflows.recaption import RecaptionConfig, recaption
from workflows.train_captioner import TrainCaptionerConfig, train_captioner

SHORT = Style(name="short", min_tokens=12, max_tokens=12)  # some nine words
DESCRIPTIVE = Style(name="descriptive", min_tokens=48, max_tokens=48)
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Images a second of the whole job over those of the bare model on decoded tensors, on the same cores."""

    images: int = 640
    bare_images: int = 192  # that the bare model is timed on
    shards: int = 4
    batch: int = 48
    repeats: int = 1
    precision: Precision = "bf16"
    size: Size = "base"  # "demo": the demo's captioner, on pictures of 32 by 32


@dataclass(frozen=True, kw_only=True)
class Styles:
    """Seconds of one job with two styles over those of two jobs with one each."""

    images: int = 64
    precision: Precision = "fp32"
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class Peers:
    """Images a second in the short style, models loaded: ours, a plain transformers loop, its pipeline, Data-Juicer.

    Alt texts are not scored, since the others do not.
    """

    images: int = 64
    precision: Precision = "bf16"
    batches: tuple[int, ...] = (1, 4, 8, 16)  # sizes that the loop and the pipeline are tried with; the best counts
    juicer: str = ""  # the interpreter of an environment with Data-Juicer, as benchmarks/peers/juicer.py says
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Decoding alone, of captions of many lengths: in slots, in fixed batches, and by `generate` of transformers."""

    images: int = 96
    batch: int = 32
    median_tokens: float = 24.0
    spread: float = 0.6  # of the logarithm of the lengths
    precision: Precision = "bf16"
    repeats: int = 2


@dataclass(frozen=True, kw_only=True)
class Bare:
    """The bare model, in a process of its own: it loads, says so, waits for a line, and tells its seconds."""

    model: str
    images: int
    first: int = 0
    batch: int = 48
    threads: int = 2
    precision: Precision = "bf16"
    size: Size = "base"


def efficiency(config: Efficiency) -> dict[str, Any]:
    with _workplace() as folder:
        model = make_model(f"{folder}/model", config.size)
        pattern = write_corpus(f"{folder}/corpus", config.images, config.shards, _picture(config.size))
        found: dict[str, list] = {"bare": [], "job": [], "steady": []}
        parts: dict[str, float] = {}
        for repeat in range(config.repeats):
            found["bare"].append({ways: _bare(config, model, ways) for ways in (1, 2)})
            captions = _job(f"{folder}/{repeat}", pattern, model, (SHORT, DESCRIPTIVE), config.precision, config.batch)
            parts = captions.manifest["summary"]["actor_seconds"]
            found["job"].append(config.images / captions.manifest["seconds"])
            found["steady"].append(_steady(captions, config.images))
    bare = statistics.median(max(way["images_per_second"] for way in ways.values()) for ways in found["bare"])
    job, steady = statistics.median(found["job"]), statistics.median(found["steady"])
    return {
        "images_per_second": {"bare_model": bare, "whole_job": job, "after_loading": steady},
        "efficiency": job / bare,
        "efficiency_after_loading": steady / bare,
        "overhead_after_loading_ms_an_image": 1000 / steady - 1000 / bare,
        "actor_seconds_an_image": {part: seconds / config.images for part, seconds in parts.items()},
        "runs": found,
    }


def styles(config: Styles) -> dict[str, Any]:
    with _workplace() as folder:
        model = make_model(f"{folder}/model")
        pattern = write_corpus(f"{folder}/corpus", config.images, 2)
        seconds: dict[str, list[float]] = {"short": [], "descriptive": [], "both": []}
        for repeat in range(config.repeats):
            for name, chosen in (("short", (SHORT,)), ("descriptive", (DESCRIPTIVE,)), ("both", (SHORT, DESCRIPTIVE))):
                captions = _job(f"{folder}/{name}{repeat}", pattern, model, chosen, config.precision, 32)
                seconds[name].append(captions.manifest["seconds"])
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {"both_over_two_jobs": middle["both"] / (middle["short"] + middle["descriptive"]), "seconds": seconds}


def peers(config: Peers) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"rescribe": [], "rescribe, whole job": []}
    with _workplace() as folder:
        model = make_model(f"{folder}/model")
        pattern = write_corpus(f"{folder}/corpus", config.images, 2)
        files = [Path(folder, "photos", f"{number}.jpg") for number in range(config.images)]
        files[0].parent.mkdir()
        for number, file in enumerate(files):
            file.write_bytes(draw_photo(number))
        for repeat in range(config.repeats):
            captions = _job(f"{folder}/{repeat}", pattern, model, (SHORT,), config.precision, 32, score_alt=False)
            rates["rescribe"].append(_steady(captions, config.images))
            rates["rescribe, whole job"].append(config.images / captions.manifest["seconds"])
            if config.juicer:
                found = _juicer(config, str(files[0].parent), model)
                rates.setdefault("juicer", []).append(config.images / found["seconds_of_captioning"])
                rates.setdefault("juicer, whole job", []).append(config.images / found["seconds"])
            for name, run in (("loop", _loop), ("pipeline", _pipeline)):
                for size in config.batches:
                    seconds = run(model, files, size, config.precision)
                    rates.setdefault(f"{name}, batches of {size}", []).append(config.images / seconds)
    middle = {name: statistics.median(values) for name, values in rates.items()}
    names = ("loop", "pipeline", "juicer")[: 3 if config.juicer else 2]
    best = {name: max(rate for key, rate in middle.items() if key.startswith(name)) for name in names}
    return {
        "images_per_second": middle,
        "rescribe_over_the_best": {name: middle["rescribe"] / rate for name, rate in best.items()},
    }


def lengths(config: Lengths) -> dict[str, Any]:
    rng, kind = np.random.default_rng(0), KINDS[config.precision]
    drawn = np.exp(rng.normal(np.log(config.median_tokens), config.spread, config.images))
    most = np.clip(drawn.round(), 2, 120).astype(int).tolist()
    with _workplace() as folder:
        captioner = load_tower(make_model(f"{folder}/model")).to(torch.device("cpu"), kind).eval()
    torch.set_num_threads(os.cpu_count() or 1)
    features = torch.randn(config.images, 577, 768, dtype=kind)
    decoder: Any = captioner.decoders["alt"]
    sep, start = captioner.vocabulary.sep, [captioner.vocabulary.bos]

    def in_slots(rows: range, bounds: Sequence[int], slots: int) -> None:
        greedy(decoder, features[rows], [start] * len(rows), sep=sep, fewest=120, most=bounds, slots=slots)

    def fixed() -> None:  # every row runs to the end of the longest of its batch
        for first in range(0, config.images, config.batch):
            rows = range(first, min(first + config.batch, config.images))
            in_slots(rows, [max(most[row] for row in rows)] * len(rows), len(rows))

    def leaving() -> None:  # rows leave their batch, but none takes their place
        for first in range(0, config.images, config.batch):
            rows = range(first, min(first + config.batch, config.images))
            in_slots(rows, [most[row] for row in rows], len(rows))

    @torch.no_grad()
    def generate() -> None:
        for first in range(0, config.images, config.batch):
            rows = range(first, min(first + config.batch, config.images))
            ids, longest = torch.tensor([start] * len(rows)), max(most[row] for row in rows)
            decoder.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                encoder_hidden_states=features[rows],
                encoder_attention_mask=torch.ones(len(rows), 577, dtype=torch.long),
                do_sample=False,
                max_new_tokens=longest,
                min_new_tokens=longest,
                eos_token_id=sep,
                pad_token_id=0,
            )

    ways: dict[str, Callable[[], None]] = {
        "slots": lambda: in_slots(range(config.images), most, config.batch),
        "rows_leave": leaving,
        "fixed_batches": fixed,
        "transformers_generate": generate,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(config.repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "tokens": {"mean": float(np.mean(most)), "longest": max(most), "shortest": min(most)},
        "seconds": middle,
        "times_as_fast_as": {name: middle[name] / middle["slots"] for name in ways if name != "slots"},
    }


def bare(config: Bare) -> dict[str, Any]:
    torch.set_num_threads(config.threads)
    stage = Caption(Tower(config.model, config.precision), (SHORT, DESCRIPTIVE), retries=())
    stage.setup()
    numbers = range(config.first, config.first + config.images)
    pixels = fit_images(
        [decode(draw_photo(number, size=_picture(config.size))) for number in numbers], stage.tower.model.image_size
    )
    batches = [
        {stage.tower.view: list(part), ALT_COLUMN: [alt_text(number) for number in numbers[: len(part)]]}
        for part in np.split(pixels, range(config.batch, len(pixels), config.batch))
    ]
    stage({name: values[:2] for name, values in batches[0].items()})
    print("ready", flush=True)
    sys.stdin.readline()
    taken()
    began = time.perf_counter()
    for batch in batches:
        stage(batch)
    return {"seconds": time.perf_counter() - began, "parts": taken()}


def _bare(config: Efficiency, model: str, ways: int) -> dict[str, Any]:
    """Of the bare model in so many processes that share the cores."""
    share, threads = config.bare_images // ways, max(1, (os.cpu_count() or 1) // ways)
    options = ["--model", model, "--images", str(share), "--batch", str(config.batch), "--threads", str(threads)]
    options += ["--precision", config.precision, "--size", config.size]
    command = [sys.executable, "-m", "benchmarks.recaption", "bare", *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    started = [
        subprocess.Popen([*command, "--first", str(share * way)], stdin=-1, stdout=-1, text=True, env=environment)
        for way in range(ways)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", "the bare model did not start"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    told = [json.loads(process.communicate()[0]) for process in started]
    parts = {part: sum(one["parts"][part] for one in told) / share / ways for part in told[0]["parts"]}
    return {"images_per_second": share * ways / max(one["seconds"] for one in told), "actor_seconds_an_image": parts}


def _job(
    root: str,
    pattern: str,
    model: str,
    styles: tuple[Style, ...],
    precision: Precision,
    batch: int,
    score_alt: bool = True,
) -> Artifact:
    """The step `recaption` as users run it; its index and its captioner are made before, and not timed."""
    store = Store(root, _cluster())
    connect(store.cluster)
    images = store.step(ingest, IngestConfig(corpus=pattern))
    captioner = store.step(train_captioner, TrainCaptionerConfig(model=model, base=None, styles=()), images)
    config = RecaptionConfig(styles=styles, batch=batch, precision=precision, retries=(), score_alt=score_alt)
    return store.step(recaption, config, images, captioner)


def _steady(captions: Artifact, images: int) -> float:
    """Images a second of the two actors together, once they have loaded the model."""
    parts = captions.manifest["summary"]["actor_seconds"]
    return images / ((parts["all"] - parts["idle"] - parts["load"]) / 2)


def _juicer(config: Peers, photos: str, model: str) -> dict[str, Any]:
    script = str(Path(__file__).parent / "peers" / "juicer.py")
    options = ["--images", photos, "--model", model, "--max-new-tokens", str(SHORT.max_tokens), "--batch", "8"]
    options += ["--dtype", "bfloat16" if config.precision == "bf16" else "float32"]
    told = subprocess.run([config.juicer, script, *options], stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(told.strip().splitlines()[-1])


def _picture(size: Size) -> tuple[int, int]:
    return (32, 32) if size == "demo" else (480, 640)


def _cluster() -> Cluster:
    return replace(laptop(), actors=(2, 2))


def _loop(model: str, files: list[Path], size: int, precision: Precision) -> float:
    """Seconds of what one would write first: read, process, generate, a batch at a time."""
    import transformers
    from PIL import Image

    torch.set_num_threads(os.cpu_count() or 1)
    processor: Any = transformers.AutoProcessor.from_pretrained(model)
    blip: Any = transformers.BlipForConditionalGeneration.from_pretrained(model, dtype=KINDS[precision])
    blip.eval()
    began = time.perf_counter()
    with torch.no_grad():
        for first in range(0, len(files), size):
            pictures = [Image.open(path).convert("RGB") for path in files[first : first + size]]
            inputs = processor(images=pictures, return_tensors="pt").to(dtype=KINDS[precision])
            tokens = blip.generate(**inputs, max_new_tokens=SHORT.max_tokens, min_new_tokens=SHORT.min_tokens)
            processor.batch_decode(tokens, skip_special_tokens=True)
    return time.perf_counter() - began


def _pipeline(model: str, files: list[Path], size: int, precision: Precision) -> float:
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    run: Any = transformers.pipeline("image-text-to-text", model=model, dtype=KINDS[precision])
    asked = {"images": [str(path) for path in files], "text": [""] * len(files)}
    began = time.perf_counter()
    bounds = {"max_new_tokens": SHORT.max_tokens, "min_new_tokens": SHORT.min_tokens, "do_sample": False}
    said = run(**asked, batch_size=size, generate_kwargs=bounds)
    assert len(said) == len(files)
    return time.perf_counter() - began


@contextmanager
def _workplace() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="rescribe-benchmark-") as folder:
        yield folder


RUNS = (efficiency, styles, peers, lengths, bare)


def main() -> None:
    chosen = tyro.extras.subcommand_cli_from_dict(
        {run.__name__: run for run in RUNS}, config=(tyro.conf.OmitArgPrefixes,)
    )
    print(json.dumps(chosen))


if __name__ == "__main__":
    main()
