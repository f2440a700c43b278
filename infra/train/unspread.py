"""Refuses to compute with weights that ZeRO 3 has spread over workers, where nothing would put them together."""

from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class Unspread(TorchFunctionMode):
    """A context in which a spread weight of the Update of this name must not be touched; ValueError where it is."""

    def __init__(self, update: str) -> None:
        super().__init__()
        self._update = update

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(each, "ds_id") for each in tree_leaves((args, kwargs))):  # DeepSpeed's mark
            raise ValueError(
                f"What follows a step of '{self._update}' computes with its weights, which ZeRO 3 spreads over the "
                "workers. Give --cluster.zero-stage 2 or less."
            )
        return func(*args, **(kwargs or {}))
