"""Activations that are computed again in the backward pass instead of being kept (arXiv 1604.06174)."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from infra.train.flops import again


def recompute(module: nn.Module) -> int:
    """Keep only the inputs of the module's repeated blocks; returns how many blocks there are.

    Blocks are the outermost members of every ModuleList and Sequential that have parts of their own. The numbers stay
    the same bit for bit: chance is replayed, and a block with persistent buffers, which a second pass might change a
    second time (batch norm, codebooks that follow an average), is left as it is.

    Whose parts are called by somebody else, in place of its own forward pass, is called by that one as
    `block.recomputed(function, *arguments)`, where it has such an attribute.
    """
    done: set[nn.Module] = set()
    _wrap_blocks(module, done)
    return len(done)


def _wrap_blocks(module: nn.Module, done: set[nn.Module]) -> None:
    for child in module.children():
        block = isinstance(module, nn.ModuleList | nn.Sequential) and any(True for _ in child.children())
        if not block or _remembers(child):
            _wrap_blocks(child, done)
        elif child not in done:
            done.add(child)
            _wrap(child)


def _remembers(module: nn.Module) -> bool:
    kept = module.state_dict(keep_vars=True)
    return any(name in kept for name, _ in module.named_buffers())


def _wrap(block: nn.Module) -> None:
    def recomputed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # nothing is kept anyway, and a block may fill a cache
            return function(*args, **kwargs)
        return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()), **kwargs)

    block.recomputed = recomputed  # type: ignore[assignment]
    block.forward = partial(recomputed, block.forward)
