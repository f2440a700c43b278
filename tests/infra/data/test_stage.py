from dataclasses import dataclass

import pytest

from infra.data.stage import Stage, run_batch


@dataclass
class Length:
    reads: tuple[str, ...] = ("text",)
    writes: tuple[str, ...] = ("length",)
    cpus: float = 1
    gpus: float = 0
    longest: int = 10

    def setup(self):
        self.calls = []

    def __call__(self, batch):
        self.calls.append(list(batch["text"]))
        lengths = [len(text) for text in batch["text"]]
        bad = [length > self.longest for length in lengths]
        return {
            "length": lengths,
            "state": ["rejected" if b else None for b in bad],
            "reason": ["too long" if b else None for b in bad],
        }


@dataclass
class Double:
    reads: tuple[str, ...] = ("length",)
    writes: tuple[str, ...] = ("double",)
    cpus: float = 1
    gpus: float = 0

    def setup(self):
        pass

    def __call__(self, batch):
        return {"double": [2 * length for length in batch["length"]]}


def batch(texts):
    return {"text": texts, "state": ["accepted"] * len(texts), "reason": [None] * len(texts)}


def test_stages_follow_each_other_and_see_accepted_rows_only():
    first, second = Length(), Double()
    first.setup()
    assert isinstance(first, Stage)
    rows = batch(["a", "bb", "c" * 11, "dddd"])
    rows["state"][1], rows["reason"][1] = "rejected", "before"
    before = {name: list(values) for name, values in rows.items()}
    result = run_batch([first, second], rows)
    assert first.calls == [["a", "c" * 11, "dddd"]]
    assert result == {
        "state": ["accepted", "rejected", "rejected", "accepted"],
        "reason": [None, "before", "too long", None],
        "length": [1, None, 11, 4],
        "double": [2, None, None, 8],
    }
    assert rows == before


def test_a_row_that_raises_fails_alone():
    stage = Length()
    stage.setup()
    result = run_batch([stage, Double()], batch(["a", None, "ccc"]))
    assert result["state"] == ["accepted", "failed", "accepted"]
    assert result["reason"] == [None, "Length: TypeError: object of type 'NoneType' has no len()", None]
    assert result["double"] == [2, None, 6]
    assert stage.calls == [["a", None, "ccc"], ["a"], [None], ["ccc"]]


def test_without_accepted_rows_no_stage_is_called():
    stage = Length()
    stage.setup()
    rows = {"text": ["a"], "state": ["failed"], "reason": ["before"]}
    assert run_batch([stage], rows) == {"state": ["failed"], "reason": ["before"], "length": [None]}
    assert stage.calls == []


@pytest.mark.parametrize(
    ("output", "message"), [({}, "did not return"), ({"double": [1]}, "1 values of 'double' for 2")]
)
def test_a_stage_that_breaks_its_promise_is_a_programmers_mistake(output, message):
    class Broken(Double):
        def __call__(self, batch):
            return output

    with pytest.raises(AssertionError, match=message):
        run_batch([Broken(reads=("text",))], batch(["a", "b"]))
