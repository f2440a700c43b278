"""The rows of a sample: a picture each, in shards of an artifact that lies within its artifact."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from infra import storage, strict
from infra.data.ledger import Ledger, commit
from infra.data.stage import ACCEPTED
from workflows.prompts import Prompt

SHARD_ROWS = 1024  # rounded down to whole batches

ROWS = pa.schema(
    {
        "sample_id": pa.string(),  # the picture's number
        "state": pa.string(),
        "reason": pa.string(),
        "prompt": pa.string(),
        "prompt_id": pa.string(),
        "prompt_number": pa.int64(),
        "picture": pa.int64(),  # of the prompt
        "seed": pa.uint64(),
        "negative": pa.string(),
        "settings": pa.string(),  # JSON: a table a link of what its sampling has otherwise
        "told": pa.string(),  # JSON, by column; null: it is read from the row that the prompt is the caption of
        "corpus_id": pa.string(),  # that row's sample id
        "shard": pa.string(),  # and where it lies
        "place": pa.int64(),
        "scene": pa.string(),
        "metadata": pa.string(),
    }
)


def write_rows(prompts: Iterable[Prompt], out: str, *, seed: int, batch: int) -> None:
    """Write a row for each picture of some prompts; no more than a shard of them is in memory.

    Picture n of them all is drawn from `seed * 2**32 + n`, but where a prompt has a seed of its own, from that and, of
    several, the numbers after it. ValueError where there is no prompt.
    """
    rows, ledger = _rows(prompts, seed), Ledger(out)
    most = batch * max(1, SHARD_ROWS // batch)
    try:
        for number, part in enumerate(iter(lambda: list(islice(rows, most)), [])):
            name = f"{number:06d}"
            ledger.add(name, commit(out, name, pa.Table.from_pylist(part, ROWS)))
        if not ledger.complete():
            raise ValueError("There is no prompt, so there is nothing to draw.")
    except ValueError:
        storage.remove(out)
        raise
    ledger.close()


def _rows(prompts: Iterable[Prompt], seed: int) -> Iterator[dict[str, Any]]:
    number = 0
    for place, prompt in enumerate(prompts):
        for picture in range(prompt.count or 1):
            own = seed * 2**32 + number if prompt.seed is None else prompt.seed + picture
            yield {
                "sample_id": f"{number:09d}",
                "state": ACCEPTED,
                "prompt": prompt.text,
                "prompt_id": f"{place:05d}" if prompt.id is None else prompt.id,
                "prompt_number": place,
                "picture": picture,
                "seed": own % 2**64,
                "negative": prompt.negative or None,
                "settings": strict.dumps(prompt.settings) if prompt.settings else None,
                "told": strict.dumps(prompt.told) if prompt.place is None else None,
                "corpus_id": prompt.sample_id,
                "shard": prompt.place[0] if prompt.place else None,
                "place": prompt.place[1] if prompt.place else None,
                "scene": prompt.scene,
                "metadata": strict.dumps(prompt.metadata) if prompt.metadata is not None else None,
            }
            number += 1
