"""What a generator's turn and its critics' have in common: critics as constants, and the losses of either side.

Shapes: B rows; a critic's logits (B, ...), of patches or of the whole. Losses are the rows' means, (B,) fp32.
"""

from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

Adversary = Literal["hinge", "vanilla"]
"""Hinge (arXiv 1705.02894), or the cross entropy that does not saturate (arXiv 1406.2661, section 3)."""


def constant(module: nn.Module, *inputs: torch.Tensor) -> Any:
    """What a module says of `inputs` with its weights as constants: gradients reach the inputs, and no others.

    Its buffers, such as batch norm's, stay as they are.
    """
    held = {name: parameter.detach() for name, parameter in module.named_parameters()}
    held |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    return torch.func.functional_call(module, held, inputs)


def judge(logits: torch.Tensor, real: bool, kind: Adversary = "hinge") -> torch.Tensor:
    """A critic's loss on rows that are real, or are not."""
    signed = logits.float() if real else -logits.float()
    return (functional.relu(1 - signed) if kind == "hinge" else functional.softplus(-signed)).flatten(1).mean(1)


def please(logits: torch.Tensor, kind: Adversary = "hinge") -> torch.Tensor:
    """The loss of who made the rows that a critic says this of."""
    return (-logits.float() if kind == "hinge" else functional.softplus(-logits.float())).flatten(1).mean(1)


def of_each(loss: str, critics: int) -> list[str]:
    """Names of a loss by critic: its own where there is one critic, else with the critic's number, from 0."""
    return [loss] if critics == 1 else [f"{loss}_{number}" for number in range(critics)]
