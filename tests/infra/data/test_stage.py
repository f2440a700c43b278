from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infra.data.stage import DeviceError, Runner, Stage, kind_of


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
    result = Runner([first, second])(rows)
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
    result = Runner([stage, Double()])(batch(["a", None, "ccc"]))
    assert result["state"] == ["accepted", "failed", "accepted"]
    assert result["reason"] == [None, "error: Length: TypeError: object of type 'NoneType' has no len()", None]
    assert result["double"] == [2, None, 6]
    assert stage.calls == [["a", None, "ccc"], ["a"], [None, "ccc"], [None], ["ccc"]]


def test_without_accepted_rows_no_stage_is_called():
    stage = Length()
    stage.setup()
    rows = {"text": ["a"], "state": ["failed"], "reason": ["before"]}
    assert Runner([stage])(rows) == {"state": ["failed"], "reason": ["before"], "length": [None]}
    assert stage.calls == []


@pytest.mark.parametrize(
    ("output", "message"), [({}, "did not return"), ({"double": [1]}, "1 values of 'double' for 2")]
)
def test_a_stage_that_breaks_its_promise_is_a_programmers_mistake(output, message):
    class Broken(Double):
        def __call__(self, batch):
            return output

    with pytest.raises(AssertionError, match=message):
        Runner([Broken(reads=("text",))])(batch(["a", "b"]))


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


class Small(Length):
    """Memory for so many letters at once."""

    memory = 8

    def __call__(self, batch):
        result = super().__call__(batch)
        if sum(result["length"]) > self.memory:
            raise OutOfMemoryError("CUDA out of memory")
        return result


def test_what_does_not_fit_is_halved_and_grows_back():
    stage = Small()
    stage.setup()
    run = Runner([stage])
    assert run(batch(["aa"] * 8))["length"] == [2] * 8
    assert [len(call) for call in stage.calls] == [8, 4, 4]
    stage.calls.clear()
    for _ in range(20):
        run(batch(["a"] * 8))  # fits as it is, once the size has grown back
    assert [len(call) for call in stage.calls][:2] == [4, 4]
    assert [len(call) for call in stage.calls][-1] == 8


def test_a_row_that_alone_does_not_fit_fails_for_want_of_memory():
    stage = Small()
    stage.setup()
    result = Runner([stage])(batch(["a", "b" * 9, "cc"]))
    assert result["length"] == [1, None, 2]
    assert result["reason"] == [None, "oom: Small: OutOfMemoryError: CUDA out of memory", None]


class AcceleratorError(RuntimeError):
    """As torch calls its own."""


class Lost(Length):
    """Its device is lost at the letter x, and all that comes after raises; perhaps it tells it of its rows."""

    caught = False

    def __call__(self, batch):
        self.lost = getattr(self, "lost", False) or any("x" in text for text in batch["text"])
        result = super().__call__(batch)
        if self.lost and not self.caught:
            raise AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ..")
        if self.lost:
            return result | {"state": ["failed"] * len(result["length"]), "reason": ["error: CUDA error: ill"] * 64}
        return result


def test_an_error_of_the_device_is_no_fault_of_rows_and_nothing_more_is_tried():
    stage = Lost()
    stage.setup()
    run = Runner([stage])
    assert run(batch(["a", "b"]))["length"] == [1, 1]
    with pytest.raises(DeviceError, match=r"^device_error: Lost: AcceleratorError: CUDA error: an illegal memory"):
        run(batch(["a"] * 32 + ["x"] + ["b"] * 31))
    assert [len(call) for call in stage.calls] == [2, 64]


def test_an_error_of_the_device_that_a_stage_tells_of_its_rows_is_one():
    stage = Lost()
    stage.setup()
    stage.caught, stage.gpus = True, 1
    with pytest.raises(DeviceError, match=r"^device_error: Lost: error: CUDA error: ill$"):
        Runner([stage])(batch(["a"] * 63 + ["x"]))


def test_what_a_server_says_of_its_own_device_is_its_row():
    """A stage without a GPU has none to lose: the words came over a network."""
    stage = Lost()
    stage.setup()
    stage.caught = True
    told = Runner([stage])(batch(["a"] * 63 + ["x"]))
    assert set(told["state"]) == {"failed"}


@given(st.lists(st.sampled_from(["a", "bbb", "x" * 9, None, "reject me please"]), min_size=1, max_size=24))
def test_whatever_fails_beside_it_a_row_ends_the_same(texts):
    """Each row alone is the oracle of the rows together."""

    def run(rows):
        stage = Small(longest=10)
        stage.setup()
        return Runner([stage])(batch(rows))

    together, alone = run(texts), [run([text]) for text in texts]
    for name, values in together.items():
        assert values == [one[name][0] for one in alone]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "oom"),
        (OutOfMemoryError(), "oom"),
        (TimeoutError(), "timeout"),
        (ConnectionResetError(), "read_error"),
        (FileNotFoundError(), "read_error"),
        (KeyError(), "error"),
        (KeyError("CUDA error: of a corpus"), "error"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "error"),
        (AcceleratorError("CUDA error: device-side assert triggered"), "device_error"),
        (AcceleratorError("CUDA error: out of memory"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(..)`"), "device_error"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "device_error"),
        (RuntimeError("HIP error: the operation cannot be performed in the present state"), "device_error"),
        (RuntimeError("NCCL Error 1: unhandled cuda error"), "device_error"),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "device_error"),
        (DeviceError("device_error: Caption: it"), "device_error"),
    ],
)
def test_kinds_of_trouble(error, kind):
    assert kind_of(error) == kind


@dataclass
class Product:
    """A model of torch: 24 FLOPs a row."""

    reads: tuple[str, ...] = ("number",)
    writes: tuple[str, ...] = ("product",)
    cpus: float = 1
    gpus: float = 0

    def setup(self):
        self.layer = torch.nn.Linear(3, 4, bias=False)

    @torch.inference_mode()
    def __call__(self, batch):
        rows = torch.tensor(batch["number"], dtype=torch.float32)[:, None].expand(-1, 3)
        return {"product": self.layer(rows).sum(1).tolist()}


def test_the_first_batch_tells_what_a_model_costs():
    stage = Product()
    stage.setup()
    runner = Runner([stage])
    lost = {"number": [5], "state": ["failed"], "reason": ["x"]}
    rows = {"number": [1, 2, 3], "state": ["accepted", "rejected", "accepted"], "reason": [None, "y", None]}
    runner(lost)
    assert runner.cost == (0, 0), "there was nothing to do"
    first = runner(rows)
    assert runner.cost == (2 * 24, 2)
    assert runner(rows) == first, "counting changes nothing"
    assert runner.cost == (2 * 24, 2)
