"""Run chat requests over shards through vLLM in Ray Data; a shard is committed when all its answers are there."""

import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import ray.data

from infra import strict
from infra.data.ledger import Ledger, commit, pending, total
from infra.data.shards import VIRTUAL, ShardReader, count_rows, joined_names
from infra.data.stage import ACCEPTED, FAILED, Columns
from infra.metrics import Report

ERROR = "__inference_error__"  # Ray Data's column: rows that have it pass by the engine and what follows
LOST = "decode_error: image: "  # opens the reason of a row whose picture cannot be had, as in `run_stages`


class Sign(Protocol):
    """Adds columns, `writes`, to those with the answers, `reads`, when a shard is put together."""

    @property
    def writes(self) -> tuple[str, ...]: ...

    def setup(self) -> None: ...

    def __call__(self, batch: Columns) -> Columns:
        """The `writes` columns of all rows of a shard; an answer that is not there is None."""
        ...


class Requests(Protocol):
    """A picklable function that makes chat requests of rows."""

    @property
    def reads(self) -> tuple[str, ...]: ...

    @property
    def writes(self) -> tuple[str, ...]: ...

    def __call__(self, batch: Columns) -> dict[str, list[dict[str, Any]]]:
        """For each column of `writes`, one request a row: `messages` and `sampling_params`; the answer goes there."""
        ...


def run_requests(
    requests: Requests,
    engine: Mapping[str, Any],
    inputs: Sequence[str],
    out: str,
    *,
    actors: tuple[int, int] = (1, 1),
    report: Report | None = None,
    sign: Sign | None = None,
) -> dict[str, Any]:
    """Answer all requests of the rows of artifacts of one ingest, commit sidecars with `writes`; return the counts.

    `engine` are arguments of `ray.data.llm.vLLMEngineProcessorConfig`; `actors` how many engines there are, at least
    and at most. Shards that were committed before are left alone. `sign` adds columns of text to the
    answers. Raises ValueError where vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("vLLM is not installed; install rescribe[vllm], or caption through an endpoint that has it.")
    assert ray.is_initialized(), "call infra.cluster.connect first: Ray Data would start a cluster of its own making"
    names = joined_names(inputs)
    left = pending(out, names)
    if sign:
        sign.setup()
    if left:
        # One block a shard, so that a shard's requests come close together and few shards are open at once.
        shards = ray.data.from_items([{"name": name} for name in left], override_num_blocks=len(left))
        ask: Any = partial(_ask, requests, tuple(inputs), engine.get("batch_size", 32))
        asked = shards.map_batches(ask, batch_size=1, batch_format="numpy")
        answers = _processor(engine, actors)(asked).iter_rows()
        counts = count_rows(inputs)
        done = len(names) - len(left)
        for _ in gather(answers, {name: counts[name] for name in left}, requests.writes, inputs, out, sign):
            done += 1
            if report:
                report(done, len(names), "shards")
    if left := pending(out, names):
        raise RuntimeError(f"{len(left)} shards of {out} lack answers, such as {left[0]}; run it again for the rest.")
    return total(Ledger(out).close().values())


def gather(
    answers: Iterable[Mapping[str, Any]],
    counts: Mapping[str, int],
    writes: Sequence[str],
    inputs: Sequence[str],
    out: str,
    sign: Sign | None = None,
) -> Iterator[str]:
    """Commit each shard with its last answer, and yield its name; `counts` are the accepted rows of each shard.

    Answers come in any order, with `name`, `row` (of the accepted ones), `column`, and `text` or what went wrong.
    """
    for name in (name for name, rows in counts.items() if not rows):
        commit(out, name, _table(name, {}, writes, inputs, sign))
        yield name
    waiting: dict[str, dict[tuple[int, str], tuple[str | None, str]]] = {}
    for answer in answers:
        name, key = str(answer["name"]), (int(answer["row"]), str(answer["column"]))
        found = waiting.setdefault(name, {})
        found[key] = (answer.get("text"), answer.get(ERROR) or "")
        if len(found) == counts[name] * len(writes):
            commit(out, name, _table(name, waiting.pop(name), writes, inputs, sign))
            yield name


def _processor(engine: Mapping[str, Any], actors: tuple[int, int]) -> Any:
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig  # slow, and wanted here alone

    # Without `should_continue_on_error` one bad row would end the run.
    config = vLLMEngineProcessorConfig(**engine, concurrency=actors, should_continue_on_error=True)
    return build_processor(config, preprocess=_request, postprocess=_answer)


def _ask(
    requests: Requests, inputs: tuple[str, ...], size: int, batch: dict[str, np.ndarray]
) -> Iterator[dict[str, list[Any]]]:
    """The requests of one shard, `size` rows at a time, as JSON: a table would fill in what the parts do not share."""
    (name,) = batch["name"]
    reader = ShardReader(inputs, str(name))
    stored = [column for column in requests.reads if column not in VIRTUAL]
    pixels = reader.pixels(np.arange(len(reader)), whole=getattr(requests, "whole", False))
    for start in range(0, len(reader), size):
        part = np.arange(start, min(start + size, len(reader)))
        columns = reader.stored(stored, part) | {"pixels": [next(pixels) for _ in part]}
        lost = [isinstance(image, Exception) for image in columns["pixels"]]
        good = [place for place, bad in enumerate(lost) if not bad]
        made = requests({key: [values[place] for place in good] for key, values in columns.items()}) if good else {}
        rows = [
            (int(part[place]), column, strict.dumps(made[column][number]), "")
            for column in requests.writes
            for number, place in enumerate(good)
        ] + [
            (int(part[place]), column, "", f"{LOST}{columns['pixels'][place]}")
            for column in requests.writes
            for place, bad in enumerate(lost)
            if bad
        ]
        yield {"name": [str(name)] * len(rows)} | {
            key: [row[field] for row in rows] for field, key in enumerate(("row", "column", "request", "lost"))
        }


def _request(row: dict[str, Any]) -> dict[str, Any]:
    request = row.pop("request")  # the row goes along, and need not carry the picture twice
    if row["lost"]:
        return {"messages": None, "sampling_params": None, ERROR: row["lost"]}
    return json.loads(request) | {ERROR: ""}


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    return {"name": row["name"], "row": row["row"], "column": row["column"], "text": row["generated_text"]}


def _table(
    name: str,
    found: Mapping[tuple[int, str], tuple[str | None, str]],
    writes: Sequence[str],
    inputs: Sequence[str],
    sign: Sign | None,
) -> pa.Table:
    reader = ShardReader(inputs, name)
    states, reasons = list(reader.states), list(reader.reasons)
    columns: Columns = {column: [None] * len(states) for column in writes}
    for (row, column), (text, error) in found.items():
        place = reader.accepted[row]
        if not error and text and text.strip():
            columns[column][place] = text.strip()
        elif states[place] == ACCEPTED:
            said = error if error.startswith(LOST) else f"error: {column}: {error or 'the answer is empty'}"
            states[place], reasons[place] = FAILED, " ".join(said.split())[:500]
    columns |= sign(columns) if sign else {}
    text_columns = {column: pa.array(values, pa.string()) for column, values in columns.items()}
    state_columns = {"state": pa.array(states, pa.string()), "reason": pa.array(reasons, pa.string())}
    return pa.table({"sample_id": pa.array(reader.sample_ids, pa.string()), **state_columns, **text_columns})
