"""Model FLOPs: counted in one micro-batch of each Update, told by the second and as a share of what the GPUs can do."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

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


class Flops:
    """Floating point operations that the model itself asks for, by the row of a global batch.

    Those of matrix products, convolutions and attention in a forward and a backward pass, as
    `torch.utils.flop_counter` counts them; a multiplication and an addition are two. What is computed a second time to
    save memory is not counted (arXiv 2204.02311, appendix B). An Update is counted in its first micro-batch: where rows
    differ in length or shape, that is an estimate.
    """

    def __init__(self) -> None:
        self._by_row: dict[str, float] = {}

    @contextmanager
    def counted(self, update: str, rows: int) -> Iterator[None]:
        """The forward and backward pass of a micro-batch of an Update; it is counted if it is the first."""
        if update in self._by_row:
            yield
            return
        # A graph of `torch.compile` would hide what it computes, and what is first compiled in here is never again.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with eager, _Counter() as counter:
            yield
        self._by_row[update] = counter.flops / max(1, rows)

    def figures(self, rows_per_second: float, workers: int) -> dict[str, float]:
        """FLOP/s over all workers and, where these have GPUs that are known, the share of their peak."""
        flops = sum(self._by_row.values()) * rows_per_second
        most = peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        used = {"model_flops_utilization": flops / (most * workers)} if most else {}
        return {"model_flops_per_second": flops, **used}


_again = False  # what runs now was computed before


@contextmanager
def again() -> Iterator[None]:
    """What runs in here was computed before, and is none of the model's own."""
    global _again
    _again = True
    try:
        yield
    finally:
        _again = False


class _Counter(TorchDispatchMode):
    """Lets every operation pass as it is, and adds up what it costs.

    Torch's own FlopCounterMode sets hooks on modules and gradients, where DeepSpeed has its own.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: no compiler is loaded, which takes three seconds, to keep it out of here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not _again and (cost := _COSTS.get(getattr(func, "_overloadpacket", func))) is not None:
            self.flops += cost(*args, **(kwargs or {}), out_val=out)
        return out


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
