"""Model FLOPs: counted in some micro-batches of each Update, told by the second, of GPUs' peak, and of a training."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from infra.train.plan import Plan
from infra.train.task import Update

SAMPLES = 20  # micro-batches of an Update that are counted
# Dense matrix products in bf16, FLOP/s, by a part of the name that CUDA has for a GPU; the first that fits is meant.
# From NVIDIA's data sheets, which often print twice as much, for sparse matrices. V100 and T4 know fp16 only.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,  # SXM
    "A100": 312e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100 PCIE": 112e12,
    "V100": 125e12,  # SXM2
    "T4": 65e12,
}


def peak(device: str) -> float | None:
    """The most FLOP/s of a GPU of this name; None where it is not known."""
    words = f" {device.replace('-', ' ')} "
    return next((most for name, most in PEAKS.items() if f" {name} " in words), None)


class Cost(NamedTuple):
    """What was counted of an Update: FLOPs of some micro-batches, and how many rows they had, also of weight 0."""

    start_step: int
    flops: float
    frozen: float  # of frozen models that it only asks
    rows: int
    micro_batches: int  # that were to be counted; 0: it stands for one of these, until there is one

    def plus(self, other: "Cost") -> "Cost":
        """Both together."""
        flops, frozen = self.flops + other.flops, self.frozen + other.frozen
        return Cost(self.start_step, flops, frozen, self.rows + other.rows, self.micro_batches + other.micro_batches)


class Flops:
    """Floating point operations that the model itself asks for, by the row of a global batch.

    Those of matrix products, convolutions and attention in a forward and a backward pass, as
    `torch.utils.flop_counter` counts them; a multiplication and an addition are two. What is computed a second time to
    save memory is not counted (arXiv 2204.02311, appendix B), nor is what optimizers compute. Frozen models that an
    Update only asks, as a text encoder whose features are not cached, count by themselves (`asking`).

    An Update is counted in SAMPLES micro-batches, the first of the worker at steps spread evenly over those in which
    it is awake (all, where there are fewer). Which these are depends on the training alone: what is counted goes into
    checkpoints (`state`), and a training that was cut counts what it would have counted. Where rows differ in length
    or shape, the mean is an estimate. In other micro-batches nothing is done, but in the first that a process sees,
    for the figures by the second.
    """

    def __init__(self, steps: int, saved: Mapping[str, Any] | None = None) -> None:
        self._steps = steps
        self._seen = {update: Cost(**cost) for update, cost in (saved or {}).items()}
        self._last: dict[str, float] = {}  # FLOPs by the row of the micro-batch that was counted last
        self._surveys: dict[str, float] = {}  # by the row

    def wants(self, update: Update, step: int) -> bool:
        """Whether an Update is counted in a training step."""
        return update.name not in self._last or step in sampled(update.start_step, self._steps)

    @contextmanager
    def surveyed(self, update: Update, step: int, rows: int) -> Iterator[None]:
        """The forward pass beforehand, in which the rows of all micro-batches show themselves to each other.

        Of it counts what it costs above a forward pass: else how memory is shared out would change the count.
        """
        if not self.wants(update, step):
            yield
            return
        with counting() as count:
            yield
        self._surveys[update.name] = count.flops / max(1, rows)

    @contextmanager
    def counted(self, update: Update, step: int, rows: int) -> Iterator[Callable[[], None]]:
        """The forward and backward pass of the first micro-batch of a step; call what it gives between the two."""
        if not self.wants(update, step):
            yield lambda: None
            return
        forward = [0.0]
        with counting() as count:
            yield lambda: forward.__setitem__(0, count.flops)
        more = max(0.0, self._surveys.pop(update.name, 0.0) * rows - forward[0])
        is_sample = step in sampled(update.start_step, self._steps)
        cost = Cost(update.start_step, count.flops + more, count.frozen, rows, int(is_sample))
        self._last[update.name] = cost.flops / max(1, rows)
        seen = self._seen.get(update.name)
        if is_sample and seen and seen.micro_batches:
            self._seen[update.name] = seen.plus(cost)
        elif is_sample or not seen:  # what is no sample stands there until there is one
            self._seen[update.name] = cost

    def state(self) -> dict[str, dict[str, float]]:
        """What was counted so far, for a checkpoint."""
        return {update: cost._asdict() for update, cost in self._seen.items()}

    def figures(self, rows_per_second: float, workers: int) -> dict[str, float]:
        """FLOP/s over all workers and, where these have GPUs that are known, the share of their peak."""
        flops = sum(self._last.values()) * rows_per_second
        most = peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        used = {"model_flops_utilization": flops / (most * workers)} if most else {}
        return {"model_flops_per_second": flops, **used}


def of_training(state: Mapping[str, Any], plan: Plan, steps: int) -> dict[str, float]:
    """`training_flops` of so many steps, by what a checkpoint says was counted, and `frozen_flops` if any.

    A row's FLOPs times the rows, over all Updates. Rows of weight 0 are none, for where they stand is a matter of how
    many workers there are, and what was lost with a worker and trained again counts once.
    """
    costs = [Cost(**cost) for cost in state.values()]
    rows = [plan.rows(cost.start_step, steps) / max(1, cost.rows) for cost in costs]
    frozen = sum(cost.frozen * times for cost, times in zip(costs, rows, strict=True))
    told = {"training_flops": sum(cost.flops * times for cost, times in zip(costs, rows, strict=True))}
    return (told if costs else {}) | ({"frozen_flops": frozen} if frozen else {})


def sampled(start: int, steps: int) -> set[int]:
    """The training steps, from 0, in which an Update that wakes at `start` is counted: the middles of equal parts."""
    awake = max(0, steps - start)
    return {start + (2 * part + 1) * awake // (2 * SAMPLES) for part in range(SAMPLES)} if awake else set()


_again = False  # what runs now was computed before
_asking = False  # what runs now is a frozen model that is only asked


@contextmanager
def again() -> Iterator[None]:
    """What runs in here was computed before, and is none of the model's own."""
    global _again
    before, _again = _again, True
    try:
        yield
    finally:
        _again = before


@contextmanager
def asking() -> Iterator[None]:
    """What runs in here is a frozen model that could as well have been asked before: it counts by itself."""
    global _asking
    before, _asking = _asking, True
    try:
        yield
    finally:
        _asking = before


class Count(TorchDispatchMode):
    """Lets every operation pass as it is, and adds up what it costs.

    Torch's own FlopCounterMode sets hooks on modules and gradients, where DeepSpeed has its own.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.frozen = 0, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: no compiler is loaded, which takes three seconds, to keep it out of here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cost = _COSTS.get(getattr(func, "_overloadpacket", func))
        # There operations come whole, as torch's own counter knows, too.
        if cost is None and torch.is_inference_mode_enabled() and isinstance(func, torch._ops.OpOverload):
            with self:
                if (out := func.decompose(*args, **(kwargs or {}))) is not NotImplemented:
                    return out
        out = func(*args, **(kwargs or {}))
        if cost is not None and not _again:
            flops = cost(*args, **(kwargs or {}), out_val=out)
            if _asking:
                self.frozen += flops
            else:
                self.flops += flops
        return out


@contextmanager
def counting() -> Iterator[Count]:
    """Count what is computed in here."""
    # A graph of `torch.compile` would hide what it computes, and what is first compiled in here is never again.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with eager, Count() as count:
        yield count


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_COSTS: dict[Any, Any] = {
    **flop_registry,
    # Torch 2.13 does not count those of the CPU.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
