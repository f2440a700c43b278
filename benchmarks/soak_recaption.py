"""Does a corpus come out whole, however often its captioning is killed? SIGKILL of driver, actor and raylet in turn.

    python -m benchmarks.soak_recaption --kills 21 --seed 0

Prints one JSON object. One output is captioned, and killed at random times, until it is complete: a quarter of the
drivers within their first seconds, in imports, in Ray's start or in the ingest, everything else while it captions. A
killed actor leaves its run alive, so that the next blow falls on the same run. Then `rescribe verify`, and every row is
compared with those of an undisturbed run.
"""

import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

from tests import kills


@dataclass(frozen=True, kw_only=True)
class Config:
    kills: int = 21
    seed: int = 0
    shards: int = 100
    rows: int = 5
    within: float = 3.0  # seconds of captioning until a blow, at most
    early: float = 15.0  # seconds of a driver's life until an early blow, at most


def main() -> None:
    config = tyro.cli(Config)
    rng = random.Random(config.seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        captioner = kills.write_captioner(Path(folder, "captioner"))
        corpus = kills.write_corpus(Path(folder, "corpus"), config.shards, config.rows)
        plain, out = str(Path(folder, "plain")), str(Path(folder, "out"))
        started = time.monotonic()
        code, _, err = kills.run(*kills.line_of(corpus, captioner, plain), timeout=900)
        assert code == 0, err
        undisturbed = time.monotonic() - started
        started = time.monotonic()
        told = soak(config, rng, kills.line_of(corpus, captioner, out), out)
        seconds = time.monotonic() - started
        found = kills.rows(out)
        ids = [row["sample_id"] for shard in found.values() for row in shard]
        verdict = kills.verified(out)
        results = {
            **told,
            "seed": config.seed,
            "shards": len(found),
            "rows": len(ids),
            "duplicates": len(ids) - len(set(ids)),
            "whole": verdict["whole"],
            "counts": {name: verdict[name] for name in ("rows_in", "accepted", "rejected", "failed")},
            "equal_to_undisturbed": found == kills.rows(plain),
            "seconds": round(seconds, 1),
            "undisturbed_seconds": round(undisturbed, 1),
        }
    print(json.dumps(results))


def soak(config: Config, rng: random.Random, line: tuple[str, ...], out: str) -> dict:
    """Kill until enough were killed, then let it end; what happened."""
    killed: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    early = runs = 0
    slowest = 0.0  # seconds from the last blow to the end of its driver
    while True:
        runs += 1
        with kills.started(*line) as (process, seen):
            last = time.monotonic()
            while killed.total() < config.kills:
                kind = kills.KINDS[killed.total() % len(kills.KINDS)]
                if kind == "driver" and rng.random() < 0.25:
                    time.sleep(rng.uniform(0, config.early))
                    seen |= {each.pid: each for each in kills.family(process)}
                    struck = process.poll() is None
                    process.kill()
                    early += struck
                else:
                    struck = kills.strike(process, seen, kind, rng.uniform(0, config.within), out, timeout=300)
                last = time.monotonic()
                killed[kind] += struck
                print(f"{kind:<7} {killed.total():>3}  {len(kills.shards(out))} shards", file=sys.stderr, flush=True)
                if kind != "actor" or not struck:
                    break
            _, err = process.communicate(timeout=900)
            assert "Traceback" not in err, err
            code = process.returncode
            ends[str(code)] += 1
            if code:
                slowest = max(slowest, time.monotonic() - last)
                assert not (left := kills.survivors(seen)), left
        if code == 0:
            assert killed.total() >= config.kills, f"complete after {killed.total()} kills; give more shards"
            return {
                "kills": dict(killed),
                "early_kills": early,
                "runs": runs,
                "exit_codes": dict(ends),
                "slowest_end_after_a_kill": round(slowest, 1),
            }


if __name__ == "__main__":
    main()
