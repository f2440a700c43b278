"""The first weights of a model as a function of (seed, parameter's name), filled in one pass after it was built.

A module says how its own parameters begin by `begins(self.out, weight=constant(0.0))`, or `begins(self, ...)` for
parameters that it holds itself; linear, convolution, embedding and norm layers that say nothing begin as PyTorch's do.
The constructor's own values are written over, so that a model built in parts, or on the meta device and then emptied
onto another, is the same model; and a parameter's values do not depend on what else the model has.
"""

import math
from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from torch import nn

from t2i.random import child, keys_of, normals, uniforms

Shape = tuple[int, ...]
Fill = Callable[[torch.Tensor, Shape], torch.Tensor]  # (a key (1,), a shape) to float32 values of that shape
Module = TypeVar("Module", bound=nn.Module)


def begins(module: Module, **fills: Fill) -> Module:
    """`module`, with a fill declared for each of its own parameters or buffers that is named; a later word counts."""
    lacking = sorted(set(fills) - {name for name, _ in _own(module)})
    if lacking:
        raise ValueError(f"A {type(module).__name__} has no parameter {', '.join(lacking)} of its own to begin.")
    module._begins = {**getattr(module, "_begins", {}), **fills}  # type: ignore[assignment]
    return module


def initialize(model: nn.Module, seed: int, skip: Collection[str] = ()) -> None:
    """Fill every parameter of `model`, but none that is frozen in the submodules named in `skip`: these were loaded.

    A parameter that stands under several names is filled by the first. Raises ValueError for one without a fill. A
    buffer is filled where a module says how, and not in the submodules of `skip`.
    """
    loaded = [model.get_submodule(name) for name in skip]
    seen = {id(each) for module in loaded for each in module.parameters() if not each.requires_grad}
    seen |= {id(each) for module in loaded for each in module.buffers()}
    for name, module in model.named_modules():
        fill_own(module, name, seed, seen)


@torch.no_grad()
def fill_own(module: nn.Module, name: str, seed: int, seen: set[int]) -> None:
    """Fill the parameters that `module` itself holds, being called `name` in its model; those in `seen` are done.

    The part of `initialize` that may stand within a gathering of partitioned parameters (ZeRO 3).
    """
    told: dict[str, Fill] = getattr(module, "_begins", {})
    for own, parameter in _own(module):
        if id(parameter) in seen or (own not in told and not isinstance(parameter, nn.Parameter)):
            continue
        seen.add(id(parameter))
        full = f"{name}.{own}" if name else own
        fill = told.get(own) or _usual(module, own)
        if fill is None:
            raise ValueError(f"Nothing says how {full} of a {type(module).__name__} begins. Declare it with `begins`.")
        key = child(keys_of([seed], parameter.device), "weights/" + full)
        parameter.copy_(fill(key, tuple(parameter.shape)))


def _own(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The parameters and buffers that a module itself holds."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def constant(value: float) -> Fill:
    """All values are `value`."""
    return lambda key, shape: torch.full(shape, value, device=key.device)


def identity() -> Fill:
    """The identity matrix."""
    return lambda key, shape: torch.eye(*shape, device=key.device)


def normal(std: float) -> Fill:
    """N(0, std^2)."""
    return lambda key, shape: normals(key, shape, "normal")[0] * std


def truncated(std: float, bound: float = 2.0) -> Fill:
    """N(0, std^2) given that it lies within `bound` deviations (before truncation) of 0; not rescaled."""

    def fill(key: torch.Tensor, shape: Shape) -> torch.Tensor:
        low = 0.5 * math.erfc(bound / math.sqrt(2))
        chances = low + (1 - 2 * low) * uniforms(key, shape, "truncated", dtype=torch.float64)[0]
        return torch.special.ndtri(chances).clamp(-bound, bound).mul(std).float()

    return fill


def uniform(bound: float) -> Fill:
    """U(-bound, bound)."""
    return lambda key, shape: (uniforms(key, shape, "uniform")[0] * 2 - 1) * bound


def xavier(gain: float = 1.0) -> Fill:
    """U(-b, b) with b = gain sqrt(6 / (fan in + fan out)) of the flattened weight (Glorot and Bengio, 2010)."""

    def fill(key: torch.Tensor, shape: Shape) -> torch.Tensor:
        return uniform(gain * math.sqrt(6 / (shape[0] + math.prod(shape[1:]))))(key, shape)

    return fill


def lecun(scale: float = 1.0) -> Fill:
    """U(-b, b) with b = scale / sqrt(fan in): with scale 1, PyTorch's linear and convolution weights."""
    return lambda key, shape: uniform(scale / math.sqrt(math.prod(shape[1:])))(key, shape)


def _words(padding: int | None) -> Fill:
    def fill(key: torch.Tensor, shape: Shape) -> torch.Tensor:
        values = normal(1.0)(key, shape)
        return values if padding is None else values.index_fill_(0, torch.tensor(padding, device=key.device), 0.0)

    return fill


def _usual(module: nn.Module, own: str) -> Fill | None:
    """How PyTorch begins a parameter of its own layers."""
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        # A transposed convolution's weight is (in, out, ...), and PyTorch takes the second for its fan in, as here.
        return lecun() if own == "weight" else uniform(1 / math.sqrt(max(1, math.prod(module.weight.shape[1:]))))
    if isinstance(module, nn.Embedding):
        return _words(module.padding_idx)
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | nn.modules.batchnorm._BatchNorm):
        return constant(1.0 if own == "weight" else 0.0)
    return None
