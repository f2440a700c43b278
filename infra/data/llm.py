"""Run chat requests over shards through vLLM in Ray Data; actors gather the answers of a shard and commit it."""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from infra import strict
from infra.capacity import WITHOUT_VLLM, has_vllm
from infra.data.ledger import Ledger, Record, commit, pending, total
from infra.data.run import first_few
from infra.data.shards import VIRTUAL, ShardReader, joined_names
from infra.data.stage import ACCEPTED, FAILED, Columns
from infra.metrics import Report
from infra.raylet import broke_off
from infra.trouble import UnavailableError

ERROR = "__inference_error__"  # Ray Data's column: rows that have it pass by the engine and what follows
LOST = "decode_error: image: "  # opens the reason of a row whose picture cannot be had, as in `run_stages`

Found = dict[tuple[int, str], tuple[str | None, str]]  # by row and column, the text and what went wrong


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
    if not has_vllm():
        raise ValueError(WITHOUT_VLLM)
    import ray  # slow to import, here and below: `plan` does without
    import ray.data
    import ray.exceptions

    assert ray.is_initialized(), "call infra.cluster.connect first: Ray Data would start a cluster of its own making"
    names = first_few(joined_names(inputs))
    left = pending(out, names)
    ledger = Ledger(out)
    if sign:
        sign.setup()
    if left:
        # One block a shard, so that a shard's requests come close together and few shards are open at once.
        shards = ray.data.from_items([{"name": name} for name in left], override_num_blocks=len(left))
        ask: Any = partial(_ask, requests, tuple(inputs), engine.get("batch_size", 32))
        asked = shards.map_batches(ask, batch_size=1, batch_format="numpy")
        desks = _desks(min(actors[1], len(left)), (requests.writes, tuple(inputs), out, sign))
        hand_in: Any = partial(_hand_in, desks)
        answered = _processor(engine, actors)(asked).map_batches(hand_in, batch_size=None, batch_format="numpy")
        ended = {*names} - {*left}
        try:
            for told in answered.iter_rows():
                if told["away"]:
                    raise UnavailableError(told["away"])
                ledger.add(str(told["name"]), json.loads(told["record"]))
                ended.add(str(told["name"]))
                if report:
                    report(len(ended), len(names), "shards")
        except ray.exceptions.RayError as error:
            raise broke_off(error) from error
        finally:
            ledger.save()
    if left := pending(out, names):
        raise RuntimeError(f"{len(left)} shards of {out} lack answers, such as {left[0]}; run it again for the rest.")
    return total(ledger.close().values())


class Desk:
    """Gathers the answers of some shards, and commits each with its last one."""

    def __init__(self, writes: Sequence[str], inputs: Sequence[str], out: str, sign: Sign | None) -> None:
        self._writes, self._inputs, self._out, self._sign = writes, inputs, out, sign
        self._waiting: dict[str, Found] = {}
        self._ended: dict[str, Record] = {}

    def take(self, answers: Sequence[Mapping[str, Any]]) -> dict[str, Record]:
        """The records of those shards of which nothing is awaited any more, by name.

        Answers come in any order, and again where Ray tries again, with `name`, `row` (of the accepted ones), `column`,
        how many answers there are `of` the shard, and `text` or what went wrong. A shard that asks nothing has one of
        no column.
        """
        told: dict[str, Record] = {}
        for answer in answers:
            name = str(answer["name"])
            if name not in self._ended:
                found = self._waiting.setdefault(name, {})
                if column := str(answer["column"]):
                    text = answer.get("text")  # of a row that passed by the engine Ray Data may make NaN
                    said = text if isinstance(text, str) else None
                    found[int(answer["row"]), column] = (said, answer.get(ERROR) or "")
                if len(found) == int(answer["of"]):
                    table = _table(name, self._waiting.pop(name), self._writes, self._inputs, self._sign)
                    self._ended[name] = commit(self._out, name, table)
            if name in self._ended:
                told[name] = self._ended[name]
        return told


def _desks(count: int, arguments: tuple[Any, ...]) -> list[Any]:
    """So many desks, over the nodes of the cluster. With a node the shards are lost that one there has begun with."""
    import ray

    make: Any = ray.remote(num_cpus=0, scheduling_strategy="SPREAD", max_restarts=3, max_task_retries=3)(Desk).remote
    return [make(*arguments) for _ in range(count)]


def _hand_in(desks: Sequence[Any], batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
    """Take answers to the desks of their shards; `name` and `record`, as JSON, of the shards that ended with them.

    `away` is why none could be committed.
    """
    import ray

    by_desk: dict[int, list[dict[str, Any]]] = {}
    for values in zip(*batch.values(), strict=True):
        answer = dict(zip(batch, values, strict=True))
        answer = {key: answer.get(key) for key in ("name", "of", "row", "column", "text", ERROR)}
        by_desk.setdefault(zlib.crc32(str(answer["name"]).encode()) % len(desks), []).append(answer)
    ended: dict[str, Record] = {}
    try:
        for records in ray.get([desks[desk].take.remote(answers) for desk, answers in by_desk.items()]):
            ended |= records
    except UnavailableError as error:  # its sentence says all, without Ray's layers around it
        return {"name": [""], "record": [""], "away": [str(getattr(error, "cause", error))]}
    records = [strict.dumps(record) for record in ended.values()]
    return {"name": list(ended), "record": records, "away": [""] * len(ended)}


def _processor(engine: Mapping[str, Any], actors: tuple[int, int]) -> Any:
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig  # slow, and wanted here alone

    # Without `should_continue_on_error` one bad row would end the run.
    config = vLLMEngineProcessorConfig(**engine, concurrency=actors, should_continue_on_error=True)
    return build_processor(config, preprocess=_request, postprocess=_answer)


def _ask(
    requests: Requests, inputs: tuple[str, ...], size: int, batch: dict[str, np.ndarray]
) -> Iterator[dict[str, list[Any]]]:
    """The requests of one shard, `size` rows at a time, as JSON: a table would fill in what the parts do not share.

    One that has none to make has a row that passes by the engine, so that its desk hears of it.
    """
    (name,) = batch["name"]
    reader = ShardReader(inputs, str(name))
    if not len(reader):
        yield {"name": [str(name)], "of": [0], "row": [0], "column": [""], "request": [""], "lost": ["no row"]}
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
        shard = {"name": [str(name)] * len(rows), "of": [len(reader) * len(requests.writes)] * len(rows)}
        yield shard | {
            key: [row[field] for row in rows] for field, key in enumerate(("row", "column", "request", "lost"))
        }


def _request(row: dict[str, Any]) -> dict[str, Any]:
    request = row.pop("request")  # the row goes along, and need not carry the picture twice
    if row["lost"]:
        return {"messages": None, "sampling_params": None, ERROR: row["lost"]}
    return json.loads(request) | {ERROR: ""}


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("name", "of", "row", "column")} | {"text": row["generated_text"]}


def _table(
    name: str,
    found: Found,
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
